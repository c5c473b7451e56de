"""Where one part waits until it is whole: in memory, and on disk beyond a threshold."""

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
from shared.runtime.disk import has_room


class Spool:
    """The bytes of one part, with their count and SHA-256.

    The file on disk has no name, so that nothing is left of it when the process is killed.
    Raises `StoreFull` when the spool's disk is full.
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
        """All bytes, without a copy of them in memory.

        What a scratch file raises within the context is taken for an error of the spool's disk.
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
        """From the start; valid until `close`."""
        if self._file is None:
            return io.BytesIO(self._in_memory())
        with _disk_errors(self._folder):
            self._file.seek(0)
        return self._file

    def growing(self) -> BinaryIO | None:
        """What is on disk of it so far, to be read while more is written; None while in memory.

        Valid until `close`. Of what is written later, `flush` says that it can be read.
        """
        if self._file is None:
            return None
        self.flush()
        return io.BufferedReader(_FromTheStart(self._file.fileno()))

    def flush(self) -> None:
        if self._file is not None:
            with _disk_errors(self._folder):
                self._file.flush()

    def _in_memory(self) -> bytes:
        """All of it as one object, which `BytesIO` shares rather than copies."""
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def scratch(self) -> BinaryIO:
        """Another nameless file on the spool's disk, for a dataset that has to be inflated."""
        with _disk_errors(self._folder):
            return tempfile.TemporaryFile(dir=self._folder)

    def close(self) -> None:
        if self._file is not None:
            # What is still buffered has nowhere to go on a full disk, and nobody needs it.
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


class _FromTheStart(io.RawIOBase):
    """Reads a file that another writes to, from a position of its own."""

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
            raise io.UnsupportedOperation("the end moves")
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count


def check_room(folder: Path, min_free_bytes: int) -> None:
    """Raises `StoreFull` where the spool's disk has less than that left."""
    with _disk_errors(folder):
        if not has_room(folder, min_free_bytes):
            raise StoreFull(
                f"the spool's disk at {folder} has less free than STOWGATE_MIN_FREE_BYTES, which "
                f"is {min_free_bytes}; free some space"
            )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"the spool's disk at {folder} is full") from error
        raise StoreUnavailable(f"the spool at {folder} cannot be used: {error.strerror}") from error
