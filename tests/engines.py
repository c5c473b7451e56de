"""Real engines for the tests: an S3 object store and an AMQP broker, from wherever they can be had.

The ways to one are tried in the order of `WAYS`; the first that leads to an engine that answers is
taken. Whatever was started is gone when the run ends. So are processes when the run is killed, and
containers where Ryuk's image is at hand.
"""

import fcntl
import gc
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

import docker
import pika
import urllib3
from docker.errors import DockerException, ImageNotFound
from docker.models.images import ImageCollection
from minio import Minio
from minio.error import MinioException
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

# Tests that are skipped with these words are told in the last lines of a run.
MISSING = "engine missing: "

SECOND_OBJECT_STORE = "second object store"
OBJECT_STORE_VARIABLE = "STOWGATE_TEST_OBJECT_STORE"
BROKER_VARIABLE = "STOWGATE_TEST_BROKER"
MINIO_IMAGE = "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"
# The series with support, and one that a machine without a registry may have.
RABBITMQ_IMAGES = ("rabbitmq:4.3-management", "rabbitmq:4.1-management")
MINIO_MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"

# Conditional writes are atomic from this version on. `STOWGATE_TEST_OBJECT_STORE=versitygw` has all
# tests use this store.
VERSITYGW_MODULE = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
VERSITYGW = "versitygw"

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "engines"

GIVEN_SECONDS = 5.0
START_SECONDS = 90.0
OBTAIN_SECONDS = 1200.0
# The second store adds to what the first one shows, and must not take the time of all else.
OBTAIN_IN_CI_SECONDS = 90.0

# pika's time-out of the handshake, which a frozen broker leads to, is not an AMQPError.
NO_ANSWER = (
    OSError,
    MinioException,
    urllib3.exceptions.HTTPError,
    AMQPError,
    AMQPConnectorException,
)

_container_start = threading.Lock()


class NotToBeHad(Exception):
    """This way leads to no engine; the text says why."""


@dataclass(frozen=True)
class ObjectStoreEndpoint:
    """An S3 endpoint, `http(s)://host:port`, and keys with permission to create buckets."""

    url: str
    access_key: str
    secret_key: str


Address: TypeAlias = ObjectStoreEndpoint | str
"""Of an object store, or the URL of a broker."""


@dataclass(frozen=True)
class Engine:
    address: Address
    origin: str


Say: TypeAlias = Callable[[str], None]
Way: TypeAlias = Callable[[ExitStack, Say], Engine]


def object_store_client(endpoint: ObjectStoreEndpoint) -> Minio:
    """A client for setting tests up and clearing away behind them; gives up within seconds."""
    url = urlsplit(endpoint.url)
    return Minio(
        endpoint=url.netloc,
        access_key=endpoint.access_key,
        secret_key=endpoint.secret_key,
        secure=url.scheme == "https",
        region="us-east-1",
        http_client=urllib3.PoolManager(timeout=urllib3.Timeout(connect=3, read=10), retries=False),
    )


def ask(address: Address) -> None:
    """Return when the engine answers; raises one of `NO_ANSWER`."""
    if isinstance(address, ObjectStoreEndpoint):
        object_store_client(address).bucket_exists(f"stowgate-probe-{secrets.token_hex(4)}")
        return
    parts = urlsplit(address)
    if parts.scheme == "amqp":
        # pika logs every refused connection as an error; knock before it does.
        place = (parts.hostname or "localhost", parts.port or 5672)
        with socket.create_connection(place, timeout=3) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            if not connection.recv(1):
                raise ConnectionError(f"{place[0]}:{place[1]} hangs up on AMQP 0-9-1")
    pika.BlockingConnection(pika.URLParameters(address)).close()


def _until_it_answers(
    origin: str,
    ask: Callable[[], None],
    seconds: float = START_SECONDS,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except NO_ANSWER as error:
            if not alive():
                raise NotToBeHad(f"{origin}: it stopped again") from error
            if time.monotonic() > deadline:
                words = f"{origin}: no answer within {seconds:.0f} s ({error!r})"
                raise NotToBeHad(words) from error
        time.sleep(0.1)


def _given(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise NotToBeHad(f"{variable} is not set")
    return value


def _given_object_store(stack: ExitStack, say: Say) -> Engine:
    if _given(OBJECT_STORE_VARIABLE) == VERSITYGW:
        return _first_engine((_versitygw_on_this_machine, _versitygw_built), stack, say)
    url = urlsplit(_given(OBJECT_STORE_VARIABLE))
    endpoint = ObjectStoreEndpoint(
        url=f"{url.scheme}://{url.netloc.rpartition('@')[2]}",
        access_key=unquote(url.username or ""),
        secret_key=unquote(url.password or ""),
    )
    origin = f"{endpoint.url} given by {OBJECT_STORE_VARIABLE}"
    _until_it_answers(origin, lambda: ask(endpoint), GIVEN_SECONDS)
    return Engine(endpoint, origin)


def _given_broker(_stack: ExitStack, _say: Say) -> Engine:
    url = _given(BROKER_VARIABLE)
    origin = f"{urlsplit(url).netloc.rpartition('@')[2]} given by {BROKER_VARIABLE}"
    _until_it_answers(origin, lambda: ask(url), GIVEN_SECONDS)
    return Engine(url, origin)


def _is_here(images: ImageCollection, image: str) -> bool:
    try:
        images.get(image)
    except ImageNotFound:
        return False
    return True


def _run_in_docker(
    image: str,
    port: int,
    environment: dict[str, str],
    stack: ExitStack,
    say: Say,
    command: str | None = None,
) -> str:
    """Start a container, and return the `host:port` at which it has that port."""
    try:
        container = DockerContainer(image, env=environment, command=command, ports=[port])
        stack.callback(container.stop)
        images = container.get_docker_client().client.images
        if not _is_here(images, testcontainers_config.ryuk_image):
            # Ryuk clears away behind a run that was killed. Not worth a pull that may not work.
            testcontainers_config.ryuk_disabled = True
        if not _is_here(images, image):
            say(f"pulling {image}")
            images.pull(image)
        with _container_start:  # two first starts at once would make two reapers
            container.start()
        return f"{container.get_container_host_ip()}:{container.get_exposed_port(port)}"
    except (DockerException, OSError, RuntimeError) as error:  # the last of testcontainers
        raise NotToBeHad(f"Docker: {' '.join(str(error).split())[:200]}") from error


def _object_store_in_docker(stack: ExitStack, say: Say) -> Engine:
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    environment = {"MINIO_ROOT_USER": access_key, "MINIO_ROOT_PASSWORD": secret_key}
    place = _run_in_docker(MINIO_IMAGE, 9000, environment, stack, say, command="server /data")
    endpoint = ObjectStoreEndpoint(f"http://{place}", access_key, secret_key)
    origin = f"Docker {MINIO_IMAGE}"
    _until_it_answers(origin, lambda: ask(endpoint))
    return Engine(endpoint, origin)


def rabbitmq_image() -> str:
    """The first that is on this machine, else the first."""
    with suppress(DockerException), closing(docker.from_env()) as client:
        return next(
            (image for image in RABBITMQ_IMAGES if _is_here(client.images, image)),
            RABBITMQ_IMAGES[0],
        )
    return RABBITMQ_IMAGES[0]


def _broker_in_docker(stack: ExitStack, say: Say) -> Engine:
    password = secrets.token_hex(16)
    environment = {
        "RABBITMQ_DEFAULT_USER": "stowgate",
        "RABBITMQ_DEFAULT_PASS": password,
        "RABBITMQ_DEFAULT_VHOST": "tests",
    }
    image = rabbitmq_image()
    place = _run_in_docker(image, 5672, environment, stack, say)
    url, origin = f"amqp://stowgate:{password}@{place}/tests", f"Docker {image}"
    _until_it_answers(origin, lambda: ask(url))
    return Engine(url, origin)


def lasting_port() -> int:
    """A free port that stays free while nobody listens on it.

    It lies below those that Linux gives to outgoing connections (ip_local_port_range): one of them
    could get the port of an engine that is down, even one that tries to reach that very engine.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def start_process(
    command: list[str], environment: dict[str, str], folder: Path, stack: ExitStack
) -> Callable[[], bool]:
    """Run a command until the stack closes or this process dies; returns whether it still runs."""
    # The shell's standard input is a pipe that only this process holds, so even `kill -9` of this
    # process ends the group.
    guard = '("$@" </dev/null; kill -9 0) & read -r _; kill -9 0'
    with (folder / "output").open("ab") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", guard, "sh", *command],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )

    stack.callback(process.communicate)
    return lambda: process.poll() is None


def temporary_folder(stack: ExitStack) -> Path:
    return Path(
        stack.enter_context(
            tempfile.TemporaryDirectory(prefix="stowgate-engine-", ignore_cleanup_errors=True)
        )
    )


def _start_minio(server: str, origin: str, stack: ExitStack) -> Engine:
    folder = temporary_folder(stack)
    place, console = f"127.0.0.1:{lasting_port()}", f"127.0.0.1:{lasting_port()}"
    endpoint = ObjectStoreEndpoint(f"http://{place}", secrets.token_hex(8), secrets.token_hex(16))
    alive = start_process(
        [server, "server", str(folder / "data"), "--address", place, "--console-address", console],
        {
            "MINIO_ROOT_USER": endpoint.access_key,
            "MINIO_ROOT_PASSWORD": endpoint.secret_key,
            "HOME": str(folder),
        },
        folder,
        stack,
    )
    _until_it_answers(origin, lambda: ask(endpoint), alive=alive)
    return Engine(endpoint, origin)


def _start_versitygw(server: str, origin: str, stack: ExitStack) -> Engine:
    folder = temporary_folder(stack)
    (folder / "data").mkdir()
    (folder / "versions").mkdir()
    place = f"127.0.0.1:{lasting_port()}"
    endpoint = ObjectStoreEndpoint(f"http://{place}", secrets.token_hex(8), secrets.token_hex(16))
    alive = start_process(
        [
            *(server, "--port", place, "--quiet", "--keep-alive"),
            *("posix", "--versioning-dir", str(folder / "versions"), str(folder / "data")),
        ],
        {"ROOT_ACCESS_KEY": endpoint.access_key, "ROOT_SECRET_KEY": endpoint.secret_key},
        folder,
        stack,
    )
    _until_it_answers(origin, lambda: ask(endpoint), alive=alive)
    return Engine(endpoint, origin)


def rabbitmq_environment(folder: Path, port: int, epmd_port: int) -> dict[str, str]:
    """What keeps a RabbitMQ on these ports of the loopback, and within the folder."""
    return {
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"stowgate-{secrets.token_hex(4)}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(lasting_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
    }


def _start_rabbitmq(server: str, origin: str, stack: ExitStack) -> Engine:
    folder = temporary_folder(stack)
    port, epmd_port, password = lasting_port(), lasting_port(), secrets.token_hex(16)
    (folder / "rabbitmq.conf").write_text(
        f"default_user = stowgate\ndefault_pass = {password}\ndefault_vhost = tests\n"
    )
    environment = rabbitmq_environment(folder, port, epmd_port)
    if epmd := shutil.which("epmd"):
        # One that RabbitMQ starts itself is a daemon and would stay behind.
        alive = start_process([epmd], environment, folder, stack)
        epmd_place = ("127.0.0.1", epmd_port)
        _until_it_answers(epmd, lambda: socket.create_connection(epmd_place).close(), alive=alive)
    alive = start_process([server], environment, folder, stack)
    url = f"amqp://stowgate:{password}@127.0.0.1:{port}/tests"
    _until_it_answers(origin, lambda: ask(url), alive=alive)
    return Engine(url, origin)


def program(name: str) -> str:
    """Where a program is, also those of Debian's packages. Raises `NotToBeHad`."""
    folders = [
        # What Debian's /usr/sbin/rabbitmq-server wraps: the wrapper insists on a user of its own.
        "/usr/lib/rabbitmq/bin",
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",
        "/usr/local/go/bin",
        str(CACHE),
    ]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise NotToBeHad(f"no {name} on this machine")
    return found


def _object_store_on_this_machine(stack: ExitStack, _say: Say) -> Engine:
    server = program("minio")
    return _start_minio(server, f"{server} on this machine", stack)


def _broker_on_this_machine(stack: ExitStack, _say: Say) -> Engine:
    server = program("rabbitmq-server")
    return _start_rabbitmq(server, f"{server} on this machine", stack)


def _versitygw_on_this_machine(stack: ExitStack, _say: Say) -> Engine:
    server = program(VERSITYGW)
    return _start_versitygw(server, f"{server} on this machine", stack)


@contextmanager
def one_run_at_a_time(name: str) -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_command(
    command: list[str], environment: dict[str, str], seconds: float = OBTAIN_SECONDS
) -> None:
    try:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise NotToBeHad(f"{command[0]} took over {seconds:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip()).splitlines()[-1:]
        raise NotToBeHad(f"{' '.join(command[:2])} failed: {' '.join(last)[:200]}") from error


def go_install(name: str, module: str, say: Say, seconds: float = OBTAIN_SECONDS) -> Path:
    """Build a program into the checkout's cache, once. Raises `NotToBeHad`."""
    go = program("go")
    target = CACHE / name
    with one_run_at_a_time(name):
        if not target.exists():
            say(f"building {name} with {go} (some minutes, once per checkout)")
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                run_command(
                    [go, "install", "-ldflags=-s -w", module],
                    {"GOBIN": folder, "CGO_ENABLED": "0"},
                    seconds,
                )
                os.replace(Path(folder) / name, target)
    return target


def object_store_built(stack: ExitStack, say: Say) -> Engine:
    began = time.monotonic()
    target = go_install("minio", MINIO_MODULE, say)
    return _start_minio(str(target), f"{target}, built in {time.monotonic() - began:.0f} s", stack)


def _versitygw_built(stack: ExitStack, say: Say) -> Engine:
    seconds = OBTAIN_IN_CI_SECONDS if os.environ.get("CI") else OBTAIN_SECONDS
    began = time.monotonic()
    target = go_install(VERSITYGW, VERSITYGW_MODULE, say, seconds)
    origin = f"{target}, built in {time.monotonic() - began:.0f} s"
    return _start_versitygw(str(target), origin, stack)


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Debian's packages ask this script whether they may start their service (invoke-rc.d(8))."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    try:
        policy.chmod(0o755)
        yield
    finally:
        policy.unlink()


def install_debian_package(package: str) -> None:
    """As root on Debian, once per machine; no service of it is started. Raises `NotToBeHad`."""
    if os.geteuid() != 0:
        raise NotToBeHad(f"not root, so {package} cannot be installed")
    apt_get = program("apt-get")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    wait = "-oDPkg::Lock::Timeout=300"
    install = [apt_get, "install", wait, "-y", "--no-install-recommends", package]
    with one_run_at_a_time("apt-get"), _no_service_starts():
        try:
            run_command(install, environment)
        except NotToBeHad:
            run_command([apt_get, "update", wait], environment)
            run_command(install, environment)


def broker_installed(stack: ExitStack, say: Say) -> Engine:
    began = time.monotonic()
    if os.geteuid() == 0:
        say("installing rabbitmq-server with apt-get (a minute or two, once per machine)")
    install_debian_package("rabbitmq-server")
    server = program("rabbitmq-server")
    origin = f"{server}, installed in {time.monotonic() - began:.0f} s"
    return _start_rabbitmq(server, origin, stack)


WAYS: dict[str, tuple[Way, ...]] = {
    "object store": (
        _given_object_store,
        _object_store_in_docker,
        _object_store_on_this_machine,
        object_store_built,
    ),
    SECOND_OBJECT_STORE: (_versitygw_on_this_machine, _versitygw_built),
    "broker": (
        _given_broker,
        _broker_in_docker,
        _broker_on_this_machine,
        broker_installed,
    ),
}


def _first_engine(ways: Iterable[Way], stack: ExitStack, say: Say) -> Engine:
    reasons = []
    for way in ways:
        with ExitStack() as attempt:
            try:
                engine = way(attempt, say)
            except NotToBeHad as why:
                reasons.append(str(why))
                continue
            stack.enter_context(attempt.pop_all())
            return engine
    raise NotToBeHad("; ".join(reasons))


def _first_to_be_had(ways: Iterable[Way], stack: ExitStack, say: Say) -> Engine | NotToBeHad:
    try:
        return _first_engine(ways, stack, say)
    except NotToBeHad as why:
        return why


class Engines:
    """The engines of one test run, each started at most once.

    `outcomes` are those that another process of the run has, and keeps until the run ends.
    """

    def __init__(self, say: Say, outcomes: Mapping[str, Engine | NotToBeHad]) -> None:
        self._say = say
        self._stack = ExitStack()
        self.outcomes = dict(outcomes)

    def start(self, names: Iterable[str]) -> None:
        """Start these side by side; returns when each answers or is known not to be had."""
        missing = [name for name in names if name not in self.outcomes]
        with warnings.catch_warnings():
            # docker-py leaves its socket open where no daemon listens; let no test answer for it.
            warnings.simplefilter("ignore", ResourceWarning)
            with ThreadPoolExecutor(max_workers=len(WAYS)) as threads:
                starting = {
                    name: threads.submit(_first_to_be_had, WAYS[name], self._stack, self._say)
                    for name in missing
                }
            self.outcomes |= {name: outcome.result() for name, outcome in starting.items()}
            gc.collect()

    def address(self, name: str) -> Address:
        """Where the engine answers; starts it if need be. Raises `NotToBeHad`."""
        self.start([name])
        outcome = self.outcomes[name]
        if isinstance(outcome, NotToBeHad):
            raise outcome
        return outcome.address

    def describe(self) -> str:
        """One line: which engine is used for what, and where it came from."""
        return "; ".join(f"{name}: {self._describe(name)}" for name in WAYS)

    def _describe(self, name: str) -> str:
        outcome = self.outcomes.get(name)
        if outcome is None:
            return "not needed"
        return outcome.origin if isinstance(outcome, Engine) else f"NONE ({outcome})"

    def close(self) -> None:
        self._stack.close()
