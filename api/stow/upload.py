"""Uploads the parts of a request into the object store, and keeps the outcome of each.

Parts are processed one by one as they arrive. Each is spooled, its structure is checked and its
UIDs are read. Another thread then puts it into the object store while the next part arrives.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import blake2b, sha256
from threading import BoundedSemaphore
from typing import Any, Protocol

import structlog

from api.http.media_types import DICOM
from api.http.problems import TooLarge, UnsupportedMediaType
from api.settings import ApiSettings
from api.stow.acceptance import refusal
from api.stow.early_upload import EarlyUpload
from api.stow.idempotency import Fingerprint
from api.stow.multipart import MediaType
from api.stow.response import Failed, FailureReason, Stored, WarningReason
from api.stow.spool import Spool, check_room
from api.stow.spooled_list import SpooledList
from api.vae.registry import Vae
from shared.attachments import MAX_INLINE_BYTES, Attachment, Attachments
from shared.dicom.identity import Identity, identify, modality
from shared.dicom.refusal import InstanceRefused
from shared.dicom.structure import Structure, check_structure
from shared.errors import StoreFull, StoreUnavailable, StowgateError
from shared.instances import StoredInstance, load_instance
from shared.ports import ObjectStore
from shared.runtime.logs import where

_log = structlog.get_logger()

# Size of the digests that are kept of each part: long enough that no two parts will have the same
# digest by chance, and as numbers they need no more memory than shorter ones.
_DIGEST_BYTES = 15

# Replaces the digest of a part that is not DICOM, which is skipped unread.
_FOREIGN = "foreign"

# Concurrent puts of one upload, and of all. With the spool's threshold they bound the memory.
_PUTS_PER_UPLOAD = 8
_PUTS = 12

# Interval of `heartbeat` while the store is slow; less than half of the shortest lease of an
# Idempotency-Key.
_STORE_PAUSE_SECONDS = 0.5


class ReceivedPart(Protocol):
    """A part of the body; iterating it yields its bytes as they arrive."""

    @property
    def number(self) -> int: ...
    @property
    def media_type(self) -> MediaType: ...
    def __iter__(self) -> Iterator[bytes]: ...


def _is_dicom(part: ReceivedPart) -> bool:
    """A part without a Content-Type, which many senders omit, counts as DICOM."""
    return part.media_type.type in ("", DICOM)


@dataclass(frozen=True)
class _Putting:
    """An instance that is being put into the store. `number` is that of its part."""

    number: int
    instance: StoredInstance
    put: "Future[None]"


class _Contents:
    """The contents of the instances of a request, by SOP Instance UID: one digest for each."""

    def __init__(self) -> None:
        self._digests: dict[int, int] = {}

    def __contains__(self, sop_instance_uid: object) -> bool:
        return _uid_digest(str(sop_instance_uid)) in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, sop_instance_uid: str, sha256: str) -> None:
        self._digests[_uid_digest(sop_instance_uid)] = _content_digest(sha256)

    def is_same(self, sop_instance_uid: str, sha256: str) -> bool:
        return self._digests[_uid_digest(sop_instance_uid)] == _content_digest(sha256)


class Uploads:
    """The resources that all uploads of a process share: store, putting threads and spool."""

    def __init__(
        self, store: ObjectStore, putters: ThreadPoolExecutor, settings: ApiSettings
    ) -> None:
        self.store = store
        self.putters = putters
        self.room = BoundedSemaphore(_PUTS)
        self.settings = settings

    def check_room(self) -> None:
        """Raise `StoreFull` if the store or the spool is past its watermark."""
        self.store.check_room()
        check_room(self.settings.spool, self.settings.min_free_bytes)

    def check_number(self, part: ReceivedPart) -> None:
        """Raise `TooLarge` if the part exceeds the maximum number of parts."""
        if part.number > self.settings.max_parts:
            raise TooLarge(
                f"the request has more parts than the limit of {self.settings.max_parts}"
            )

    def max_instance_bytes(self, vae: Vae | None) -> int:
        of_vae = vae.max_instance_bytes if vae else None
        return min(self.settings.max_part_bytes, of_vae or self.settings.max_part_bytes)

    def digests(self, parts: Iterable[ReceivedPart], vae: Vae | None) -> Iterator[str]:
        """Yield the digests of `Upload.fingerprint` for a repeated body, which is not stored.

        Raises `TooLarge` like `Upload.receive`.
        """
        for part in parts:
            self.check_number(part)
            if not _is_dicom(part):
                yield _FOREIGN
                continue
            digest = sha256()
            for data in _pieces(part, self.max_instance_bytes(vae)):
                digest.update(data)
            yield digest.hexdigest()


def _pieces(part: ReceivedPart, max_bytes: int) -> Iterator[bytes]:
    """Yield the part's bytes as they arrive. Raises `TooLarge`."""
    size_bytes = 0
    for data in part:
        size_bytes += len(data)
        if size_bytes > max_bytes:
            raise TooLarge(f"part {part.number} is over the limit of {max_bytes} bytes")
        yield data


class Upload:
    """The upload of a request's parts, with the outcomes in `stored` and `failed`.

    `first_put_at` is when the first instance was given to the store, in seconds since the epoch.
    Outcomes are spooled until `close`, so that a part needs little memory.
    """

    def __init__(
        self,
        payload_id: str,
        uploads: Uploads,
        attachments: Attachments,
        *,
        vae: Vae | None,
        study_uid: str | None,
        heartbeat: Callable[[], None],
    ) -> None:
        """`study_uid` is that of the URL. `heartbeat` is called between two pieces, and every
        half second while the store is slow."""
        self.fingerprint = Fingerprint()
        self.outcomes: Counter[str] = Counter()
        self.stored_bytes = 0
        self.first_put_at: float | None = None
        self._payload_id = payload_id
        self._prefix = f"{payload_id}/"
        self._store = uploads.store
        self._attachments = attachments
        self._putters = uploads.putters
        self._room = uploads.room
        self._check_number = uploads.check_number
        self._settings = uploads.settings
        self._structure_limits = uploads.settings.structure_limits
        self._vae = vae
        self._study_uid = study_uid
        self._part_bytes = uploads.max_instance_bytes(vae)
        self._heartbeat = heartbeat
        self._contents = _Contents()
        self._instances = SpooledList(self._settings.spool, MAX_INLINE_BYTES, load_instance)
        self._failures = SpooledList(self._settings.spool, MAX_INLINE_BYTES, _failure)
        self._unsettled: deque[_Putting | Failed] = deque()
        self._has_attached = False
        self._foreign_parts = 0
        self._full: StoreFull | None = None
        self._store_is_away = False

    def receive(self, part: ReceivedPart) -> None:
        """Read a part to its end, and store it if it is valid."""
        self._check_number(part)
        if not _is_dicom(part):
            self._foreign_parts += 1
            self.fingerprint.add(_FOREIGN)
            self._fail(
                FailureReason.CANNOT_UNDERSTAND,
                f"part {part.number}: its Content-Type is not {DICOM}",
            )
            return
        with ExitStack() as spooled:
            spool = spooled.enter_context(
                Spool(self._settings.spool, self._settings.spool_memory_bytes)
            )
            early_upload = spooled.enter_context(
                closing(
                    EarlyUpload(
                        self._store, spool, DICOM, self._part_bytes, self._prefix, self._contents
                    )
                )
            )
            for data in _pieces(part, self._part_bytes):
                spool.write(data)
                early_upload.proceed()
                self._heartbeat()
            self.fingerprint.add(spool.sha256)
            checked = self._check(part.number, spool)
            if checked is None:
                return
            identity, structure = checked
            if self._is_new(part.number, identity, spool.sha256):
                self._await_turn()
                self._store_spooled(
                    part.number,
                    identity,
                    structure,
                    spool,
                    early_upload.put,
                    spooled.pop_all().close,
                )

    def _check(self, number: int, spool: Spool) -> tuple[Identity, Structure] | None:
        try:
            with spool.view() as data:
                structure = check_structure(data, spool.scratch, self._structure_limits)
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
            # A bug that one instance triggers must not fail the others. The error's text may
            # contain a value of the dataset, so only its type and place are logged.
            _log.error(
                "could not check an instance",
                part=number,
                error=type(error).__name__,
                place=where(error),
            )
            self._fail(
                FailureReason.PROCESSING_FAILURE,
                f"part {number}: internal server error during the check of the instance",
            )
        return None

    def _is_new(self, number: int, identity: Identity, sha256: str) -> bool:
        """Return False for a duplicate within the request, which fails unless it is identical."""
        if identity.sop_instance_uid not in self._contents:
            return True
        if not self._contents.is_same(identity.sop_instance_uid, sha256):
            self._fail(
                FailureReason.DUPLICATE_SOP_INSTANCE,
                f"part {number}: duplicate SOP Instance UID with different content in this request",
                identity.sop_class_uid,
                identity.sop_instance_uid,
            )
        return False

    def _await_turn(self) -> None:
        self._settle_to(_PUTS_PER_UPLOAD - 1)
        while not self._room.acquire(timeout=_STORE_PAUSE_SECONDS):
            self._heartbeat()

    def _store_spooled(
        self,
        number: int,
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
        self.first_put_at = self.first_put_at or time.time()
        put = self._putters.submit(put_under, self._prefix + instance.path)
        put.add_done_callback(lambda _: self._free(close))
        self._unsettled.append(_Putting(number, instance, put))
        self._contents.add(identity.sop_instance_uid, spool.sha256)

    def _free(self, close: Callable[[], None]) -> None:
        try:
            close()
        finally:
            self._room.release()

    def _settle_to(self, count: int) -> None:
        """Wait for the store until at most `count` parts are unsettled. A part stays in that list
        until it is settled, so that `discard` waits for it too."""
        while len(self._unsettled) > count:
            first = self._unsettled[0]
            self._note(first if isinstance(first, Failed) else self._settled(first))
            self._unsettled.popleft()

    def _settled(self, putting: _Putting) -> StoredInstance | Failed:
        error = self._error_of(putting.put)
        if error is None:
            return putting.instance
        # A full store fails one instance; any other error of the store fails the request.
        if not isinstance(error, StoreFull):
            raise error
        self._full = error
        return Failed(
            FailureReason.OUT_OF_RESOURCES,
            f"part {putting.number}: {error}; then send it again",
            putting.instance.sop_class_uid,
            putting.instance.sop_instance_uid,
        )

    def _error_of(self, put: "Future[None]") -> BaseException | None:
        while not wait([put], _STORE_PAUSE_SECONDS).done:
            self._heartbeat()
        error = put.exception()
        self._store_is_away = isinstance(error, StoreUnavailable)
        return error

    def _note(self, outcome: StoredInstance | Failed) -> None:
        if isinstance(outcome, Failed):
            self._failures.append(outcome)
            self.outcomes[f"{outcome.reason:04X}"] += 1
        else:
            self._instances.append(outcome)
            self.stored_bytes += outcome.size_bytes
            warning = self._warning(outcome)
            self.outcomes[f"{warning:04X}" if warning else "stored"] += 1

    def _fail(
        self,
        reason: FailureReason,
        detail: str,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> None:
        self._settle_to(_PUTS_PER_UPLOAD - 1)
        self._unsettled.append(Failed(reason, detail, sop_class_uid, sop_instance_uid))

    def finish(self) -> None:
        """Wait for the store. Must be called when the body is complete."""
        self._settle_to(0)
        if self._foreign_parts and self._foreign_parts == self.outcomes.total():
            raise UnsupportedMediaType(f"no part of the request is {DICOM}")
        if self._full and not self.stored_count:
            raise self._full

    @property
    def stored_count(self) -> int:
        return len(self._instances)

    @property
    def failed_count(self) -> int:
        return len(self._failures)

    def stored(self) -> Iterator[Stored]:
        for instance in self._instances:
            yield Stored(
                instance.sop_class_uid,
                instance.sop_instance_uid,
                instance.study_uid,
                instance.series_uid,
                self._warning(instance),
            )

    def failed(self) -> Iterator[Failed]:
        return iter(self._failures)

    def _warning(self, instance: StoredInstance) -> WarningReason | None:
        if self._study_uid in (None, instance.study_uid):
            return None
        return WarningReason.DATASET_DOES_NOT_MATCH_SOP_CLASS

    def recorded_instances(self) -> tuple[StoredInstance, ...] | None:
        """Return the instances for the record, or None if they were too many and were attached.

        Raises what `attach` raises.
        """
        if self._instances.spool.size_bytes <= MAX_INLINE_BYTES:
            return tuple(self._instances)
        self.attach(Attachment.INSTANCES, self._instances.spool)
        return None

    def attach(self, name: Attachment, spool: Spool) -> None:
        """Store an attachment of the record. Raises what the object store raises."""
        self._has_attached = True
        put = self._putters.submit(
            self._attachments.put,
            self._payload_id,
            name,
            spool.open(),
            spool.size_bytes,
            spool.sha256,
        )
        try:
            error = self._error_of(put)
        finally:
            wait([put])
        if error is not None:
            raise error

    def discard(self) -> None:
        """Remove the stored objects of a request that is not acknowledged.

        If the store is unavailable they are left to the sweep, as the sender waits for the answer.
        """
        wait([one.put for one in self._unsettled if isinstance(one, _Putting)])
        if not self._contents or self._store_is_away:
            return
        try:
            if self._has_attached:
                # Attachments first: the sweep finds the rest by the instances.
                self._attachments.remove(self._payload_id)
            self._store.delete(found.key for found in self._store.list(self._prefix))
        except StowgateError as error:
            _log.warning(
                "objects of a refused upload are left to the sweep",
                prefix=self._prefix,
                error=str(error),
            )

    def close(self) -> None:
        self._instances.spool.close()
        self._failures.spool.close()


def _failure(row: dict[str, Any]) -> Failed:
    return Failed(**{**row, "reason": FailureReason(row["reason"])})


def _uid_digest(uid: str) -> int:
    return int.from_bytes(blake2b(uid.encode(), digest_size=_DIGEST_BYTES).digest())


def _content_digest(sha256: str) -> int:
    return int(sha256[: 2 * _DIGEST_BYTES], 16)
