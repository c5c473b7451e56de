"""A list on disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from api.stow.spool import Spool

T = TypeVar("T")


class SpooledList(Generic[T]):
    """A list of items, each a line of JSON in a `Spool`.

    Can be iterated after the last `append`, repeatedly, but only one iteration at a time.
    """

    def __init__(self, folder: Path, memory_bytes: int, load: Callable[[Any], T]) -> None:
        """`load` converts a decoded JSON value into an item."""
        self.spool = Spool(folder, memory_bytes)
        self._load = load
        self._count = 0

    def append(self, item: T) -> None:
        """Append an item. Raises what `Spool` raises."""
        self.spool.write(orjson.dumps(item) + b"\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for line in self.spool.open():
            yield self._load(orjson.loads(line))
