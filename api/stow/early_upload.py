"""Upload of a large instance to the store while the rest of it arrives."""

from collections.abc import Container
from contextlib import suppress

from api.stow.spool import Spool
from shared.dicom.identity import identify
from shared.dicom.refusal import InstanceRefused
from shared.dicom.structure import first_structure
from shared.dicom.uids import SERIES_INSTANCE_UID
from shared.instances import instance_path
from shared.ports import ObjectStore, Writing

# The upload of a smaller instance takes so little time that an early start gains nothing.
_MIN_BYTES = 16 << 20


class EarlyUpload:
    """Uploads an instance while it is spooled, from when its key is known.

    The object becomes visible in the store only in `put`, when the complete instance was checked.

    Args:
        store: The object store.
        spool: The spool of the instance.
        content_type: The media type of the object.
        max_bytes: The maximum size of an instance.
        prefix: The part of the key before that of the instance.
        seen: The SOP Instance UIDs received before; an instance with one of them is uploaded at
            the end only.
    """

    def __init__(
        self,
        store: ObjectStore,
        spool: Spool,
        content_type: str,
        max_bytes: int,
        prefix: str,
        seen: Container[str],
    ) -> None:
        self._store = store
        self._spool = spool
        self._content_type = content_type
        self._max_bytes = max_bytes
        self._prefix = prefix
        self._seen = seen
        self._is_decided = False
        self._key: str | None = None
        self._writing: Writing | None = None

    def proceed(self) -> None:
        """Upload what was spooled since the last call."""
        if not self._is_decided and self._spool.size_bytes >= _MIN_BYTES:
            self._is_decided = True
            # The check of the complete instance reports the error.
            with suppress(InstanceRefused):
                self._begin()
        if self._writing is not None:
            self._spool.flush()
            self._writing.proceed(self._spool.size_bytes)

    def _begin(self) -> None:
        data = self._spool.growing()
        if data is None:
            return
        with self._spool.view() as view:
            structure = first_structure(view, SERIES_INSTANCE_UID)
        if structure is None:
            return
        identity = identify(structure)
        if identity.sop_instance_uid in self._seen:
            return
        self._key = self._prefix + instance_path(
            identity.study_uid, identity.series_uid, identity.sop_instance_uid
        )
        self._writing = self._store.begin(self._key, data, self._content_type, self._max_bytes)

    def put(self, key: str) -> None:
        """Store the complete instance. Raises the errors of `ObjectStore.put`."""
        if self._writing is not None:
            if self._key == key and not self._writing.has_failed:
                self._writing.finish(self._spool.size_bytes)
                return
            # After a failure during the upload, the spool still has the complete instance.
            self._writing.abandon()
        self._store.put(
            key, self._spool.open(), self._spool.size_bytes, self._content_type, self._spool.sha256
        )

    def close(self) -> None:
        """Abandon the upload, unless `put` has finished it."""
        if self._writing is not None:
            self._writing.abandon()
