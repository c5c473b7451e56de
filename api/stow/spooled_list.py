"""A list that does not grow in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from api.stow.spool import Spool

T = TypeVar("T")


class SpooledList(Generic[T]):
    """Things in the order in which they came, each a line of JSON in a `Spool`.

    To be iterated as often as one likes, but once at a time, and not before all are in.
    """

    def __init__(self, folder: Path, memory_bytes: int, load: Callable[[Any], T]) -> None:
        """`load` makes one of what JSON made of it."""
        self.spool = Spool(folder, memory_bytes)
        self._load = load
        self._count = 0

    def append(self, item: T) -> None:
        """Raises what `Spool` raises."""
        self.spool.write(orjson.dumps(item) + b"\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for line in self.spool.open():
            yield self._load(orjson.loads(line))
