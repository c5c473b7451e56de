"""Stowgate's own processes, started as an operator starts them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests
from instances import uid
from prometheus_client.parser import text_string_to_metric_families

STOWGATE = Path(sys.executable).with_name("stowgate")

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], seconds: float = 30.0, pause_seconds: float = 0.02) -> T:
    """The first true value that `look` returns; it is called again after pauses that grow, so that
    looking is not what keeps a service busy."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {look.__doc__ or look}")
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, 0.5)


@dataclass
class Service:
    """A running process, and the URL that it printed."""

    process: "subprocess.Popen[str]"
    url: str
    data: Path
    log: Path

    def post(self, path: str, body: Any, content_type: str | None, **headers: str) -> Any:
        given = {**headers, **({"Content-Type": content_type} if content_type else {})}
        return requests.post(
            self.url + path, data=body, headers=given, allow_redirects=False, timeout=120
        )

    def get(self, path: str) -> Any:
        return requests.get(self.url + path, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """As `/metrics` has it; 0 for what was never counted."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        return next((s.value for s in samples if (s.name, s.labels) == (name, labels)), 0.0)

    def opened(self, payload_id: str, seconds: float = 30.0) -> dict[str, Any]:
        """The payload as `GET /payloads/{id}` shows it, once its request is opened."""

        def look() -> dict[str, Any] | None:
            payload: dict[str, Any] = self.get(f"/payloads/{payload_id}").json()
            return payload if payload["state"] == "opened" else None

        return wait_for(look, seconds)

    def payloads_with(self, instance: bytes) -> set[str]:
        """Ids of those that hold it, byte for byte; uploads may come and go during the search."""
        name = f"{uid(instance, 'SOPInstanceUID')}.dcm"
        bucket = self.data / "monaideploy"
        found = [Path(folder, name) for folder, _, names in os.walk(bucket) if name in names]
        return {
            path.relative_to(bucket).parts[0] for path in found if path.read_bytes() == instance
        }

    def process_ids(self) -> list[int]:
        """Its own and those of its children, which an API's requests run in."""
        return with_children(self.process.pid)

    def memory_bytes(self) -> int:
        """The largest anonymous memory among its processes; mapped files do not count."""
        return max(_anonymous_bytes(pid) for pid in self.process_ids())

    def kill(self) -> None:
        """All at once and without a word."""
        for process_id in self.process_ids():
            os.kill(process_id, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def with_children(process_id: int) -> list[int]:
    children = Path(f"/proc/{process_id}/task/{process_id}/children")
    return [process_id, *map(int, children.read_text().split())]


def _anonymous_bytes(pid: int) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def environment(data: Path, settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("STOWGATE_")}
    return inherited | {
        "STOWGATE_DATA": str(data),
        "STOWGATE_LISTEN": "127.0.0.1:0",
        "STOWGATE_WORKER_LISTEN": "127.0.0.1:0",
        "STOWGATE_RELAY_SECONDS": "1",
        "STOWGATE_MIN_FREE_BYTES": "0",
        **settings,
    }


@contextmanager
def running(
    command: str, data: Path, program: Path = STOWGATE, /, **settings: str
) -> Iterator[Service]:
    """`stowgate COMMAND` with these settings, until the block ends."""
    data.mkdir(parents=True, exist_ok=True)
    log = data / f"{command}-{time.monotonic_ns()}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [program, command],
            env=environment(data, settings),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield Service(process, _url(process, log), data, log)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _url(process: "subprocess.Popen[str]", log: Path) -> str:
    assert process.stdout
    found = re.search(r"https?://\S+", process.stdout.readline())
    assert found, f"it did not start:\n{log.read_text()}"
    return found[0]
