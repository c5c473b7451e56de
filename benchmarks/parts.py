"""What memory many small parts cost: while they are uploaded, listed, opened and shown.

    make bench-parts ARGS="[--posts 12] [--parts 20000] [--opened 2]"

Everything is on a folder below TMPDIR. The API has no broker, so the payloads wait until the
embedded form, whose worker opens two at a time, takes over; its figures are those of the worker
beside an API that idles.
"""

import http.client
import io
import json
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click
import pydicom
from instances import BOUNDARY, multipart, real_file
from loads import new_uid
from processes import measured
from pydicom.uid import UID, generate_uid
from service import Service, running, wait_for

_NO_BROKER = "amqp://127.0.0.1:9/"
_HEAD = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
_PIECE_PARTS = 50


@click.command()
@click.option("--posts", default=12, show_default=True, help="How many, all at once.")
@click.option("--parts", default=20_000, show_default=True, help="Of each POST.")
@click.option("--opened", default=2, show_default=True, help="How many the worker is to open.")
def main(posts: int, parts: int, opened: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        with (
            running("api", data, STOWGATE_BROKER=_NO_BROKER) as api,
            _told(api, f"{posts} POSTs of {parts:,} parts at once, API"),
            ThreadPoolExecutor(posts) as senders,
        ):
            ids = list(senders.map(partial(_post, api), [parts] * posts))
        with (
            running("api", data, STOWGATE_BROKER=_NO_BROKER) as api,
            _told(api, f"one page of {posts} such payloads, API"),
        ):
            assert len(api.get("/payloads").json()["payloads"]) == posts
        with running("run", data) as both:

            def some_are_opened() -> bool:
                return both.metric(_OPENED, route="left-to-workflow-manager") >= opened

            with _told(both, f"{opened} such payloads opened, worker"):
                wait_for(some_are_opened, 3600)
            listed = both.get("/payloads?state=opened").json()["payloads"]
            assert {payload["payload_id"] for payload in listed} <= set(ids)
        with running("api", data, STOWGATE_BROKER=_NO_BROKER) as api:
            with _told(api, "one such payload shown, API"):
                shown = api.get(f"/payloads/{listed[0]['payload_id']}").json()
            assert len(shown["workflow_request"]["payload"]) == parts


_OPENED = "stowgate_workflow_requests_opened_total"


@contextmanager
def _told(service: Service, what: str) -> Iterator[None]:
    """Print the peak of the service's largest process, and what was resident before."""
    service.post(
        "/dicomweb/studies",
        *multipart(),
    )
    before_mib = max(map(_resident_mib, service.process_ids()))
    started = time.monotonic()
    with measured(lambda: {"all": service.process_ids()}) as cost:
        yield
        seconds = time.monotonic() - started
    peak_mib = cost.peak_mib["all"]
    print(f"{what}: {before_mib:.0f} to {peak_mib:.0f} MiB, {seconds:.2f} s", flush=True)


def _resident_mib(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def _post(service: Service, parts: int) -> str:
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=3600)
    headers = {"Content-Type": f"multipart/related; boundary={BOUNDARY}"}
    connection.request("POST", "/dicomweb/studies", _body(parts), headers, encode_chunked=True)
    answer = connection.getresponse()
    stored = json.loads(answer.read())["00081199"]["Value"]
    assert (answer.status, len(stored)) == (200, parts)
    return answer.headers["X-Payload-ID"]


def _body(parts: int) -> Iterator[bytes]:
    front, *more = _template()
    for start in range(0, parts, _PIECE_PARTS):
        count = min(_PIECE_PARTS, parts - start)
        yield b"".join(
            _HEAD + new_uid().encode().join([front, *more]) + b"\r\n" for _ in range(count)
        )
    yield f"--{BOUNDARY}--\r\n".encode()


def _template() -> list[bytes]:
    """A CT without its pixels, of a study of its own, cut where its SOP Instance UID stands."""
    ds = pydicom.dcmread(io.BytesIO(real_file()))
    del ds[0x7FE00010], ds[0xFFFCFFFC]
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    mark = "9" * len(new_uid())
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(mark)
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue().split(mark.encode())


if __name__ == "__main__":
    main()
