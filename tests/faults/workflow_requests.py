"""Takes workflow requests as the Workflow Manager does, refuses some, and keeps each one."""

import json
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pika
from killable import NOT_SERVING
from ledger import Delivery, Request
from pika.adapters.blocking_connection import BlockingChannel
from workflow_manager_double import declare, violations

from worker.workflow_manager import number_of

EXCHANGE, QUEUE = "monaideploy", "md.workflow.request"

_AGAIN_SECONDS = 0.2


class WorkflowRequests:
    """A consumer in a thread of its own, which connects again for ever.

    It rejects a share of the requests while it is `refusing`: those are `rejected`, and
    `dead_letters` what came to the Workflow Manager's own dead-letter queue.
    """

    def __init__(self, url: str, file: Path, refused_share: float = 0.0, seed: int = 0) -> None:
        self.refusing = True
        self.rejected: set[Request] = set()
        self.dead_letters: set[Request] = set()
        self._refused_share = refused_share
        self._random = random.Random(f"{seed}/refused")
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
        self.refusing = False
        with pika.BlockingConnection(self._parameters) as connection:
            channel = connection.channel()
            while (got := channel.basic_get(QUEUE))[0] is not None:
                self._keep(channel, *got)
            seen = {(delivery.payload_id, delivery.number) for delivery in self.deliveries}
            while (got := channel.basic_get(f"{QUEUE}-dead-letter"))[0] is not None:
                request = _request_of(got[1], json.loads(got[2]))
                self.dead_letters.add(request)
                if request in seen:
                    channel.basic_ack(got[0].delivery_tag)
                else:
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
        payload_id, number = _request_of(properties, request)
        self.deliveries.append(
            Delivery(
                payload_id=payload_id,
                number=number,
                body=body,
                request=request,
                redelivered=method.redelivered,
                at=time.time(),
                violations=tuple(violations(vars(properties), body)),
            )
        )
        self._file.write(json.dumps([method.redelivered, request]).encode() + b"\n")
        self._file.flush()
        if self.refusing and self._random.random() < self._refused_share:
            self.rejected.add((payload_id, number))
            channel.basic_reject(method.delivery_tag, requeue=False)
        else:
            channel.basic_ack(method.delivery_tag)


def _request_of(properties: Any, request: dict[str, Any]) -> Request:
    payload_id = request["payload_id"]
    return payload_id, number_of(properties.message_id, payload_id)
