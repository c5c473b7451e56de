"""An end to what takes too long, told from a thread of its own."""

import socket
import threading
import time
from contextlib import suppress
from typing import Protocol


class Cuttable(Protocol):
    def cut(self) -> None: ...


class Receiving:
    """What comes on `sock`, for the watchdog.

    Whoever reads from it is woken with an end, and can still send an answer. A read that goes on
    for `grace_seconds` all the same ends with the connection: OpenSSL returns from none while a
    peer sends what is no data, such as key updates (RFC 8446 4.6.3), and the kernel takes that
    until both directions are shut.
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
        # Not by `SSLSocket.shutdown`, behind which all that is sent goes out unencrypted.
        with suppress(OSError):
            socket.socket.shutdown(self._sock, how)


class Watchdog:
    """Ends reads that take too long, of any number of senders, from a thread of its own.

    A socket's time-out starts anew with every byte, so it does not end a sender that trickles.
    `cut` is called again and again, until `stop`.
    """

    def __init__(self) -> None:
        self._ends: dict[Cuttable, float] = {}
        self._lock = threading.Lock()
        self._running = False

    def watch(self, sender: Cuttable, end: float) -> None:
        """`sender` is to be through before `end`, by the monotonic clock."""
        with self._lock:
            if not self._running:
                threading.Thread(target=self._run, name="watchdog", daemon=True).start()
                self._running = True
            self._ends[sender] = end

    def stop(self, sender: Cuttable) -> None:
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
