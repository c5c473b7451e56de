"""Attachments of a record, for what is too long for it: its instances, and the first answer.

They are written before the record, never changed, and named by the payload id, so the record is the
commit point for them too. They are kept as long as the record, wherever that moves.
"""

from collections.abc import Iterator
from enum import StrEnum
from itertools import chain
from typing import BinaryIO

import orjson

from shared.errors import ObjectMissing, Permanent
from shared.instances import StoredInstance, load_instance
from shared.ports import ObjectStore

MAX_INLINE_BYTES = 64 << 10
"""Maximum size of the instances in a record, and of the answer in it; above it an attachment."""

_PIECE_BYTES = 256 << 10


class Attachment(StrEnum):
    """`INSTANCES` has one instance per line, encoded as in a record."""

    INSTANCES = "instances.jsonl"
    ANSWER = "answer"


_CONTENT_TYPES = {
    Attachment.INSTANCES: "application/jsonl",
    Attachment.ANSWER: "application/octet-stream",
}


class AttachmentUnreadable(Permanent):
    """A record's attachment is missing or damaged."""


class Attachments:
    """The attachments in the state bucket. Every call may raise what the object store raises."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(
        self, payload_id: str, name: Attachment, data: BinaryIO, size_bytes: int, sha256: str
    ) -> None:
        self._store.put(_key(payload_id, name), data, size_bytes, _CONTENT_TYPES[name], sha256)

    def read(self, payload_id: str, name: Attachment) -> Iterator[bytes]:
        """Return an attachment in pieces; the first one is read at once.

        Raises `AttachmentUnreadable` if it is missing.
        """
        pieces = self._pieces(_key(payload_id, name))
        return chain([next(pieces)], pieces)

    def _pieces(self, key: str) -> Iterator[bytes]:
        start = 0
        while True:
            try:
                piece = self._store.read_range(key, start, _PIECE_BYTES)
            except ObjectMissing as error:
                raise AttachmentUnreadable(
                    f"{key} in the state bucket is missing; restore it from a backup, or have the "
                    "sender send again"
                ) from error
            yield piece
            start += len(piece)
            if len(piece) < _PIECE_BYTES:
                return

    def instances(self, payload_id: str, count: int) -> Iterator[StoredInstance]:
        """Return the `count` instances of a payload; the first ones are read at once.

        Raises `AttachmentUnreadable`, also during the iteration.
        """
        return self._instances(payload_id, count, self.read(payload_id, Attachment.INSTANCES))

    def _instances(
        self, payload_id: str, count: int, pieces: Iterator[bytes]
    ) -> Iterator[StoredInstance]:
        found = 0
        try:
            for line in _lines(pieces):
                yield load_instance(orjson.loads(line))
                found += 1
            if found != count:
                raise ValueError(f"it has {found} of {count} instances")
        except (ValueError, TypeError, KeyError) as error:
            raise AttachmentUnreadable(
                f"{_key(payload_id, Attachment.INSTANCES)} in the state bucket is damaged; restore "
                "it from a backup, or have the sender send again"
            ) from error

    def remove(self, payload_id: str) -> None:
        """Remove the attachments of a payload that has no record and can never get one."""
        keys = [found.key for found in self._store.list(_folder(payload_id))]
        if keys:
            self._store.delete(keys)


def _folder(payload_id: str) -> str:
    # Sorts after the records, so that a backup in the order of keys has the attachments of each of
    # its records.
    return f"uploads/{payload_id}/"


def _key(payload_id: str, name: Attachment) -> str:
    return f"{_folder(payload_id)}{name}"


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest
