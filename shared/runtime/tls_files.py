"""TLS from PEM files, which are reloaded for new connections when they have changed."""

import os
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from shared.settings.loader import BadSetting

_log = structlog.get_logger()


class TlsFiles:
    """Keeps the TLS context that `make` creates from files. Safe between threads.

    `make` raises `BadSetting` for unusable files. At the start the error passes through. Later the
    last context stays in use, and the log has the reason.
    """

    def __init__(self, files: Sequence[Path], make: Callable[[], ssl.SSLContext]) -> None:
        self._files = files
        self._make = make
        self._lock = threading.Lock()
        self._stamps = self._stamps_now()
        # Reading the authorities of the system takes time, and plain connections do not need them.
        self._context = make() if files else None

    def context(self) -> ssl.SSLContext:
        """Return the context for one new connection."""
        with self._lock:
            # Taken before reading, so that a change in between is seen next time.
            stamps = self._stamps_now()
            if self._context is None:
                self._context = self._make()
            elif stamps != self._stamps:
                self._stamps = stamps
                try:
                    self._context = self._make()
                except BadSetting as error:
                    _log.error(
                        "could not reload the TLS files; the last valid ones stay in use",
                        error=str(error),
                    )
                else:
                    _log.info("TLS files reloaded", files=[str(path) for path in self._files])
            return self._context

    def _stamps_now(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._files]


def client_tls(
    prefix: str, *, ca: Path | None, certificate: Path | None, key: Path | None
) -> TlsFiles:
    """Return the TLS of connections to a server, with a client certificate if there is one.

    Without `ca` the authorities of the system are trusted. `prefix` begins the names of the
    settings, such as `STOWGATE_BROKER_`. Raises `BadSetting` for unusable files.
    """

    def make() -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise BadSetting(
                f"{prefix}CA is '{ca}', but must be a PEM file of certificates: {_words(error)}"
            ) from error
        if certificate is not None and key is not None:
            try:
                context.load_cert_chain(certificate, key, password=_refuse_to_ask)
            except (OSError, ValueError) as error:
                raise BadSetting(
                    f"{prefix}CLIENT_CERTIFICATE is '{certificate}' and {prefix}CLIENT_KEY "
                    f"'{key}', but must be PEM files of a certificate and of its key, which is "
                    f"not encrypted: {_words(error)}"
                ) from error
        return context

    return TlsFiles([path for path in (ca, certificate, key) if path is not None], make)


def _refuse_to_ask() -> str:
    raise ValueError("the key is encrypted")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "no PEM"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
