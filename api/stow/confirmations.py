"""Confirms new records to the sweep soon after they are written, one or several at once.

No request waits for it, as the record is durable without a confirmation. With it, the sweep can
detect a later loss of records (docs/decisions/0007).
"""

import threading
import time
from collections.abc import Callable

import structlog

from shared.errors import StowgateError
from shared.runtime.logs import where

_log = structlog.get_logger()

# Long enough not to compete with the worker that opens the payload.
_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 60.0


class Confirmations:
    def __init__(self, confirm: Callable[[], None], pause_seconds: float = _PAUSE_SECONDS) -> None:
        """`confirm` is called in its own thread, `pause_seconds` after a record."""
        self._confirm = confirm
        self._first_pause_seconds = pause_seconds
        self._recorded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="confirm", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def recorded(self) -> None:
        """Request a confirmation of a new record. Safe between threads; does not wait."""
        self._recorded.set()

    def _run(self) -> None:
        pause_seconds = self._first_pause_seconds
        while True:
            self._recorded.wait()
            time.sleep(pause_seconds)
            # Later records are confirmed the next time.
            self._recorded.clear()
            pause_seconds = self._first_pause_seconds if self._confirms() else 2 * pause_seconds
            pause_seconds = min(pause_seconds, _MAX_PAUSE_SECONDS)

    def _confirms(self) -> bool:
        try:
            self._confirm()
        except StowgateError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001
            # Nobody would notice the end of this thread.
            reason = f"{type(error).__name__} at {where(error)}"
        else:
            return True
        self._recorded.set()
        _log.warning("new records are not confirmed to the sweep yet; trying again", error=reason)
        return False
