"""The metrics that the services export, compared with their list in `docs/metrics.md`."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from instances import multipart, new_instance
from prometheus_client.parser import text_string_to_metric_families
from service import Service, running, wait_for

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
_ROW = re.compile(
    r"^\| `(stowgate_\w+)` \| (\w+) \| (.+?) \| (.*?) ?\| (.+?) \| .+ \| .+ \|$", re.MULTILINE
)

# Of the parser, which names a counter without its suffix.
_SUFFIXES = {"counter": "_total", "info": "_info"}


class Row(NamedTuple):
    name: str
    type: str
    unit: str
    labels: frozenset[str]
    service: str


def listed() -> dict[str, Row]:
    rows = [
        Row(name, kind, unit, frozenset(re.findall(r"`(\w+)`", labels)), service)
        for name, kind, unit, labels, service in _ROW.findall(PAGE.read_text("utf-8"))
    ]
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def exported(text: str) -> dict[str, str]:
    """The type of each metric, by name."""
    families = text_string_to_metric_families(text)
    return {family.name + _SUFFIXES.get(family.type, ""): family.type for family in families}


def labels(text: str) -> dict[str, set[frozenset[str]]]:
    """The labels of each metric that has a sample."""
    return {
        family.name + _SUFFIXES.get(family.type, ""): {
            frozenset(sample.labels) - {"le"} for sample in family.samples
        }
        for family in text_string_to_metric_families(text)
        if family.samples
    }


def of(*services: str) -> dict[str, str]:
    return {row.name: row.type for row in listed().values() if row.service in services}


def _post_some(service: Service) -> str:
    answer = service.post("/dicomweb/studies", *multipart(new_instance(), b"no DICOM"))
    assert answer.status_code == 202
    assert service.post("/dicomweb/studies", b"{}", "application/json").status_code == 415
    return str(answer.headers["X-Payload-ID"])


def test_stowgate_run_exports_every_listed_metric_and_no_other(tmp_path: Path) -> None:
    with running("run", tmp_path) as service:
        service.opened(_post_some(service))
        wait_for(lambda: service.metric("stowgate_dependency_up", dependency="object_store"))
        wait_for(lambda: "stowgate_refused " in service.get("/metrics").text)
        text = service.get("/metrics").text

    # Only temporary keys expire.
    keys_expiry = {"stowgate_object_store_keys_expiry_timestamp_seconds"}
    found = exported(text)
    assert set(listed()) - set(found) == keys_expiry
    assert {name: listed()[name].type for name in found} == found
    for name, names in labels(text).items():
        assert names == {listed()[name].labels}, name


@pytest.mark.parametrize(
    ("command", "services"), [("api", ("API", "both")), ("worker", ("worker", "both"))]
)
def test_each_service_exports_its_own_metrics(
    command: str, services: tuple[str, ...], tmp_path: Path
) -> None:
    with running(command, tmp_path) as service:
        wait_for(lambda: service.metric("stowgate_dependency_up", dependency="object_store"))
        found = set(exported(service.get("/metrics").text))

    leader = set(of("worker, leader"))
    keys_expiry = {"stowgate_object_store_keys_expiry_timestamp_seconds"}
    assert found - leader == set(of(*services)) - keys_expiry


def test_two_api_processes_export_the_same_metrics_as_one(tmp_path: Path) -> None:
    with running("api", tmp_path, STOWGATE_API_PROCESSES="2") as service:
        for _ in range(5):
            _post_some(service)
        wait_for(lambda: service.metric("stowgate_dependency_up", dependency="object_store"))
        text = service.get("/metrics").text
        found, sum_of_posts = exported(text), service.metric("stowgate_post_seconds_count")
        max_uploads = service.metric("stowgate_max_uploads")
        steps = service.metric("stowgate_post_step_seconds_count", step="record")

    keys_expiry = {"stowgate_object_store_keys_expiry_timestamp_seconds"}
    assert set(found) == set(of("API", "both")) - keys_expiry
    assert {name: listed()[name].type for name in found} == found
    assert (sum_of_posts, steps, max_uploads) == (10, 5, 24)


def test_names_have_the_suffix_of_their_unit() -> None:
    for row in listed().values():
        stem = row.name.removesuffix("_total")
        assert row.name.endswith("_total") == (row.type == "counter"), row
        assert stem.endswith("_seconds") == (row.unit in ("seconds", "Unix time")), row
        assert stem.endswith("_bytes") == (row.unit == "bytes"), row
