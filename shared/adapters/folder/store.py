"""The object store in a folder of one machine: the guarantees of S3, by means of POSIX.

Every object is written to `.tmp/`, made durable, and then moved to its name in one step. Names that
begin with a dot belong to the store. Every change of a name in the bucket holds one `flock`, which
the system releases when its process ends.

Two fsyncs make an object durable: of the file, and of its folder. New folders above were created
earlier, and a journal is written in order (ext4, XFS, Btrfs). A deleted object may reappear after a
power failure.
"""

import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import heapify, heappop
from pathlib import Path
from typing import BinaryIO

from shared.errors import (
    ObjectMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StowgateError,
    VersionConflict,
)
from shared.ports import ListedObject, StoredObject, Writing, check_key, check_prefix
from shared.runtime.disk import check_room, sync_folder

_PIECE_BYTES = 1024 * 1024
_LEFTOVER_SECONDS = 3600.0

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EACCES: "check the owner and mode of the folder",
    errno.EPERM: "the file system does not allow it; check the folder, and that its disk is local",
    errno.EROFS: "the file system is read-only; check its mount",
    errno.ENOENT: "the bucket does not exist; check STOWGATE_DATA, and that its disk is mounted",
    errno.ENOTDIR: "the key of an existing object is a prefix of this one; use another key",
    errno.EEXIST: "the key of an existing object is a prefix of this one; use another key",
    errno.EISDIR: "existing objects have keys that begin with this one and a slash",
}


class FolderObjectStore:
    """One bucket in the folder `root`. Safe between threads and between processes.

    `min_free_bytes` is the watermark: with less free space, `check_room` raises. Content types are
    not stored. A version is the SHA-256 of the object's bytes.
    """

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self._root = root
        self._min_free_bytes = min_free_bytes
        self._temporary = root / ".tmp"
        self._lock = root / ".lock"

    def prepare(self) -> None:
        """Create the bucket if it is missing, and remove temporary files of killed processes."""
        with self._typed("prepare the bucket"):
            if not self._root.is_dir():
                self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync_folder(self._root.parent)
            self._temporary.mkdir(exist_ok=True)
            self._lock.touch()
            sync_folder(self._root)
            now = time.time()
            for leftover in self._temporary.iterdir():
                with suppress(FileNotFoundError):  # moved or removed by another process
                    # A time in the future shows that a clock was ahead.
                    if abs(now - leftover.stat().st_mtime) > _LEFTOVER_SECONDS:
                        leftover.unlink()

    def put(
        self,
        key: str,
        data: BinaryIO,
        size_bytes: int,
        content_type: str,  # noqa: ARG002 - a file has none
        sha256: str | None = None,  # noqa: ARG002 - no network that could corrupt the data
    ) -> None:
        """Write `size_bytes` from `data`, all or nothing, over any existing object.

        Raises `ValueError` if `data` ends early. Errors of `data` pass through.
        """
        path = self._path(key)
        with self._written(_pieces(data, size_bytes), f"put {key}") as temporary:
            self._place(path, f"put {key}", lambda: temporary.move(path))

    def begin(self, key: str, data: BinaryIO, content_type: str, max_bytes: int) -> Writing:  # noqa: ARG002
        """Write only in `finish`: on one disk, an early start gains nothing."""
        check_key(key)
        return _PutAtTheEnd(lambda size_bytes: self.put(key, data, size_bytes, content_type))

    def create(
        self,
        key: str,
        data: bytes,
        content_type: str,  # noqa: ARG002 - a file has none
    ) -> str:
        """Write a new object, and return its version. Raises `VersionConflict`."""
        path = self._path(key)
        with self._written([data], f"create {key}") as temporary:
            is_ours = False

            def link() -> None:
                nonlocal is_ours
                try:
                    os.link(temporary.path, path)
                    is_ours = True
                except FileExistsError as error:
                    raise VersionConflict(f"{self._root}: {key} already exists") from error

            try:
                self._place(path, f"create {key}", link)
            except StowgateError as error:
                # The object is visible but not durable: a caller that checks must not find it.
                if is_ours:
                    try:
                        os.unlink(path)
                    except OSError:
                        raise StoreRefused(f"{error}, and {key} cannot be removed again") from error
                raise
        return _version(data)

    def replace(
        self,
        key: str,
        data: bytes,
        version: str,
        content_type: str,  # noqa: ARG002 - a file has none
    ) -> str:
        """Replace that version, and return the new one. Raises `VersionConflict`."""
        path = self._path(key)
        with self._written([data], f"replace {key}") as temporary:

            def swap() -> None:
                try:
                    found = _version(_read(path))
                except FileNotFoundError as error:
                    raise VersionConflict(f"{self._root}: {key} no longer exists") from error
                if found != version:
                    raise VersionConflict(f"{self._root}: {key} has a newer version")
                temporary.move(path)

            self._place(path, f"replace {key}", swap)
        return _version(data)

    def get(self, key: str) -> StoredObject:
        """Read a small object. Raises `ObjectMissing`."""
        with self._reading(key) as path:
            data = _read(path)
        return StoredObject(data, _version(data))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, fewer at the end. Raises `ObjectMissing`."""
        if start < 0 or length < 0:
            raise ValueError(f"invalid range: {length} bytes from {start}")
        with self._reading(key) as path, _opened(path) as file:
            return os.pread(file, length, start)

    def list(self, prefix: str, after: str = "") -> Iterator[ListedObject]:
        """Yield every object under `prefix` after `after`, in the byte order of keys, as S3 does.

        Reads the names of one folder at a time, and skips folders before `after`.
        """
        check_prefix(prefix)
        self._require_bucket(f"list {prefix!r}")
        return self._walk(prefix, after)

    def folders(self, after: str) -> Iterator[str]:
        """Yield the names of the top folders after `after`, in order."""
        self._require_bucket("list")
        with self._typed("list"):
            names = _names(self._root)
        folders = [name.removesuffix("/") for name in names if name.endswith("/")]
        return _in_order([name for name in folders if name > after])

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects and the folders that become empty; ignore missing objects."""
        failure: StowgateError | None = None
        for key in keys:
            try:
                self._delete(key)
            except StowgateError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _delete(self, key: str) -> None:
        path = self._path(key)
        nothing_there = suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError)
        with self._typed(f"delete {key}"), self._locked(), nothing_there:
            os.unlink(path)
            self._remove_empty_folders(key)

    def check_room(self) -> None:
        """Raise `StoreFull` if fewer than `min_free_bytes` are free for this user."""
        with self._typed("check the free space"):
            check_room(self._root, self._min_free_bytes)

    def ping(self) -> None:
        """Return if the bucket exists and is writable."""
        self._require_bucket("reach the bucket")
        if not os.access(self._temporary, os.W_OK | os.X_OK):
            raise StoreRefused(
                f"{self._root}: user {os.geteuid()} lacks write permission; check the owner and "
                "mode of the folder"
            )

    def keeps_removed(self) -> bool:
        """Return False: a folder has no versions."""
        return False

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._root}/{key}"

    def _require_bucket(self, doing: str) -> None:
        # An unmounted disk must not be mistaken for an empty bucket.
        with self._typed(doing):
            os.stat(self._temporary)

    @contextmanager
    def _typed(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{self._root}: cannot {doing}: {error.strerror}"
            if error.errno in _FULL:
                raise StoreFull(f"{what}; free some space or give the store more") from error
            if error.errno in _REFUSED:
                raise StoreRefused(f"{what}; {_REFUSED[error.errno]}") from error
            raise StoreUnavailable(f"{what}; check the disk and the system log") from error

    @contextmanager
    def _reading(self, key: str) -> Iterator[str]:
        path = self._path(key)
        with self._typed(f"read {key}"):
            try:
                yield path
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                self._require_bucket(f"read {key}")
                raise ObjectMissing(f"{self._root}: {key} does not exist") from error

    @contextmanager
    def _written(self, pieces: Iterable[bytes], doing: str) -> Iterator["_Temporary"]:
        """Yield a durable temporary file of the pieces, and remove it afterwards.

        Errors of the source of the pieces are not the store's, and pass through.
        """
        temporary = _Temporary(f"{self._temporary}/{uuid.uuid4().hex}")
        with self._typed(doing):
            file = os.open(temporary.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                for piece in pieces:
                    with self._typed(doing):
                        _write(file, piece)
                with self._typed(doing):
                    os.fsync(file)
            finally:
                os.close(file)
            yield temporary
        finally:
            if not temporary.has_moved:
                with suppress(OSError):  # `prepare` removes it later
                    os.unlink(temporary.path)

    def _place(self, path: str, doing: str, move: Callable[[], None]) -> None:
        folder = os.path.dirname(path)
        with self._typed(doing), self._locked():
            try:
                move()
            except FileNotFoundError:
                os.makedirs(folder, exist_ok=True)
                move()
        # If the folder is gone, the object has been deleted since.
        with self._typed(doing), suppress(FileNotFoundError):
            sync_folder(folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        file = os.open(self._lock, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _remove_empty_folders(self, key: str) -> None:
        """Remove the key's folder and its parents, as far as they are empty."""
        while folder := os.path.dirname(key):
            try:
                os.rmdir(f"{self._root}/{folder}")
            except OSError:  # not empty; an empty folder that remains does no harm
                break
            key = folder

    def _walk(self, folder: str, after: str) -> Iterator[ListedObject]:
        with self._typed(f"list {folder!r}"):
            names = _names(self._root / folder)
        if after:
            names = [n for n in names if folder + n > after or _is_above(folder + n, after)]
        for name in _in_order(names):
            key = folder + name
            if key.endswith("/"):
                yield from self._walk(key, after)
            else:
                try:
                    found = os.stat(self._root / key)
                except FileNotFoundError:  # deleted since
                    continue
                modified_at = datetime.fromtimestamp(found.st_mtime, UTC)
                yield ListedObject(key, found.st_size, modified_at)


@dataclass
class _Temporary:
    path: str
    has_moved: bool = False

    def move(self, path: str) -> None:
        os.replace(self.path, path)
        self.has_moved = True


@dataclass(frozen=True)
class _PutAtTheEnd:
    put: Callable[[int], None]
    has_failed: bool = False

    def proceed(self, size_bytes: int) -> None:
        pass

    def finish(self, size_bytes: int) -> None:
        self.put(size_bytes)

    def abandon(self) -> None:
        pass


def _names(folder: Path) -> list[str]:
    """Return the names in a folder; those of folders end with a `/`."""
    try:
        with os.scandir(folder) as entries:
            return [
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
                if not entry.name.startswith(".")
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_above(key: str, after: str) -> bool:
    return key.endswith("/") and after.startswith(key)


def _in_order(names: list[str]) -> Iterator[str]:
    """Yield the names in the order of S3; a heap avoids sorting all names for the first few.

    Code points sort like their UTF-8 bytes, and a folder with its `/` sorts like the keys below it.
    """
    heapify(names)
    while names:
        yield heappop(names)


def _pieces(data: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    missing = size_bytes
    while missing:
        piece = data.read(min(missing, _PIECE_BYTES))
        if not piece:
            raise ValueError(f"the data ended {missing} bytes short of {size_bytes}")
        missing -= len(piece)
        yield piece


@contextmanager
def _opened(path: str) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def _read(path: str) -> bytes:
    """Read a file without the further system calls of Python's file objects."""
    with _opened(path) as file:
        return b"".join(iter(lambda: os.read(file, _PIECE_BYTES), b""))


def _write(file: int, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(file, rest) :]


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
