"""A file of settings that is read again when it has changed."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from shared.settings.loader import BadSetting

_log = structlog.get_logger()

T = TypeVar("T")


class Malformed(ValueError):
    """What is wrong with the text, without repeating it."""


class WatchedFile(Generic[T]):
    """What `parse` makes of a file; it raises `Malformed`.

    Raises `BadSetting`, naming `variable`, where the file is unusable at first. Later the last
    good content stays, and the log tells.
    """

    def __init__(self, path: Path, parse: Callable[[str], T], variable: str) -> None:
        self._path = path
        self._parse = parse
        self._variable = variable
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        try:
            self._content = self._read()
        except (OSError, Malformed) as error:
            raise BadSetting(f"{variable} is {str(path)!r}, but {_words(error)}") from None

    def content(self) -> T:
        with self._lock:
            # Before it is read, so that a change in between is seen the next time.
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._content = self._read()
                except (OSError, Malformed) as error:
                    _log.error(
                        "file unusable; what it said before still holds",
                        setting=self._variable,
                        error=_words(error),
                    )
                else:
                    _log.info("file read again", setting=self._variable)
            return self._content

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _read(self) -> T:
        return self._parse(self._path.read_text("utf-8", errors="replace"))


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"that file cannot be read: {error.strerror or type(error).__name__}"
    return str(error)
