"""The use case of a POST: check, store, record; and announce, once the sender has its answer.

Parts are taken one at a time as they arrive. Each is spooled, its structure checked and its UIDs
read; then it goes to the object store in another thread while the next part arrives. The ingest
record is written when the body has ended properly and every instance is stored: the commit point.
Until then nothing is acknowledged and nothing announced.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from threading import BoundedSemaphore
from typing import Protocol

import structlog

from api.head_start import HeadStart
from api.idempotency import ClaimedKey, StillRunning, fingerprint
from api.multipart import MediaType
from api.policy import refusal
from api.problems import SenderTooSlow, TooLarge, UnsupportedMediaType
from api.spool import Spool, check_room
from api.store_response import Failed, FailureReason, Stored, WarningReason
from shared.dicom.identity import Identity, identify, modality
from shared.dicom.limits import DEFAULT, StructureLimits
from shared.dicom.refusal import (
    AttributesMissing,
    InstanceRefused,
    NotUnderstood,
    TransferSyntaxNotAccepted,
)
from shared.dicom.structure import Structure, check_structure
from shared.errors import StoreFull, StoreUnavailable, StowgateError, Transient
from shared.events import InstancesStored
from shared.logs import where
from shared.metrics import ApiMetrics
from shared.ports import ObjectStore
from shared.records import (
    FirstAnswer,
    IngestRecord,
    Records,
    StoredInstance,
    UploadGivenUp,
    instance_path,
)
from shared.time import Clock, utc_now
from shared.vae import Vae

_log = structlog.get_logger()

DICOM = "application/dicom"

# Stands for the digest of a part that is no DICOM, which is skipped unread.
_FOREIGN = "foreign"

# `destination` of a request that names no VAE.
DEFAULT_DESTINATION = "default"

# How long a new record is left to the event that announces it before the relay steps in.
ANNOUNCEMENT_GRACE = timedelta(seconds=5)

# How many instances of one upload, and of all, are on their way into the store at a time. Together
# with the spool's threshold this bounds memory.
_PUTS_PER_UPLOAD = 8
_PUTS = 12

# Announcements that wait for a slow broker; those beyond are the relay's.
_ANNOUNCEMENTS_WAITING = 100

# Between two looks at an Idempotency-Key while the store takes its time; less than half of the
# shortest lease.
_STORE_PAUSE_SECONDS = 0.5

_REASONS: dict[type[InstanceRefused], FailureReason] = {
    NotUnderstood: FailureReason.CANNOT_UNDERSTAND,
    TransferSyntaxNotAccepted: FailureReason.TRANSFER_SYNTAX_NOT_SUPPORTED,
    AttributesMissing: FailureReason.DATASET_DOES_NOT_MATCH_SOP_CLASS,
}


class ReceivedPart(Protocol):
    """One part of the body; iterating it yields its bytes as they arrive."""

    @property
    def number(self) -> int: ...
    @property
    def media_type(self) -> MediaType: ...
    def __iter__(self) -> Iterator[bytes]: ...


def _is_dicom(part: ReceivedPart) -> bool:
    """A part without a Content-Type is taken for DICOM; many senders leave it out."""
    return part.media_type.type in ("", DICOM)


@dataclass(frozen=True)
class Target:
    """What the URL says: the study all instances should belong to, and where they are meant."""

    study_uid: str | None = None
    workflow: str | None = None
    vae: Vae | None = None


@dataclass(frozen=True)
class Limits:
    part_bytes: int
    parts: int
    spool_memory_bytes: int
    min_free_bytes: int
    upload: timedelta
    structure: StructureLimits = DEFAULT

    def check_number(self, part: ReceivedPart) -> None:
        """Raises `TooLarge` for a part too many."""
        if part.number > self.parts:
            raise TooLarge(f"the request has more parts than the limit of {self.parts}")

    def instance_bytes(self, vae: Vae | None) -> int:
        of_vae = vae.max_instance_bytes if vae else None
        return min(self.part_bytes, of_vae) if of_vae else self.part_bytes


@dataclass(frozen=True)
class Receipt:
    """What became of the parts, in the order of the request. `payload_id` is None where nothing
    was stored and no record written."""

    payload_id: str | None
    stored: list[Stored]
    failed: list[Failed]


@dataclass(frozen=True)
class Keyed:
    """A POST with an Idempotency-Key: its claim on the key, and how its answer is rendered."""

    claimed: ClaimedKey
    answer: Callable[[Receipt, str], FirstAnswer]


@dataclass
class _Arrival:
    """A part that is an instance, on its way into the store or failed."""

    failure: Failed | None = None
    instance: StoredInstance | None = None
    put: "Future[None] | None" = None


class Ingest:
    def __init__(
        self,
        *,
        instances: ObjectStore,
        records: Records,
        announce: Callable[[InstancesStored], None],
        announcers: ThreadPoolExecutor | None,
        putters: ThreadPoolExecutor,
        spool_folder: Path,
        limits: Limits,
        metrics: ApiMetrics,
        mint: Callable[[datetime], str],
        clock: Clock = utc_now,
    ) -> None:
        """`announce` is called by `announcers`, or without them by whoever serves the request:
        where it waits for nobody, another thread only costs time."""
        self._mint = mint
        self._instances = instances
        self._records = records
        self._announce = announce
        self._announcers = announcers
        self._may_wait = BoundedSemaphore(_ANNOUNCEMENTS_WAITING)
        self._putters = putters
        self._room = BoundedSemaphore(_PUTS)
        self._spool_folder = spool_folder
        self._limits = limits
        self._metrics = metrics
        self._clock = clock

    def ingest(
        self,
        parts: Iterable[ReceivedPart],
        target: Target,
        source: str,
        correlation_id: str,
        keyed: "Keyed | None" = None,
    ) -> Receipt | None:
        """Take one request's parts; None where it had none.

        `source` is the sender's address as the Workflow Manager takes it. Raises a `Problem` for
        a request that is refused as a whole, `StoreFull` where nothing was stored for want of
        room, and what the object store raises when it cannot do its work. What was stored by then
        is removed again.
        """
        received_at = self._clock()
        payload_id = keyed.claimed.payload_id if keyed else self._mint(received_at)
        with ExitStack() as undo:
            if keyed:
                undo.callback(_release, keyed.claimed)
            self._instances.check_room()
            check_room(self._spool_folder, self._limits.min_free_bytes)
            upload = _Upload(
                f"{payload_id}/",
                self._instances,
                self._putters,
                self._room,
                self._spool_folder,
                self._limits,
                target.vae,
                keyed.claimed.keep if keyed else _nothing,
            )
            undo.callback(upload.discard)
            for part in parts:
                upload.receive(part)
            upload.finish()
            if not upload.arrivals:
                return None
            stored, failed = upload.outcome(target.study_uid)
            receipt = Receipt(payload_id, stored, failed)
            if not stored:
                self._count(receipt, 0)
                return replace(receipt, payload_id=None)
            record = IngestRecord(
                payload_id=payload_id,
                correlation_id=correlation_id,
                received_at=received_at,
                source=source,
                destination=target.vae.name if target.vae else DEFAULT_DESTINATION,
                workflow=target.workflow,
                vae_workflows=target.vae.workflows if target.vae else None,
                instances=upload.instances,
                due_at=self._clock() + ANNOUNCEMENT_GRACE,
                first_answer=keyed.answer(receipt, fingerprint(upload.digests)) if keyed else None,
            )
            if keyed:
                keyed.claimed.keep(at_least=0.9)
            self._check_time(received_at)
            # A write that fails may have happened all the same, so from here on the objects stay;
            # without a record, the sweep by age removes them.
            undo.pop_all()
        try:
            self._records.add(record)
        except UploadGivenUp as error:
            upload.discard()
            if keyed:
                _release(keyed.claimed)
            raise SenderTooSlow(f"{error} stood still for so long that it was given up") from error
        self._count(receipt, sum(i.size_bytes for i in record.instances))
        return receipt

    def digests(self, parts: Iterable[ReceivedPart], target: Target) -> Iterator[str]:
        """Of each part of a body that is sent again, what `ingest` took for its fingerprint.

        Raises a `Problem` for a body that is over the limits, as `ingest` does.
        """
        for part in parts:
            self._limits.check_number(part)
            if not _is_dicom(part):
                yield _FOREIGN
                continue
            digest = sha256()
            for data in _pieces(part, self._limits.instance_bytes(target.vae)):
                digest.update(data)
            yield digest.hexdigest()

    def _check_time(self, received_at: datetime) -> None:
        if self._clock() - received_at > self._limits.upload:
            raise SenderTooSlow(f"the upload took longer than {self._limits.upload}")

    def announce(self, payload_id: str, correlation_id: str) -> None:
        """Tell the workers of what was recorded; without a wait where there are `announcers`.

        The sender need not wait for it: what is recorded will be opened, told or not.
        """
        event = InstancesStored(payload_id, correlation_id)
        if self._announcers is None:
            self._tell_workers(event)
        elif self._may_wait.acquire(blocking=False):
            self._announcers.submit(self._tell_in_turn, event)
        else:
            self._leave_to_relay(event, "too many wait for the broker already")

    def _tell_in_turn(self, event: InstancesStored) -> None:
        try:
            self._tell_workers(event)
        finally:
            self._may_wait.release()

    def _tell_workers(self, event: InstancesStored) -> None:
        try:
            self._announce(event)
        except Transient as error:
            self._leave_to_relay(event, str(error))

    def _leave_to_relay(self, event: InstancesStored, why: str) -> None:
        self._metrics.unannounced.inc()
        _log.warning(
            "event not announced; the relay will",
            payload_id=event.payload_id,
            correlation_id=event.correlation_id,
            error=why,
        )

    def _count(self, receipt: Receipt, size_bytes: int) -> None:
        self._metrics.received_bytes.inc(size_bytes)
        for instance in receipt.stored:
            outcome = f"{instance.warning:04X}" if instance.warning else "stored"
            self._metrics.instances.labels(outcome).inc()
        for failure in receipt.failed:
            self._metrics.instances.labels(f"{failure.reason:04X}").inc()


def _pieces(part: ReceivedPart, most_bytes: int) -> Iterator[bytes]:
    """The part's bytes as they arrive. Raises `TooLarge`."""
    size_bytes = 0
    for data in part:
        size_bytes += len(data)
        if size_bytes > most_bytes:
            raise TooLarge(f"part {part.number} is over the limit of {most_bytes} bytes")
        yield data


def _nothing() -> None:
    """Between two pieces of an upload without an Idempotency-Key."""


def _release(claimed: ClaimedKey) -> None:
    try:
        claimed.release()
    except (StowgateError, StillRunning) as error:
        _log.warning(
            "an Idempotency-Key is not released; its lease ends by itself", error=str(error)
        )


class _Upload:
    """The parts of one request and what becomes of them."""

    def __init__(
        self,
        prefix: str,
        store: ObjectStore,
        putters: ThreadPoolExecutor,
        room: BoundedSemaphore,
        spool_folder: Path,
        limits: Limits,
        vae: Vae | None,
        between: Callable[[], None],
    ) -> None:
        """`between` is called between two pieces, and now and then while the store is slow."""
        self._vae = vae
        self._between = between
        self.arrivals: list[_Arrival] = []
        self.digests: list[str] = []
        self._prefix = prefix
        self._store = store
        self._putters = putters
        self._room = room
        self._spool_folder = spool_folder
        self._limits = limits
        self._part_bytes = limits.instance_bytes(vae)
        self._by_sop_instance_uid: dict[str, _Arrival] = {}
        self._putting: deque[Future[None]] = deque()
        self._foreign_parts = 0
        self._store_is_away = False

    def receive(self, part: ReceivedPart) -> None:
        """Read a part to its end, and have it stored unless something is wrong with it."""
        self._limits.check_number(part)
        if not _is_dicom(part):
            self._foreign_parts += 1
            self.digests.append(_FOREIGN)
            self._fail(
                FailureReason.CANNOT_UNDERSTAND,
                f"part {part.number}: its Content-Type is not {DICOM}",
            )
            return
        with ExitStack() as spooled:
            spool = spooled.enter_context(
                Spool(self._spool_folder, self._limits.spool_memory_bytes)
            )
            head_start = spooled.enter_context(
                closing(HeadStart(self._store, spool, DICOM, self._part_bytes, self._key_of_new))
            )
            for data in _pieces(part, self._part_bytes):
                spool.write(data)
                head_start.proceed()
                self._between()
            self.digests.append(spool.sha256)
            checked = self._check(part.number, spool)
            if checked is None:
                return
            identity, structure = checked
            if self._is_new(part.number, identity, spool.sha256):
                self._await_turn()
                self._store_spooled(
                    identity, structure, spool, head_start.put, spooled.pop_all().close
                )

    def _check(self, number: int, spool: Spool) -> tuple[Identity, Structure] | None:
        try:
            with spool.view() as data:
                structure = check_structure(data, spool.scratch, self._limits.structure)
            identity = identify(structure)
            why = refusal(self._vae, identity, modality(structure)) if self._vae else None
            if why is None:
                return identity, structure
            self._fail(
                why.reason,
                f"part {number}: {why.words}",
                identity.sop_class_uid,
                identity.sop_instance_uid,
            )
        except InstanceRefused as refused:
            self._fail(
                _REASONS[type(refused)],
                f"part {number}: {refused}",
                refused.sop_class_uid,
                refused.sop_instance_uid,
            )
        except StowgateError:
            raise
        except Exception as error:  # noqa: BLE001
            # One instance that our own check trips over must not cost the sender the others. The
            # error's text may hold a value of the dataset, so only its kind and place are logged.
            _log.error(
                "instance could not be checked",
                part=number,
                error=type(error).__name__,
                place=where(error),
            )
            self._fail(
                FailureReason.PROCESSING_FAILURE,
                f"part {number}: an error of this service while it checked the instance",
            )
        return None

    def _key_of_new(self, identity: Identity) -> str | None:
        """None where the request brought that instance before."""
        if identity.sop_instance_uid in self._by_sop_instance_uid:
            return None
        return self._prefix + instance_path(
            identity.study_uid, identity.series_uid, identity.sop_instance_uid
        )

    def _is_new(self, number: int, identity: Identity, sha256: str) -> bool:
        """False for an instance that the request brought before; no failure if it is equal."""
        first = self._by_sop_instance_uid.get(identity.sop_instance_uid)
        if first is None:
            return True
        if first.instance is None or first.instance.sha256 != sha256:
            self._fail(
                FailureReason.DUPLICATE_SOP_INSTANCE,
                f"part {number}: its SOP Instance UID came before in this request with other bytes",
                identity.sop_class_uid,
                identity.sop_instance_uid,
            )
        return False

    def _await_turn(self) -> None:
        while len(self._putting) >= _PUTS_PER_UPLOAD:
            self._settle(self._putting.popleft())
        while not self._room.acquire(timeout=_STORE_PAUSE_SECONDS):
            self._between()

    def _store_spooled(
        self,
        identity: Identity,
        structure: Structure,
        spool: Spool,
        put_under: Callable[[str], None],
        close: Callable[[], None],
    ) -> None:
        instance = StoredInstance(
            sop_class_uid=identity.sop_class_uid,
            sop_instance_uid=identity.sop_instance_uid,
            study_uid=identity.study_uid,
            series_uid=identity.series_uid,
            size_bytes=spool.size_bytes,
            sha256=spool.sha256,
            bulk_ranges=structure.bulk_ranges,
        )
        try:
            put = self._putters.submit(put_under, self._prefix + instance.path)
        except RuntimeError:
            # No thread is to be had; without this the room would be lost to all later uploads.
            self._free(close)
            raise
        put.add_done_callback(lambda _: self._free(close))
        self._putting.append(put)
        arrival = _Arrival(instance=instance, put=put)
        self._by_sop_instance_uid[identity.sop_instance_uid] = arrival
        self.arrivals.append(arrival)

    def _free(self, close: Callable[[], None]) -> None:
        close()
        self._room.release()

    def _settle(self, put: "Future[None]") -> None:
        while True:
            try:
                error = put.exception(_STORE_PAUSE_SECONDS)
                break
            except TimeoutError:
                self._between()
        # A full store fails one instance; any other error of the store fails the request.
        if error is not None and not isinstance(error, StoreFull):
            self._store_is_away = isinstance(error, StoreUnavailable)
            raise error

    def _fail(
        self,
        reason: FailureReason,
        detail: str,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> None:
        failure = Failed(reason, detail, sop_class_uid, sop_instance_uid)
        self.arrivals.append(_Arrival(failure=failure))

    def finish(self) -> None:
        """Wait for the store. To be called once the body has ended properly."""
        while self._putting:
            self._settle(self._putting.popleft())
        if self.arrivals and self._foreign_parts == len(self.arrivals):
            raise UnsupportedMediaType(f"no part of the request is {DICOM}")
        full: BaseException | None = None
        for arrival in self.arrivals:
            error = arrival.put.exception() if arrival.put else None
            if error and arrival.instance:
                full = error
                arrival.failure = Failed(
                    FailureReason.OUT_OF_RESOURCES,
                    f"{error}; send it again when there is room",
                    arrival.instance.sop_class_uid,
                    arrival.instance.sop_instance_uid,
                )
        if full and all(arrival.failure for arrival in self.arrivals):
            raise full

    @property
    def instances(self) -> tuple[StoredInstance, ...]:
        return tuple(a.instance for a in self.arrivals if a.instance and not a.failure)

    def outcome(self, study_uid: str | None) -> tuple[list[Stored], list[Failed]]:
        stored = [
            Stored(
                instance.sop_class_uid,
                instance.sop_instance_uid,
                instance.study_uid,
                None
                if study_uid in (None, instance.study_uid)
                else WarningReason.DATASET_DOES_NOT_MATCH_SOP_CLASS,
            )
            for instance in self.instances
        ]
        return stored, [a.failure for a in self.arrivals if a.failure]

    def discard(self) -> None:
        """Remove what was stored of a request that is not acknowledged.

        A store that does not answer is left to the sweep, as the sender waits for its answer.
        """
        wait(self._putting)
        keys = [self._prefix + a.instance.path for a in self.arrivals if a.instance]
        if not keys or self._store_is_away:
            return
        try:
            self._store.delete(keys)
        except StowgateError as error:
            _log.warning(
                "objects of a refused upload are left to the sweep",
                prefix=self._prefix,
                error=str(error),
            )
