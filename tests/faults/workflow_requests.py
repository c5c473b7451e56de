"""Takes workflow requests as the Workflow Manager does, and keeps each one."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pika
from killable import NOT_SERVING
from ledger import Delivery
from pika.adapters.blocking_connection import BlockingChannel
from workflow_manager_double import declare, violations

EXCHANGE, QUEUE = "monaideploy", "md.workflow.request"

_AGAIN_SECONDS = 0.2


class WorkflowRequests:
    """A consumer in a thread of its own, which connects again for ever."""

    def __init__(self, url: str, file: Path) -> None:
        self._parameters = pika.URLParameters(f"{url}?socket_timeout=3&stack_timeout=5")
        self._file = file.open("ab")
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self.deliveries: list[Delivery] = []
        # Every interruption is told by the chaos itself.
        logging.getLogger("pika").setLevel(logging.CRITICAL)

    def start(self) -> None:
        with pika.BlockingConnection(self._parameters) as connection:
            declare(connection.channel(), EXCHANGE, QUEUE)
        self._running = self._thread.submit(self._run)

    def drain(self) -> None:
        """Stop, and take what is left, also of what the broker gave up delivering."""
        self.stop()
        with pika.BlockingConnection(self._parameters) as connection:
            channel = connection.channel()
            for queue in (QUEUE, f"{QUEUE}-dead-letter"):
                while (got := channel.basic_get(queue))[0] is not None:
                    self._keep(channel, *got)
        self._file.close()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.shutdown()
        self._running.result()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(*NOT_SERVING):
                self._consume()
            self._stopping.wait(_AGAIN_SECONDS)

    def _consume(self) -> None:
        with pika.BlockingConnection(self._parameters) as connection:
            channel = connection.channel()
            channel.basic_qos(prefetch_count=1)
            for method, properties, body in channel.consume(QUEUE, inactivity_timeout=0.2):
                if method is not None:
                    self._keep(channel, method, properties, body)
                if self._stopping.is_set():
                    return

    def _keep(self, channel: BlockingChannel, method: Any, properties: Any, body: bytes) -> None:
        request = json.loads(body)
        self.deliveries.append(
            Delivery(
                payload_id=request["payload_id"],
                body=body,
                request=request,
                redelivered=method.redelivered,
                at=time.time(),
                violations=tuple(violations(vars(properties), body)),
            )
        )
        self._file.write(json.dumps([method.redelivered, request]).encode() + b"\n")
        self._file.flush()
        channel.basic_ack(method.delivery_tag)
