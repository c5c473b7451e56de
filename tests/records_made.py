"""Ingest records for tests."""

from datetime import UTC, datetime

from shared.ids import PayloadIds
from shared.instances import StoredInstance
from shared.record_store import Records
from shared.records import IngestRecord, State

RECEIVED_AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def record(*instances: StoredInstance) -> IngestRecord:
    return IngestRecord(
        payload_id=PayloadIds("stowgate").mint(RECEIVED_AT),
        correlation_id="0b1c2d3e-0000-4000-8000-000000000001",
        received_at=RECEIVED_AT,
        source="127.0.0.1",
        destination="default",
        workflow=None,
        vae_workflows=None,
        file_count=len(instances),
        instances=instances,
        due_at=RECEIVED_AT,
    )


def inline(made: IngestRecord) -> tuple[StoredInstance, ...]:
    """The instances of a record that has few enough to hold them itself."""
    assert made.instances is not None
    return made.instances


def newest(
    records: Records, state: State | None, limit: int, cursor: str = ""
) -> tuple[list[IngestRecord], str | None]:
    """A whole page and the next cursor."""
    page, following = records.newest(state, limit, cursor)
    return list(page), following
