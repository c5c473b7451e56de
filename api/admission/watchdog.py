"""Ends reads that exceed their deadline."""

import socket
import threading
import time
from contextlib import suppress
from typing import Protocol


class Cuttable(Protocol):
    def cut(self) -> None: ...


class Receiving:
    """The receiving side of a connection, which the watchdog can shut down.

    The read then ends, and the response can still be sent. If the read has not ended after
    `grace_seconds`, both directions are shut down: OpenSSL does not return from a read while the
    peer sends records without data, such as key updates (RFC 8446 4.6.3), and the kernel accepts
    these until then.
    """

    def __init__(self, sock: socket.socket, grace_seconds: float = 2.0) -> None:
        self._sock = sock
        self._grace_seconds = grace_seconds
        self._hang_up_at: float | None = None

    def cut(self) -> None:
        now = time.monotonic()
        if self._hang_up_at is None:
            self._hang_up_at = now + self._grace_seconds
        how = socket.SHUT_RDWR if now >= self._hang_up_at else socket.SHUT_RD
        # After `SSLSocket.shutdown` the response would be sent unencrypted.
        with suppress(OSError):
            socket.socket.shutdown(self._sock, how)


class Watchdog:
    """Ends reads that exceed their deadline, in a background thread.

    A socket's timeout restarts with every byte, so it does not end a sender that trickles. The
    watchdog calls `cut` repeatedly until `stop`.
    """

    def __init__(self) -> None:
        self._ends: dict[Cuttable, float] = {}
        self._lock = threading.Lock()
        self._running = False

    def watch(self, sender: Cuttable, end: float) -> None:
        """Cut `sender` unless `stop` is called before `end`, by the monotonic clock."""
        with self._lock:
            if not self._running:
                threading.Thread(target=self._run, name="watchdog", daemon=True).start()
                self._running = True
            self._ends[sender] = end

    def stop(self, sender: Cuttable) -> None:
        """Stop watching `sender`."""
        with self._lock:
            self._ends.pop(sender, None)

    def _run(self) -> None:
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            with self._lock:
                late = [sender for sender, end in self._ends.items() if end < now]
            for sender in late:
                sender.cut()
