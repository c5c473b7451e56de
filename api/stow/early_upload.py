"""A large instance is on its way into the store while the rest of it arrives."""

from collections.abc import Callable
from contextlib import suppress

from api.stow.spool import Spool
from shared.dicom.identity import Identity, identify
from shared.dicom.refusal import InstanceRefused
from shared.dicom.structure import first_structure
from shared.dicom.uids import SERIES_INSTANCE_UID
from shared.ports import ObjectStore, Writing

# A smaller one is stored in no time once it is there.
_AT_LEAST_BYTES = 16 << 20


class HeadStart:
    """Stores what is being spooled, and begins as soon as that says under which key.

    Whether it may be stored, and under that key, is known when all of it is there. Nothing of it
    shows in the store until then.
    """

    def __init__(
        self,
        store: ObjectStore,
        spool: Spool,
        content_type: str,
        most_bytes: int,
        key_of: Callable[[Identity], str | None],
    ) -> None:
        """`key_of` may decline. No instance has more than `most_bytes`."""
        self._store = store
        self._spool = spool
        self._content_type = content_type
        self._most_bytes = most_bytes
        self._key_of = key_of
        self._has_looked = False
        self._key: str | None = None
        self._writing: Writing | None = None

    def proceed(self) -> None:
        """More is spooled by now."""
        if not self._has_looked and self._spool.size_bytes >= _AT_LEAST_BYTES:
            self._has_looked = True
            # At the end it is told in words.
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
        self._key = self._key_of(identify(structure)) if structure else None
        if self._key is not None:
            self._writing = self._store.begin(self._key, data, self._content_type, self._most_bytes)

    def put(self, key: str) -> None:
        """Store all of it. Raises what `ObjectStore.put` raises."""
        if self._writing is not None:
            if self._key == key and not self._writing.has_failed:
                self._writing.finish(self._spool.size_bytes)
                return
            # The store may have been away in the middle of a long upload, and all is still here.
            self._writing.abandon()
        self._store.put(
            key, self._spool.open(), self._spool.size_bytes, self._content_type, self._spool.sha256
        )

    def close(self) -> None:
        """Leave nothing of what was begun, unless `put` has finished it."""
        if self._writing is not None:
            self._writing.abandon()
