"""The composition of the API."""

import socket
from pathlib import Path

import pytest
from instances import new_instance
from prometheus_client import CollectorRegistry

from api.admission.concurrency import EXTENSION
from api.main import compose
from api.settings import ApiSettings
from shared.runtime.backends import open_backends
from shared.settings.loader import load


@pytest.mark.parametrize(("reach_workers", "published"), [(True, 1), (False, 0)])
def test_no_event_is_kept_in_memory_for_a_worker_that_it_does_not_reach(
    reach_workers: bool, published: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    settings = load(ApiSettings)
    settings.spool.mkdir()
    backends = open_backends(settings, store_threads=2)
    backends.prepare()
    app = compose(settings, backends, CollectorRegistry(), events_reach_workers=reach_workers)
    connection, peer = socket.socketpair()
    with connection, peer:
        app.extensions[EXTENSION].limiter.acquire(connection)
        answer = app.test_client().post(
            "/dicomweb/studies",
            data=new_instance(),
            content_type="application/dicom",
            environ_base={"gunicorn.socket": connection},
        )
        answer.close()

    assert answer.status_code == 200
    assert backends.consumer.backlog() == published
