"""Patient data and secrets: sent in every place that a sender can fill, looked for in every place
that is not an instance or its sidecar.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, urlsplit

import pydicom
import pytest
import requests
from collector import keeping
from engines import ObjectStoreEndpoint
from instances import BOUNDARY, new_instance
from service import STOWGATE, environment, wait_for
from stowgate_site import Node, S3Bucket, Site, study

MARK = "LEAKED7EA5"
DICOM = "application/dicom"
MULTIPART = f'multipart/related; type="{DICOM}"; boundary={BOUNDARY}'
FORGED = "forged by a sender"
FORGED_LINE = f'\n{{"event": "{FORGED}"}}\n'


def _marked(source: str = "CT_small.dcm", **elements: object) -> bytes:
    block = {
        "PatientName": f"{MARK}^JANE",
        "PatientID": MARK,
        "PatientBirthDate": "19330101",
        "PatientComments": MARK,
        "StudyDescription": MARK,
        "AccessionNumber": MARK,
        "InstitutionName": MARK,
        "ReferringPhysicianName": MARK,
        **elements,
    }
    return new_instance(source, **block)


# Of every kind: encodings, compressed and deflated pixels, reports, plans, doses, waveforms.
REAL_FILES = (
    "ExplVR_BigEnd.dcm",
    "JPEG2000.dcm",
    "MR_small_RLE.dcm",
    "MR_small_implicit.dcm",
    "MR_small_padded.dcm",
    "SC_rgb_small_odd.dcm",
    "badVR.dcm",
    "examples_palette.dcm",
    "image_dfl.dcm",
    "liver_1frame.dcm",
    "reportsi.dcm",
    "rtdose_1frame.dcm",
    "rtplan.dcm",
    "test-SR.dcm",
    "waveform_ecg.dcm",
)


def _damaged() -> Iterator[bytes]:
    whole = _marked()
    for place in range(132, len(whole), 977):
        yield whole[:place]
        yield whole[:place] + MARK.encode() * 3 + whole[place + 3 * len(MARK) :]
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        yield whole.replace(
            pydicom.dcmread(BytesIO(whole))[keyword].value.encode()[:10], MARK.encode()
        )
    yield whole.replace(b"1.2.840.10008.1.2.1", f"1.2.{MARK}".encode().ljust(19, b"0"))
    yield MARK.encode() * 100


def _part(instance: bytes, *headers: str) -> bytes:
    lines = "\r\n".join([f"--{BOUNDARY}", *headers, "", ""])
    return lines.encode() + instance + b"\r\n"


CLOSE = f"--{BOUNDARY}--\r\n".encode()


class _Sender:
    """Posts whatever, and keeps every answer."""

    def __init__(self, api: Node) -> None:
        self._url = api.service.url
        self.answers: list[requests.Response] = []

    def post(self, body: bytes, content_type: str, path: str = "studies", **headers: str) -> int:
        answer = requests.post(
            f"{self._url}/dicomweb/{path}",
            data=body,
            headers={"Content-Type": content_type, **headers},
            timeout=60,
        )
        self.answers.append(answer)
        return answer.status_code

    def send_everything(self) -> None:
        instances = [_marked(), *map(_marked, REAL_FILES)]
        statuses = {self.post(b"".join(map(_part, instances)) + CLOSE, MULTIPART)}
        statuses |= {self.post(instance, DICOM) for instance in _damaged()}
        some = [_marked(), *_damaged()]
        statuses.add(self.post(b"".join(map(_part, some)) + CLOSE, MULTIPART))
        for name in ("Content-Type", "Content-Disposition", "Content-Location", MARK):
            statuses.add(self.post(_part(_marked(), f"{name}: {MARK}") + CLOSE, MULTIPART))
        statuses.add(self.post(_part(_marked(), MARK) + CLOSE, MULTIPART))
        statuses.add(self.post(_part(_marked()), MULTIPART))
        statuses.add(self.post(MARK.encode() + CLOSE, MULTIPART))
        statuses.add(self.post(_marked(), f"{DICOM}; name={MARK}"))
        statuses.add(self.post(_marked(), f"text/{MARK}"))
        statuses.add(self.post(CLOSE, f"multipart/related; boundary={MARK * 30}"))
        for path in ("studies/{}", "{}/studies", "vae/{}/studies", "vae/{}/w/studies", "{}"):
            for text in (f"{MARK}^JANE", f"{MARK} {FORGED_LINE}"):
                statuses.add(self.post(_marked(), DICOM, path.format(quote(text, safe=""))))
        for header in (
            *("X-Correlation-ID", "X-Forwarded-For", "User-Agent", "Accept", "Referer"),
            *("traceparent", "tracestate", "baggage"),
        ):
            statuses.add(self.post(_marked(), DICOM, **{header: f"{MARK} {FORGED}"}))
        statuses.add(self.post(_marked(), DICOM, **{"Idempotency-Key": f"{MARK} {FORGED}"}))
        statuses.add(self.post(_marked(), DICOM, **{"Content-Encoding": MARK}))
        statuses.add(self.post(_marked(), DICOM, Authorization=f"Basic {MARK}"))
        for body in (f'{{"virtualAeTitle": "{MARK}^JANE"}}', MARK, f'{{"{MARK}": 1}}'):
            self.answers.append(
                requests.post(f"{self._url}/config/vae", data=body.encode(), timeout=60)
            )
        for path in (f"payloads/{MARK}", f"payloads?state={MARK}", f"config/vae/{MARK}^", MARK):
            self.answers.append(requests.get(f"{self._url}/{path}", timeout=60))
        assert statuses >= {200, 202, 400, 404, 409, 415}


def _fail_for_good(site: Site, api: Node, worker: Node) -> None:
    """A payload whose instance is another one by the time that the worker reads it."""
    reading = worker.store.hold(f"GET /{site.name}/01[^ ]*/dcm/".encode())
    answer = requests.post(
        f"{api.service.url}/dicomweb/studies",
        data=_marked(),
        headers={"Content-Type": DICOM},
        timeout=60,
    )
    payload_id = answer.headers["X-Payload-ID"]
    reading.wait_reached()
    assert isinstance(site.payloads, S3Bucket)
    for key in site.payloads.listing(f"{payload_id}/"):
        site.payloads.put(key, MARK.encode() * 100)
    reading.release()
    failed = site.record(payload_id, lambda record: record["state"] == "failed")
    assert "no longer the instance that was stored" in failed["last_error"]


def _checked(folder: Path, settings: dict[str, str]) -> str:
    found = subprocess.run(
        [STOWGATE, "check"],
        env=environment(folder, settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def places(
    object_store_endpoint: ObjectStoreEndpoint,
    broker_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[str]]:
    """The texts of every place but instances and sidecars, when everything has been sent."""
    site = Site(tmp_path_factory.mktemp("site"), broker_url, object_store_endpoint)
    try:
        site.start_workflow_manager()
        with keeping() as (collector_url, exported):
            found = _everything_sent_to(site, collector_url)
    finally:
        site.close()
        site.remove()
    # Protobuf has each text as it is.
    found["spans"] = [body.decode(errors="replace") for body in exported]
    found["check"] = [
        _checked(
            tmp_path_factory.mktemp("check"),
            {
                "STOWGATE_OBJECT_STORE": object_store_endpoint.url,
                "STOWGATE_OBJECT_STORE_ACCESS_KEY": object_store_endpoint.access_key,
                "STOWGATE_OBJECT_STORE_SECRET_KEY": object_store_endpoint.secret_key,
                "STOWGATE_BROKER": broker_url,
            },
        )
    ]
    assert all(found.values())
    return found


def _everything_sent_to(site: Site, collector_url: str) -> dict[str, list[str]]:
    nodes = api, worker = site.pair(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector_url, STOWGATE_TRACE_SENDERS="true"
    )
    wait_for(lambda: worker.ready()[1]["status"] == "ready")
    # Copies of the events, as they come over the broker.
    copies = f"{site.name}-copies"
    with site.channel() as channel:
        channel.queue_declare(copies, durable=True, arguments={"x-expires": 600_000})
        channel.queue_bind(copies, site.events, "instances-stored")
    sender = _Sender(api)
    _fail_for_good(site, api, worker)
    sender.send_everything()
    for delivery in (site.post(api, study(1)) for _ in range(2)):
        site.opened(delivery.headers["X-Payload-ID"])
    with site.channel() as channel:
        events = []
        while (got := channel.basic_get(copies, auto_ack=True))[0] is not None:
            events.append(str(got))
        channel.queue_delete(copies)
    assert len(events) >= 2
    process_ids = [str(pid) for node in nodes for pid in node.service.process_ids()]
    found = {
        "answers": [f"{a.status_code} {a.headers} {a.text}" for a in sender.answers],
        "events": events,
        "requests": [str(delivery) for delivery in site.take_requests()],
        "payloads": [requests.get(f"{api.service.url}/payloads?limit=200", timeout=60).text],
        "metrics": [node.service.get("/metrics").text for node in nodes],
        "health": [node.service.get("/health/ready").text for node in nodes],
        "commands": _of_processes(process_ids, "cmdline", "comm"),
        "environments": _of_processes(process_ids, "environ"),
    }
    site.stop()
    state_keys = site.state.listing()
    return found | {
        "logs": [node.log() for node in nodes],
        "records": [(site.state.get(key) or b"").decode(errors="replace") for key in state_keys],
        "keys": [*state_keys, *site.payloads.listing()],
    }


def _of_processes(process_ids: list[str], *names: str) -> list[str]:
    return [
        Path("/proc", process_id, name).read_bytes().decode(errors="replace")
        for process_id in process_ids
        for name in names
    ]


def _holding(text: str, places: dict[str, list[str]]) -> set[str]:
    return {name for name, texts in places.items() if any(text in found for found in texts)}


def test_patient_data_appear_only_in_instances_and_sidecars(
    places: dict[str, list[str]],
) -> None:
    assert _holding(MARK, places) == set()


def test_spans_of_both_services_were_searched(places: dict[str, list[str]]) -> None:
    exported = "".join(places["spans"])

    assert {"stowgate-api", "stowgate-worker", "write sidecars"} <= set(
        re.findall("stowgate-api|stowgate-worker|write sidecars", exported)
    )
    assert exported.count("POST /dicomweb/") > 50


def test_a_sender_cannot_forge_a_log_line(places: dict[str, list[str]]) -> None:
    lines = [json.loads(line) for log in places["logs"] for line in log.splitlines()]

    assert [line for line in lines if line["event"] == FORGED] == []


def test_secrets_appear_only_in_the_settings(
    places: dict[str, list[str]], object_store_endpoint: ObjectStoreEndpoint, broker_url: str
) -> None:
    for secret in (urlsplit(broker_url).password or "", object_store_endpoint.secret_key):
        assert len(secret) >= 8
        # A file, see README, keeps it out of there.
        assert _holding(secret, places) == {"environments"}
