"""Buffering of one part until it is complete, in memory or on disk."""

import errno
import hashlib
import io
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from shared.errors import StoreFull, StoreUnavailable
from shared.runtime import disk


class Spool:
    """Buffers the bytes of one part, with their size and SHA-256.

    The file on disk has no name, so that a killed process leaves no file.

    Args:
        folder: The spool folder.
        memory_bytes: The size up to which the part stays in memory.

    Raises:
        StoreFull: The spool's disk is full.
        StoreUnavailable: The spool's disk failed.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._pieces: list[bytes] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self.size_bytes += len(data)
        if self._file is None and self.size_bytes <= self._memory_bytes:
            self._pieces.append(data)
            return
        with _disk_errors(self._folder):
            if self._file is None:
                self._file = self.scratch()
                self._file.writelines(self._pieces)
                self._pieces.clear()
            self._file.write(data)

    @contextmanager
    def view(self) -> Iterator[memoryview | mmap.mmap]:
        """Map all bytes, without copying them.

        An `OSError` within the context, as of a scratch file, counts as an error of the spool.
        """
        with _disk_errors(self._folder):
            if self._file is None:
                with memoryview(self._in_memory()) as view:
                    yield view
                return
            self._file.flush()
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped

    def open(self) -> BinaryIO:
        """Open the bytes for reading; valid until `close`."""
        if self._file is None:
            return io.BytesIO(self._in_memory())
        with _disk_errors(self._folder):
            self._file.seek(0)
        return self._file

    def growing(self) -> BinaryIO | None:
        """Open the file on disk for reading while more is written; None while in memory.

        Valid until `close`. Data that is written later can be read after `flush`.
        """
        if self._file is None:
            return None
        self.flush()
        return io.BufferedReader(_IndependentReader(self._file.fileno()))

    def flush(self) -> None:
        if self._file is not None:
            with _disk_errors(self._folder):
                self._file.flush()

    def _in_memory(self) -> bytes:
        """Join the pieces into one object, which `BytesIO` shares instead of copying."""
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def scratch(self) -> BinaryIO:
        """Create another file without a name, for a dataset that has to be inflated."""
        with _disk_errors(self._folder):
            return tempfile.TemporaryFile(dir=self._folder)

    def close(self) -> None:
        if self._file is not None:
            # On a full disk, closing cannot write the buffer, which is no longer needed.
            with suppress(OSError):
                self._file.close()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _IndependentReader(io.RawIOBase):
    """Reads a file from its own position while the spool writes to it."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._descriptor = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("the file is still growing")
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count


def check_room(folder: Path, min_free_bytes: int) -> None:
    """Check the free space of the spool's disk. Raises `StoreFull` and `StoreUnavailable`."""
    with _disk_errors(folder):
        disk.check_room(folder, min_free_bytes)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"the spool's disk at {folder} is full") from error
        raise StoreUnavailable(f"the spool at {folder} failed: {error.strerror}") from error
