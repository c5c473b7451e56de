"""What is too long for a record: its instances, and the first answer, as objects of their own.

Like the instances themselves they are written before the record, never changed, and named by the
payload's id, so the record is the commit point for them too. They stay for as long as the record
does, wherever that moves.
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
"""Of the instances in a record, and of the answer in it. Each is attached where it is longer."""

_PIECE_BYTES = 256 << 10


class Attachment(StrEnum):
    """`INSTANCES` has one a line, each as it would be in a record."""

    INSTANCES = "instances.jsonl"
    ANSWER = "answer"


_CONTENT_TYPES = {
    Attachment.INSTANCES: "application/jsonl",
    Attachment.ANSWER: "application/octet-stream",
}


class AttachmentUnreadable(Permanent):
    """A record's attachment is missing or damaged."""


class Attachments:
    """Those in the state bucket. Every call may raise what the object store raises."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(
        self, payload_id: str, name: Attachment, data: BinaryIO, size_bytes: int, sha256: str
    ) -> None:
        self._store.put(_key(payload_id, name), data, size_bytes, _CONTENT_TYPES[name], sha256)

    def read(self, payload_id: str, name: Attachment) -> Iterator[bytes]:
        """Return its bytes in pieces, the first of which is read at once.

        Raises `AttachmentUnreadable` where it is missing.
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
        """Return the instances of a payload that has so many; the first of them are read at once.

        Raises `AttachmentUnreadable`, also while they are iterated.
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
        """Remove all of a payload that has no record, and cannot come to have one."""
        keys = [found.key for found in self._store.list(_folder(payload_id))]
        if keys:
            self._store.delete(keys)


def _folder(payload_id: str) -> str:
    # Behind the records in the order of keys, so that a backup which copies the bucket in that
    # order has the attachments of every record in it.
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
