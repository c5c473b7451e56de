"""An end to what takes too long, told from a thread of its own."""

import socket
import threading
import time
from contextlib import suppress
from typing import Protocol


class Cuttable(Protocol):
    def cut(self) -> None: ...


def stop_receiving(sock: socket.socket) -> None:
    """Wake whoever reads from it with an end; an answer can still be sent.

    Not by `SSLSocket.shutdown`, behind which all that is sent goes out unencrypted.
    """
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RD)


class Hourglass:
    """Ends reads that take too long, of any number of senders, from a thread of its own.

    A socket's time-out starts anew with every byte, so it does not end a sender that trickles.
    `cut` is to call `stop_receiving`.
    """

    def __init__(self) -> None:
        self._ends: dict[Cuttable, float] = {}
        self._lock = threading.Lock()
        self._running = False

    def turn(self, sender: Cuttable, end: float) -> None:
        """`sender` is to be through before `end`, by the monotonic clock."""
        with self._lock:
            self._ends[sender] = end
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="hourglass", daemon=True).start()

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
