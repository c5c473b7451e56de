"""The state bucket of a hospital in the middle of a busy day, for the page to show."""

import math
import os
import random
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from api.vae.registry import Vae, VaeRegistry
from shared.adapters.folder.store import FolderObjectStore
from shared.ids import PayloadIds
from shared.records import IngestRecord, State, encode, newest_first
from shared.refusals import Refusal, RefusalReason, Refusals, ordered_name

BUCKET = "stowgate"

_SENDERS = (
    ("10.20.4.11", "CT", ("lung-nodules",), 320, 525_000),
    ("10.20.4.12", "MR", ("brain-volumetry",), 180, 270_000),
    ("10.20.7.30", "XRAY", ("chest-triage",), 2, 14_000_000),
    ("pacs-export", "default", None, 45, 530_000),
)


class BusyDay:
    """Writes records into the state bucket below `data`, the latest of them at `now`."""

    def __init__(self, data: Path, now: datetime) -> None:
        self.store = FolderObjectStore(data / BUCKET)
        self.store.prepare()
        self._folder = data / BUCKET
        self._ids = PayloadIds(BUCKET)
        self._random = random.Random(7)
        self.now = now
        self.refusals = Refusals(self.store)

    def record(self, received_at: datetime, state: State, **changes: object) -> IngestRecord:
        source, destination, workflows, files, file_bytes = self._random.choice(_SENDERS)
        count = max(1, round(self._random.gauss(files, files / 5)))
        made = IngestRecord(
            payload_id=self._ids.mint(received_at),
            correlation_id=str(UUID(int=self._random.getrandbits(128), version=4)),
            received_at=received_at,
            source=source,
            destination=destination,
            workflow=None,
            vae_workflows=workflows,
            file_count=count,
            instances=None,
            due_at=received_at,
            size_bytes=count * file_bytes,
            state=state,
            attempts=1,
            workflows=workflows,
            route="workflows-of-vae" if workflows else "left-to-workflow-manager",
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    def write(self, record: IngestRecord, settled_at: datetime | None = None) -> None:
        path = self._folder / f"{record.state}/{newest_first(record.payload_id)}"
        # Without the store's fsync, which takes most of the time for thousands of records.
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(record))
        if settled_at is not None:
            os.utime(path, (settled_at.timestamp(), settled_at.timestamp()))

    def opened(self, received_at: datetime, seconds: float) -> IngestRecord:
        opened_at = received_at + timedelta(seconds=seconds)
        made = self.record(received_at, State.OPENED, opened_at=opened_at)
        self.write(made, opened_at)
        return made

    def refused(self, received_at: datetime, reason: RefusalReason) -> IngestRecord:
        made = self.opened(received_at, 0.7)
        at = received_at + timedelta(seconds=40)
        self.refusals.note(Refusal(made.payload_id, 0, reason, at))
        return made

    def replayed(self, received_at: datetime) -> None:
        """A payload that was refused, and then replayed; of that only the names count."""
        name = ordered_name(self._ids.mint(received_at))
        for key in (f"refused/{name}/000000.json", f"replayed/{name}/000001.json"):
            path = self._folder / key
            path.parent.mkdir(parents=True)
            path.touch()

    def failed(self, received_at: datetime, error: str) -> IngestRecord:
        made = self.record(received_at, State.FAILED, attempts=10, last_error=error)
        self.write(made)
        return made

    def fill(self, hours: int = 24, per_hour: int = 30) -> None:
        """More by day than by night, with a slow hour when the broker was away."""
        for minutes in range(hours * 60):
            at = self.now - timedelta(minutes=minutes, seconds=self._random.random() * 50)
            load = 0.15 + max(0.0, math.sin((at.hour - 6) / 13 * math.pi))
            if self._random.random() < per_hour / 60 * load:
                slow = 5 * 60 < minutes < 6 * 60
                seconds = self._random.lognormvariate(4.5 if slow else -0.3, 0.6)
                self.opened(at, min(seconds, minutes * 60 + 1))

    def add_troubles(self) -> None:
        self.refused(self.now - timedelta(minutes=47), RefusalReason.DELIVERY_LIMIT)
        self.failed(
            self.now - timedelta(hours=3, minutes=12),
            "the metadata of 1.2.826.0.1.3680043.8.498.7 could not be written: the object differs "
            "from what was received. Have the study sent again",
        )
        for seconds in (4, 9):
            self.write(self.record(self.now - timedelta(seconds=seconds), State.PENDING))

    def add_vaes(self) -> None:
        registry = VaeRegistry(self.store)
        created: dict[str, Any] = {
            "date_time_created": self.now - timedelta(days=90),
            "created_by": "operator",
        }
        made = (
            Vae("CT", "CT", ("lung-nodules",), (), accepted_modalities=("CT",), **created),
            Vae(
                "MR",
                "MR",
                ("brain-volumetry",),
                (),
                accepted_sop_classes=("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"),
                max_requests_per_minute=60,
                **created,
            ),
            Vae("XRAY", "XRAY", ("chest-triage",), (), max_instance_bytes=100_000_000, **created),
            Vae("RESEARCH", "RESEARCH", (), (), source="research-gw", **created),
        )
        for vae in made:
            registry.add(vae)
