"""An object store whose calls a test watches, delays or fails."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, Literal, get_args

from shared.ports import ListedObject, ObjectStore, StoredObject, Writing

Call = Literal[
    "prepare",
    "put",
    "begin",
    "create",
    "replace",
    "get",
    "read_range",
    "list",
    "folders",
    "delete",
    "check_room",
    "ping",
    "keeps_removed",
]

CALLS: tuple[Call, ...] = get_args(Call)

Hook = Callable[[str], object]
"""Gets the key of the call: the prefix of `list`, the first key of `delete`, or nothing."""


class ObservedStore:
    """Passes each call on to `store`, and calls the hooks for it. What a hook raises, the caller
    gets."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        before: Mapping[Call, Hook] | None = None,
        after: Mapping[Call, Hook] | None = None,
    ) -> None:
        """`after` is called when the call has ended, in success or failure; that of `list` is
        called with the key of each object instead."""
        self._store = store
        self._before = before or {}
        self._after = after or {}

    @contextmanager
    def _observed(self, call: Call, key: str = "") -> Iterator[None]:
        _run(self._before, call, key)
        try:
            yield
        finally:
            _run(self._after, call, key)

    def prepare(self) -> None:
        with self._observed("prepare"):
            self._store.prepare()

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,
        sha256: str | None = None,
    ) -> None:
        with self._observed("put", key):
            self._store.put(key, data, size_bytes, content_type, sha256)

    def begin(self, key: str, data: BinaryIO, content_type: str, most_bytes: int) -> Writing:
        with self._observed("begin", key):
            return self._store.begin(key, data, content_type, most_bytes)

    def create(self, key: str, data: bytes, content_type: str) -> str:
        with self._observed("create", key):
            return self._store.create(key, data, content_type)

    def replace(self, key: str, data: bytes, version: str, content_type: str) -> str:
        with self._observed("replace", key):
            return self._store.replace(key, data, version, content_type)

    def get(self, key: str) -> StoredObject:
        with self._observed("get", key):
            return self._store.get(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._observed("read_range", key):
            return self._store.read_range(key, start, length)

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        _run(self._before, "list", prefix)
        for found in self._store.list(prefix, after):
            _run(self._after, "list", found.key)
            yield found

    def folders(self, after: str) -> Iterator[str]:
        with self._observed("folders", after):
            return self._store.folders(after)

    def delete(self, keys: Iterable[str]) -> None:
        keys = [*keys]
        with self._observed("delete", keys[0] if keys else ""):
            self._store.delete(keys)

    def check_room(self) -> None:
        with self._observed("check_room"):
            self._store.check_room()

    def ping(self) -> None:
        with self._observed("ping"):
            self._store.ping()

    def keeps_removed(self) -> bool:
        with self._observed("keeps_removed"):
            return self._store.keeps_removed()


def _run(hooks: Mapping[Call, Hook], call: Call, key: str) -> None:
    hook = hooks.get(call)
    if hook is not None:
        hook(key)


def once(action: Callable[[], object]) -> Hook:
    """A hook that runs `action` at its first call only."""
    actions = [action]

    def hook(_: str) -> None:
        if actions:
            actions.pop()()

    return hook
