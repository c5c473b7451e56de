"""Three RabbitMQ nodes in containers of their own, on loopback, of which each can be killed."""

import json
import secrets
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pika
from engines import NO_ANSWER, NotToBeHad, lasting_port, rabbitmq_image

NODES = 3
_START_SECONDS = 180.0

# For the image of Docker Hub and for Debian's package alike.
_START = """
mkdir -p /etc/rabbitmq /var/lib/rabbitmq
printf '%s' "$CLUSTER_CONF" > /etc/rabbitmq/rabbitmq.conf
printf '%s' "$CLUSTER_COOKIE" > /var/lib/rabbitmq/.erlang.cookie
chmod 400 /var/lib/rabbitmq/.erlang.cookie
chown -R rabbitmq /var/lib/rabbitmq
exec rabbitmq-server
"""


def docker(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=120, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        raise NotToBeHad(f"docker {arguments[0]}: {told.strip()[:300]}") from error
    return done.stdout.strip()


@dataclass(frozen=True)
class Node:
    name: str
    container: str
    url: str

    def kill(self) -> None:
        docker("kill", "--signal", "KILL", self.container)

    def start(self) -> None:
        docker("start", self.container)

    def answers(self) -> bool:
        try:
            pika.BlockingConnection(
                pika.URLParameters(f"{self.url}?socket_timeout=3&stack_timeout=5")
            ).close()
        except NO_ANSWER:
            return False
        return True


def until(look: Callable[[], bool], what: str, seconds: float = _START_SECONDS) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not look():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - began


class Cluster:
    def __init__(self, stack: ExitStack) -> None:
        token, password = secrets.token_hex(4), secrets.token_hex(16)
        network = f"stowgate-cluster-{token}"
        docker("network", "create", network)
        stack.callback(_quietly, "network", "rm", network)
        names = [f"rabbit{number}" for number in range(1, NODES + 1)]
        peers = "".join(
            f"cluster_formation.classic_config.nodes.{number} = rabbit@{name}\n"
            for number, name in enumerate(names, start=1)
        )
        conf = (
            f"default_user = stowgate\ndefault_pass = {password}\ndefault_vhost = stowgate\n"
            "loopback_users = none\nlisteners.tcp.default = 5672\n"
            "cluster_partition_handling = pause_minority\n"
            "cluster_formation.peer_discovery_backend = classic_config\n" + peers
        )
        cookie = secrets.token_hex(16)
        self.nodes = []
        for name in names:
            port, container = lasting_port(), f"{network}-{name}"
            stack.callback(_quietly, "rm", "--force", "--volumes", container)
            docker(
                *("create", "--name", container, "--hostname", name),
                *("--network", network, "--network-alias", name),
                *("--publish", f"127.0.0.1:{port}:5672"),
                *("--env", f"CLUSTER_CONF={conf}", "--env", f"CLUSTER_COOKIE={cookie}"),
                *("--entrypoint", "sh", rabbitmq_image(), "-c", _START),
            )
            url = f"amqp://stowgate:{password}@127.0.0.1:{port}/stowgate"
            self.nodes.append(Node(name, container, url))
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            until(node.answers, f"{node.name} answers")
        until(lambda: len(self.running()) == NODES, "three nodes are one cluster")

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    def running(self) -> list[str]:
        """The names of the nodes that are up, as a node that is up sees it."""
        for node in self.nodes:
            with suppress(NotToBeHad, ValueError):
                told = docker(
                    *("exec", node.container, "rabbitmqctl", "cluster_status"),
                    *("--formatter", "json", "--quiet"),
                )
                return list(json.loads(told[told.index("{") :])["running_nodes"])
        return []


def _quietly(*arguments: str) -> None:
    with suppress(NotToBeHad):
        docker(*arguments)
