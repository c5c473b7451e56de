"""OpenTelemetry's own collector, put together by its builder, which writes what it receives to a
file; and a receiver that keeps the bytes.
"""

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answering import Answering, serving
from engines import (
    CACHE,
    NotToBeHad,
    Say,
    go_install,
    lasting_port,
    one_run_at_a_time,
    program,
    run_command,
    start_process,
    temporary_folder,
)
from service import wait_for

VERSION = "v0.165.0"
BUILDER_MODULE = f"go.opentelemetry.io/collector/cmd/builder@{VERSION}"
_CONTRIB = "github.com/open-telemetry/opentelemetry-collector-contrib"
# Only tests of the file exporter import it, and the Go proxy does not serve it.
_NOT_SERVED = f"{_CONTRIB}/extension/encoding/otlpencodingextension"
_BUILD_SECONDS = 1200.0


def obtained(say: Say) -> str:
    """The collector, built into the checkout's cache, once. Raises `NotToBeHad`."""
    target = CACHE / "otelcol"
    if not target.exists():
        if os.environ.get("CI"):
            raise NotToBeHad("it takes some minutes to build, and CI is set")
        builder = go_install("builder", BUILDER_MODULE, say)
        with one_run_at_a_time("otelcol"):
            if not target.exists():
                say("building OpenTelemetry's collector (some minutes, once per checkout)")
                _build(builder, target)
    return str(target)


def _build(builder: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        stub = folder / "stub"
        stub.mkdir()
        (stub / "go.mod").write_text(f"module {_NOT_SERVED}\n\ngo 1.25\n")
        (stub / "stub.go").write_text("package otlpencodingextension\n")
        parts = {
            "dist": {"name": "otelcol", "output_path": str(folder / "dist")},
            "receivers": [
                {"gomod": f"go.opentelemetry.io/collector/receiver/otlpreceiver {VERSION}"}
            ],
            "exporters": [{"gomod": f"{_CONTRIB}/exporter/fileexporter {VERSION}"}],
            "replaces": [f"{_NOT_SERVED} => {stub}"],
        }
        (folder / "builder.json").write_text(json.dumps(parts))  # JSON is YAML
        go_folder = os.pathsep.join([str(Path(program("go")).parent), os.environ["PATH"]])
        run_command(
            [str(builder), "--config", str(folder / "builder.json")],
            {"CGO_ENABLED": "0", "PATH": go_folder},
            _BUILD_SECONDS,
        )
        os.replace(folder / "dist" / "otelcol", target)


@dataclass(frozen=True)
class Span:
    """A span as the collector has received it. `parent_id` is empty for a root."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    began_at: float
    ended_at: float
    attributes: dict[str, Any]
    links: tuple[str, ...]


class Collector:
    def __init__(self, url: str, file: Path) -> None:
        self.url = url
        self._file = file

    def spans(self) -> list[Span]:
        """All spans until now, by their beginning."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        batches = [json.loads(line) for line in lines if line.endswith("}")]
        found = [
            _span(span, _attributes(of_service["resource"])["service.name"])
            for batch in batches
            for of_service in batch["resourceSpans"]
            for scope in of_service["scopeSpans"]
            for span in scope["spans"]
        ]
        return sorted(found, key=lambda span: span.began_at)

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans() if span.trace_id == trace_id]


@contextmanager
def collecting(say: Say) -> Iterator[Collector]:
    """A collector until the block ends. Raises `NotToBeHad`."""
    with ExitStack() as stack:
        collector = obtained(say)
        folder = temporary_folder(stack)
        port = lasting_port()
        file = folder / "spans.jsonl"
        parts = {
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"127.0.0.1:{port}"}}}},
            "exporters": {"file": {"path": str(file), "flush_interval": "100ms"}},
            "service": {
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}},
                "telemetry": {"metrics": {"level": "none"}},
            },
        }
        (folder / "config.json").write_text(json.dumps(parts))
        alive = start_process(
            [collector, "--config", str(folder / "config.json")], {}, folder, stack
        )

        def answers() -> bool:
            if not alive():
                raise NotToBeHad(f"{collector} stopped: {(folder / 'output').read_text()[-500:]}")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(answers)
        yield Collector(f"http://127.0.0.1:{port}", file)


@contextmanager
def keeping() -> Iterator[tuple[str, list[bytes]]]:
    """The URL of a receiver, and the bodies that it has received."""
    bodies: list[bytes] = []

    class Receiver(Answering):
        def do_POST(self) -> None:
            bodies.append(self.received())
            self.answer(200, Content_Type="application/x-protobuf")

    with serving(Receiver) as url:
        yield url, bodies


def drawn(spans: list[Span]) -> str:
    """A trace as a tree, with the beginning and the duration of each span in milliseconds."""
    began_at = min(span.began_at for span in spans)
    ids = {span.span_id for span in spans}
    lines: list[str] = []

    def draw(span: Span, depth: int) -> None:
        label = f"{'  ' * depth}{span.name}"
        begin, lasted = span.began_at - began_at, span.ended_at - span.began_at
        lines.append(f"{label:<66} {span.service:<16}{begin * 1000:>8.1f}{lasted * 1000:>8.1f}")
        for child in spans:
            if child.parent_id == span.span_id:
                draw(child, depth + 1)

    for span in spans:
        if span.parent_id not in ids:
            draw(span, 0)
    return "\n".join(lines)


def _span(row: dict[str, Any], service: str) -> Span:
    return Span(
        trace_id=row["traceId"],
        span_id=row["spanId"],
        parent_id=row.get("parentSpanId", ""),
        name=row["name"],
        service=service,
        began_at=int(row["startTimeUnixNano"]) / 1e9,
        ended_at=int(row["endTimeUnixNano"]) / 1e9,
        attributes=_attributes(row),
        links=tuple(link["traceId"] for link in row.get("links", ())),
    )


def _attributes(row: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in row.get("attributes", ())}
