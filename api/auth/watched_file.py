"""A file that is reloaded when it has changed."""

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
    """The text is not valid. The message does not repeat it."""


class WatchedFile(Generic[T]):
    """Keeps the parsed content of a file, and reloads it after a change.

    If a changed file is not usable, the last valid content stays in use and an error is logged.

    Args:
        path: The file.
        parse: Parses the text, and raises `Malformed`.
        variable: The setting that names the file, for errors.

    Raises:
        BadSetting: The file is not usable at start.
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
            raise BadSetting(f"{variable} is {str(path)!r}: {_words(error)}") from None

    def content(self) -> T:
        """Return the content, after reloading a changed file."""
        with self._lock:
            # Taken before reading, so that a change in between is seen next time.
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._content = self._read()
                except (OSError, Malformed) as error:
                    _log.error(
                        "could not reload the file; its last valid content stays in use",
                        setting=self._variable,
                        error=_words(error),
                    )
                else:
                    _log.info("file reloaded", setting=self._variable)
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
        return f"could not read the file: {error.strerror or type(error).__name__}"
    return str(error)
