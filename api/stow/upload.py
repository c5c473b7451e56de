"""The parts of one request on their way into the object store, and what becomes of each.

They are taken one at a time as they arrive. Each is spooled, its structure checked and its UIDs
read; then it goes to the object store in another thread while the next part arrives.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from threading import BoundedSemaphore
from typing import Protocol

import structlog

from api.http.problems import TooLarge, UnsupportedMediaType
from api.stow.acceptance import refusal
from api.stow.early_upload import EarlyUpload
from api.stow.multipart import MediaType
from api.stow.response import Failed, FailureReason, Stored, WarningReason
from api.stow.spool import Spool, check_room
from api.vae.registry import Vae
from shared.dicom.identity import Identity, identify, modality
from shared.dicom.limits import DEFAULT, StructureLimits
from shared.dicom.refusal import InstanceRefused
from shared.dicom.structure import Structure, check_structure
from shared.errors import StoreFull, StoreUnavailable, StowgateError
from shared.ports import ObjectStore
from shared.records import StoredInstance, instance_path
from shared.runtime.logs import where

_log = structlog.get_logger()

DICOM = "application/dicom"

# Stands for the digest of a part that is no DICOM, which is skipped unread.
_FOREIGN = "foreign"

# How many instances of one upload, and of all, are on their way into the store at a time. Together
# with the spool's threshold this bounds memory.
_PUTS_PER_UPLOAD = 8
_PUTS = 12

# Between two calls of `between` while the store takes its time; less than half of the shortest
# lease of an Idempotency-Key.
_STORE_PAUSE_SECONDS = 0.5


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
class Limits:
    """What one request may bring; sizes in bytes, and `upload` is the longest time it may take."""

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


@dataclass
class _Arrival:
    """A part that is an instance, on its way into the store or failed."""

    failure: Failed | None = None
    instance: StoredInstance | None = None
    put: "Future[None] | None" = None


class Uploads:
    """What all uploads of a process share: `store`, the threads that put into it, and the spool."""

    def __init__(
        self, store: ObjectStore, putters: ThreadPoolExecutor, spool_folder: Path, limits: Limits
    ) -> None:
        self.store = store
        self.putters = putters
        self.room = BoundedSemaphore(_PUTS)
        self.spool_folder = spool_folder
        self.limits = limits

    def check_room(self) -> None:
        """Raises `StoreFull` where store or spool are past their watermark."""
        self.store.check_room()
        check_room(self.spool_folder, self.limits.min_free_bytes)

    def digests(self, parts: Iterable[ReceivedPart], vae: Vae | None) -> Iterator[str]:
        """`Upload.digests` of a body that is sent again, of which nothing is kept.

        Raises `TooLarge` where `Upload.receive` does.
        """
        for part in parts:
            self.limits.check_number(part)
            if not _is_dicom(part):
                yield _FOREIGN
                continue
            digest = sha256()
            for data in _pieces(part, self.limits.instance_bytes(vae)):
                digest.update(data)
            yield digest.hexdigest()


def _pieces(part: ReceivedPart, most_bytes: int) -> Iterator[bytes]:
    """The part's bytes as they arrive. Raises `TooLarge`."""
    size_bytes = 0
    for data in part:
        size_bytes += len(data)
        if size_bytes > most_bytes:
            raise TooLarge(f"part {part.number} is over the limit of {most_bytes} bytes")
        yield data


class Upload:
    """The parts of one request and what becomes of them."""

    def __init__(
        self, payload_id: str, uploads: Uploads, vae: Vae | None, between: Callable[[], None]
    ) -> None:
        """`between` is called between two pieces, and now and then while the store is slow."""
        self.arrivals: list[_Arrival] = []
        self.digests: list[str] = []
        self._prefix = f"{payload_id}/"
        self._store = uploads.store
        self._putters = uploads.putters
        self._room = uploads.room
        self._spool_folder = uploads.spool_folder
        self._limits = uploads.limits
        self._vae = vae
        self._part_bytes = uploads.limits.instance_bytes(vae)
        self._between = between
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
            early_upload = spooled.enter_context(
                closing(EarlyUpload(self._store, spool, DICOM, self._part_bytes, self._key_of_new))
            )
            for data in _pieces(part, self._part_bytes):
                spool.write(data)
                early_upload.proceed()
                self._between()
            self.digests.append(spool.sha256)
            checked = self._check(part.number, spool)
            if checked is None:
                return
            identity, structure = checked
            if self._is_new(part.number, identity, spool.sha256):
                self._await_turn()
                self._store_spooled(
                    identity, structure, spool, early_upload.put, spooled.pop_all().close
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
                FailureReason(refused.failure_reason),
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
            left_out=structure.left_out,
        )
        put = self._putters.submit(put_under, self._prefix + instance.path)
        put.add_done_callback(lambda _: self._free(close))
        self._putting.append(put)
        arrival = _Arrival(instance=instance, put=put)
        self._by_sop_instance_uid[identity.sop_instance_uid] = arrival
        self.arrivals.append(arrival)

    def _free(self, close: Callable[[], None]) -> None:
        try:
            close()
        finally:
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
                instance.series_uid,
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
        wait([arrival.put for arrival in self.arrivals if arrival.put])
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
