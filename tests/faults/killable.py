"""Processes and containers that can be killed, frozen and started again where they were."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import docker
import engines
import pika
import requests
from docker.errors import DockerException, NotFound
from engines import NotToBeHad, ObjectStoreEndpoint, Say, lasting_port
from service import STOWGATE, environment

END_SECONDS = 60.0

# What `Part.ask` may raise of a part that does not serve.
NOT_SERVING = (*engines.NO_ANSWER, requests.RequestException)


class Body(Protocol):
    def start(self) -> None: ...
    def kill(self) -> None: ...
    def terminate(self) -> None:
        """Ask it to end, and wait until it has."""

    def freeze(self) -> None: ...
    def thaw(self) -> None: ...


@dataclass
class Process:
    """A command with all its children, in a folder of its own. Dies with this process."""

    command: list[str]
    environment: Mapping[str, str]
    folder: Path
    _group: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    # The shell's standard input is a pipe that only this process holds, so even `kill -9` of this
    # process ends the group.
    _GUARD = '("$@" </dev/null & echo $! >pid; wait $!; kill -9 0) & read -r _; kill -9 0'

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output").open("ab") as output:
            self._group = subprocess.Popen(
                ["/bin/sh", "-c", self._GUARD, "sh", *self.command],
                env=dict(self.environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )

    def kill(self) -> None:
        if self._group is not None:
            self._signal(signal.SIGKILL)
            self._group.communicate()
            self._group = None

    def terminate(self) -> None:
        assert self._group is not None
        os.kill(int((self.folder / "pid").read_text()), signal.SIGTERM)
        self._group.wait(END_SECONDS)
        self.kill()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._group is not None
        try:
            os.killpg(self._group.pid, number)
        except ProcessLookupError:
            if number is not signal.SIGKILL:
                raise RuntimeError(
                    f"{self.command[0]} ended by itself, see {self.folder}"
                ) from None


@dataclass
class Container:
    """A container that keeps its disk and its ports when it is killed and started again."""

    container: Any

    def start(self) -> None:
        self.container.start()

    def kill(self) -> None:
        self.container.kill()
        self.container.wait()

    def terminate(self) -> None:
        self.container.stop(timeout=int(END_SECONDS))

    def freeze(self) -> None:
        self.container.pause()

    def thaw(self) -> None:
        self.container.unpause()


@dataclass(frozen=True)
class Part:
    """What the chaos strikes. `ask` raises one of `NOT_SERVING` while it does not serve."""

    kind: str
    name: str
    body: Body
    ask: Callable[[], None]

    def until_it_serves(self, seconds: float = 90.0) -> float:
        """When it did, on the monotonic clock. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.ask()
                return time.monotonic()
            except NOT_SERVING as error:
                if time.monotonic() > deadline:
                    words = f"{self.name} does not serve {seconds:.0f} s after it was started"
                    raise TimeoutError(f"{words}: {error!r}") from error
            time.sleep(0.05)


def stowgate(
    kind: str, name: str, folder: Path, settings: Mapping[str, str], stack: ExitStack
) -> tuple[Part, str]:
    """`stowgate api` or `stowgate worker`, not started yet, and its URL."""
    place = f"127.0.0.1:{lasting_port()}"
    listen = "STOWGATE_LISTEN" if kind == "api" else "STOWGATE_WORKER_LISTEN"
    given = environment(folder / "data", {**settings, listen: place, "STOWGATE_LOG": "json"})
    url = f"http://{place}"
    process = _process([str(STOWGATE), kind], given, folder, stack)
    return Part(kind, name, process, partial(_ask, url)), url


def _ask(url: str) -> None:
    requests.get(f"{url}/health/ready", timeout=5).raise_for_status()


def object_store(folder: Path, stack: ExitStack, say: Say) -> tuple[Part, ObjectStoreEndpoint]:
    """A MinIO of its own, which serves. Raises `NotToBeHad`."""
    port = lasting_port()
    endpoint = ObjectStoreEndpoint(
        f"http://127.0.0.1:{port}", secrets.token_hex(8), secrets.token_hex(16)
    )
    login = {"MINIO_ROOT_USER": endpoint.access_key, "MINIO_ROOT_PASSWORD": endpoint.secret_key}

    def on_this_machine() -> Body:
        program = _obtained("minio", engines.object_store_built, say)
        console = f"127.0.0.1:{lasting_port()}"
        command = [program, "server", "data", "--address", f"127.0.0.1:{port}"]
        given = {**os.environ, **login, "HOME": str(folder)}
        return _process([*command, "--console-address", console], given, folder, stack)

    def in_docker() -> Body:
        return _container(
            engines.MINIO_IMAGE, {9000: port}, login, stack, say, command=["server", "/data"]
        )

    part = _first("object store", partial(engines.ask, endpoint), (on_this_machine, in_docker), say)
    return part, endpoint


def broker(
    folder: Path, stack: ExitStack, say: Say, max_message_bytes: int = 128 << 20
) -> tuple[Part, str]:
    """A RabbitMQ of its own, which serves, and its URL. Raises `NotToBeHad`."""
    port, password = lasting_port(), secrets.token_hex(16)
    url = f"amqp://stowgate:{password}@127.0.0.1:{port}/monaideploy"

    def on_this_machine() -> Body:
        program = _obtained("rabbitmq-server", engines.broker_installed, say)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rabbitmq.conf").write_text(
            f"default_user = stowgate\ndefault_pass = {password}\ndefault_vhost = monaideploy\n"
            f"max_message_size = {max_message_bytes}\n"
        )
        given = {**os.environ, **engines.rabbitmq_environment(folder, port, lasting_port())}
        if epmd := shutil.which("epmd"):
            # One that RabbitMQ starts itself would die with it, or stay behind at the end.
            _process([epmd], given, folder / "epmd", stack).start()
        return _process([program], given, folder, stack)

    def in_docker() -> Body:
        given = {
            "RABBITMQ_DEFAULT_USER": "stowgate",
            "RABBITMQ_DEFAULT_PASS": password,
            "RABBITMQ_DEFAULT_VHOST": "monaideploy",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-rabbit max_message_size {max_message_bytes}",
        }
        return _container(engines.rabbitmq_image(), {5672: port}, given, stack, say, command=None)

    part = _first("broker", partial(_ask_broker, url), (on_this_machine, in_docker), say)
    return part, url


def rabbitmqctl(part: Part, *arguments: str) -> str:
    """Run `rabbitmqctl` on a broker of `broker`; returns what it printed."""
    body = part.body
    if isinstance(body, Container):
        code, output = body.container.exec_run(["rabbitmqctl", "--quiet", *arguments])
        assert code == 0, output
        return str(output.decode())
    assert isinstance(body, Process)
    return subprocess.run(
        [engines.program("rabbitmqctl"), "--quiet", *arguments],
        env={**os.environ, **body.environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def dead_letter_at_least_once(part: Part, queue: str) -> None:
    """Set the policy of docs/guarantees.md, which loses no refusal when the broker is killed."""
    definition = {"dead-letter-strategy": "at-least-once", "overflow": "reject-publish"}
    place = ["--vhost", "monaideploy", "--apply-to", "queues"]
    pattern = f"^{re.escape(queue)}$"
    rabbitmqctl(part, "set_policy", *place, f"{queue}-refusals", pattern, json.dumps(definition))


def _ask_broker(url: str) -> None:
    # `engines.ask` waits for as long as pika does, which is minutes when the broker is frozen.
    parameters = pika.URLParameters(f"{url}?socket_timeout=3&stack_timeout=5")
    pika.BlockingConnection(parameters).close()


def _obtained(name: str, obtain: engines.Way, say: Say) -> str:
    """The program, installed or built first where that asks nobody. Raises `NotToBeHad`."""
    try:
        return engines.program(name)
    except NotToBeHad:
        with ExitStack() as passing:
            obtain(passing, say)
        return engines.program(name)


def _first(
    kind: str,
    ask: Callable[[], None],
    ways: tuple[Callable[[], Body], ...],
    say: Say,
) -> Part:
    reasons = []
    for way in ways:
        try:
            body = way()
            body.start()
            part = Part(kind, kind, body, ask)
            part.until_it_serves()
        except (NotToBeHad, TimeoutError, DockerException) as why:
            reasons.append(" ".join(str(why).split())[:300])
            continue
        what = body.command[0] if isinstance(body, Process) else "a container"
        say(f"{kind}: {what}")
        return part
    raise NotToBeHad(f"{kind}: {'; '.join(reasons)}")


def _process(
    command: list[str], given: Mapping[str, str], folder: Path, stack: ExitStack
) -> Process:
    """A command that is not started yet; killed when the stack closes."""
    process = Process(command, given, folder)
    stack.callback(process.kill)
    return process


def _container(
    image: str,
    ports: Mapping[int, int],
    given: Mapping[str, str],
    stack: ExitStack,
    say: Say,
    command: list[str] | None,
) -> Container:
    """A container that is not started yet; removed when the stack closes."""
    client = docker.from_env()
    stack.callback(client.close)
    try:
        client.images.get(image)
    except NotFound:
        say(f"pulling {image}")
        client.images.pull(image)
    container = client.containers.create(
        image,
        command,
        environment=dict(given),
        hostname="stowgate-chaos",  # RabbitMQ's node is named after it, and its disk after the node
        ports={f"{inside}/tcp": ("127.0.0.1", outside) for inside, outside in ports.items()},
    )
    stack.callback(container.remove, force=True, v=True)
    return Container(container)
