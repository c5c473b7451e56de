"""The object store cut off, silent, slow, killed or full."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import own_engine
from disks import small_disk
from engines import MISSING, ObjectStoreEndpoint
from instances import BOUNDARY, multipart, new_instance
from killable import Container, Part, object_store
from reconciliation import reconcile
from service import wait_for
from stowgate_site import Site, study

MIB = 1 << 20
OUT_OF_RESOURCES = 0xA700

# minio-py alone would take five times five minutes.
BOUNDED_SECONDS = 60.0


@pytest.fixture(scope="module")
def own_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Part, ObjectStoreEndpoint]]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("minio")
        yield own_engine(lambda: object_store(folder, stack, print))


@contextmanager
def _site(
    data: Path, broker_url: str, endpoint: ObjectStoreEndpoint | None, **settings: str
) -> Iterator[Site]:
    site = Site(data, broker_url, endpoint, **settings)
    site.start_workflow_manager()
    try:
        yield site
    finally:
        site.close()
        site.remove()


def test_a_store_that_is_down_is_503_without_a_record_and_the_retry_succeeds(site: Site) -> None:
    api, _ = site.pair()
    instances = study()
    api.store.cut()

    answer = site.post(api, instances)

    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert "X-Payload-ID" not in answer.headers
    assert api.ready()[1]["status"] == "down"
    assert site.records() == {}

    api.store.heal()
    assert site.post(api, instances).status_code == 200
    ledger = reconcile(site)
    assert len(ledger.payloads) == 1
    assert ledger.orphans() == []


def test_a_silent_store_is_503_in_bounded_time_and_opens_nothing_unrecorded(
    site: Site,
) -> None:
    api, _ = site.pair()
    record = api.store.hold(f"PUT /{site.name}-state/pending/".encode())
    with ThreadPoolExecutor(4) as senders:

        def send() -> int:
            answer = site.post(api, study(), timeout_seconds=BOUNDED_SECONDS)
            return int(answer.status_code)

        # One has its instances stored, and the write of its record is what stays unanswered.
        before_its_record = senders.submit(send)
        record.wait_reached()
        api.store.black_hole()
        before_its_objects = [senders.submit(send) for _ in range(3)]
        statuses = [sent.result() for sent in (before_its_record, *before_its_objects)]
        live = api.service.get("/health/live").status_code
    assert statuses == [503] * 4
    assert live == 200
    assert site.records() == {}

    # What was on its way may arrive yet.
    record.release()
    api.store.heal()
    assert send() == 200
    reconcile(site)


@pytest.mark.parametrize("lost", ["write", "answer"])
def test_a_connection_lost_during_the_write_of_a_record_loses_no_study(
    site: Site, lost: str
) -> None:
    api, _ = site.pair()
    hold = api.store.hold if lost == "write" else api.store.hold_answer
    record = hold(f"PUT /{site.name}-state/pending/".encode())
    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(site.post, api, study(3))
        record.wait_reached()
        record.drop()
        answer = sent.result()

    assert answer.status_code == 200
    ledger = reconcile(site)
    assert ledger.payloads.keys() == {answer.headers["X-Payload-ID"]}


def test_a_lease_is_acquired_although_the_answer_to_its_write_is_lost(site: Site) -> None:
    # The first lease is too short for this worker, so it writes one of its own.
    api = site.api(STOWGATE_LEASE_SECONDS="2")
    worker = site.worker(STOWGATE_LEASE_SECONDS="60")
    wait_for(lambda: api.ready()[1]["status"] == worker.ready()[1]["status"] == "ready")
    lease = worker.store.hold(f"PUT /{site.name}-state/pending/".encode())
    payload_id = site.post(api, study(1)).headers["X-Payload-ID"]
    lease.wait_reached()
    lease.drop()

    record = site.opened(payload_id)

    assert record["attempts"] == 1
    reconcile(site)


def test_ready_and_status_report_a_silent_store(site: Site) -> None:
    """However long that takes: it is not the sender who is slow."""
    api, _ = site.pair()
    api.store.black_hole()

    answers = [api.service.get(path) for path in ("/health/ready", "/payloads", "/config/vae")]

    api.store.heal()
    assert [answer.status_code for answer in answers] == [200, 503, 503]
    assert answers[0].json()["status"] == "down"
    assert answers[0].json()["dependencies"]["object_store"]["status"] == "down"


def test_many_probes_during_a_silent_store_do_not_delay_others(site: Site) -> None:
    """There are more of them than the API has threads."""
    api, _ = site.pair()
    assert api.ready()[0] == 200
    api.store.black_hole()
    with ThreadPoolExecutor(60) as probes:
        answers = [probes.submit(api.ready) for _ in range(60)]
        wait_for(lambda: sum(answer.done() for answer in answers) >= 59)
        live = api.service.get("/health/live")
        are_all_done = all(answer.done() for answer in answers)

    api.store.heal()
    assert live.status_code == 200
    assert not are_all_done, "the one that looks waits longer than the others"
    # Callers during the check got the last report.
    states = Counter(answer.result()[1]["status"] for answer in answers)
    assert states == {"ready": 59, "down": 1}


def test_senders_to_vaes_wait_in_slots_during_a_silent_store_and_health_answers(
    site: Site,
) -> None:
    """There are more of them than the API has threads."""
    api, _ = site.pair()
    api.store.black_hole()
    dicom = "application/dicom"
    with ThreadPoolExecutor(60) as senders:
        answers = [
            senders.submit(api.service.post, "/dicomweb/vae/NOBODY/studies", new_instance(), dicom)
            for _ in range(60)
        ]
        wait_for(lambda: api.metric("stowgate_uploads_waiting") > 0)
        live = api.service.get("/health/live")
        answered = [answer for answer in answers if answer.done()]

    api.store.heal()
    assert live.status_code == 200
    assert answered == []
    # Turned away before their body, or by the store.
    assert {answer.result().status_code for answer in answers} <= {429, 503}


def test_a_slow_store_only_delays_uploads(site: Site) -> None:
    api, worker = site.pair()
    for node in (api, worker):
        node.store.delay(0.1)

    assert site.post(api, study(3)).status_code == 200

    ledger = reconcile(site)
    assert ledger.orphans() == []


def test_acknowledged_payloads_survive_a_killed_store_whose_upload_gets_503(
    own_store: tuple[Part, ObjectStoreEndpoint], broker_url: str, tmp_path: Path
) -> None:
    part, endpoint = own_store
    with _site(tmp_path, broker_url, endpoint) as site:
        api, worker = site.pair()
        site.opened(site.post(api, study()).headers["X-Payload-ID"])
        # From now on nothing but the records remembers what has to be opened.
        worker.kill()
        before = [site.post(api, study()) for _ in range(3)]
        instances = study(3, bytes(MIB))

        def until_one_is_stored() -> Iterator[bytes]:
            stored = len(site.payloads.listing())
            body, _ = multipart(*instances)
            half = body.index(f"--{BOUNDARY}".encode(), len(body) // 2)
            yield body[:half]
            wait_for(lambda: len(site.payloads.listing()) > stored)
            part.body.kill()
            yield body[half:]

        met = site.post(api, instances, pieces=until_one_is_stored())
        while_down = site.post(api, study())
        site.worker()  # starts without its store
        part.body.start()
        part.until_it_serves()
        after = site.post(api, instances)

        assert [a.status_code for a in (*before, met, while_down, after)] == [
            *[200] * 3,
            *[503] * 2,
            200,
        ]
        ledger = reconcile(site)
        assert len(ledger.payloads) == 5


@pytest.mark.parametrize("kind", ["folder", "MinIO"])
def test_a_full_store_is_507_without_any_stored_instance_else_202_with_a700(
    kind: str, broker_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        disk, data, endpoint = (
            stack.enter_context(small_disk(tmp_path / "disk", 32)),
            tmp_path,
            None,
        )
        if kind == "folder":
            data = disk
        else:
            part, endpoint = own_engine(lambda: object_store(disk, stack, print))
            if isinstance(part.body, Container):
                pytest.skip(f"{MISSING}small disk: that of a container cannot be made one here")
        settings = {"STOWGATE_SPOOL_MEMORY_BYTES": str(64 * MIB)}
        site = stack.enter_context(_site(data, broker_url, endpoint, **settings))
        api, _ = site.pair()
        small, large = study(2), new_instance(PixelData=bytes(40 * MIB))

        some = site.post(api, small, beside=[large])
        none = site.post(api, [], beside=[large])

        assert some.status_code == 202, some.text
        assert len(some.json()["00081199"]["Value"]) == len(small)
        (failed,) = some.json()["00081198"]["Value"]
        assert failed["00081197"]["Value"] == [OUT_OF_RESOURCES]
        assert none.status_code == 507
        assert "X-Payload-ID" not in none.headers
        ledger = reconcile(site)
        assert len(ledger.payloads) == 1
        assert ledger.orphans() == []


def test_uploads_are_507_before_their_body_for_some_time_after_a_store_was_full(
    broker_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk", 32))
        part, endpoint = own_engine(lambda: object_store(disk, stack, print))
        if isinstance(part.body, Container):
            pytest.skip(f"{MISSING}small disk: that of a container cannot be made one here")
        settings = {"STOWGATE_SPOOL_MEMORY_BYTES": str(64 * MIB)}
        site = stack.enter_context(_site(tmp_path, broker_url, endpoint, **settings))
        api, _ = site.pair()

        full = site.post(api, [], beside=[new_instance(PixelData=bytes(40 * MIB))])
        at_once = _status_without_a_body(api.service.url)

        assert (full.status_code, at_once) == (507, 507)
        wait_for(lambda: site.post(api, study()).status_code == 200)
        reconcile(site)


def _status_without_a_body(url: str) -> int:
    """What a POST gets whose body does not come."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.putrequest("POST", "/dicomweb/studies")
        connection.putheader("Content-Type", "application/dicom")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        return connection.getresponse().status
