"""A TCP proxy that fails when it is told to, so that a test meets its moment from outside."""

import re
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST and forget what was not sent
_PIECE_BYTES = 1 << 16
# A pattern may begin in one piece and end in the next.
_OVERLAP_BYTES = 512

_DEFAULT_PORTS = {"amqp": 5672, "http": 80}

_State = Literal["pass", "cut", "black hole", "swallow"]


class Hold:
    """The first request that matches, or its answer, stopped on its way."""

    def __init__(self, pattern: bytes, *, answer: bool) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)
        self.answer = answer
        self._matched = threading.Event()
        self._reached = threading.Event()
        self._over = threading.Event()
        self._dropped = False

    def wait_reached(self, seconds: float = 30.0) -> None:
        assert self._reached.wait(seconds), f"nothing like {self.pattern.pattern!r} came along"

    def release(self) -> None:
        """Let it go on."""
        self._over.set()

    def drop(self) -> None:
        """Lose it, and the connection that it came on."""
        self._dropped = True
        self._over.set()

    def matches(self, window: bytes) -> bool:
        if self._matched.is_set() or not self.pattern.search(window):
            return False
        self._matched.set()
        return True

    def stop_here(self) -> bool:
        """Wait for the end of the hold; whether to go on."""
        self._reached.set()
        self._over.wait()
        return not self._dropped


@dataclass(eq=False)
class _Link:
    """One connection of a client, and the one made for it."""

    client: socket.socket
    upstream: socket.socket
    answers: list[Hold] = field(default_factory=list)
    forgotten: bool = False

    def reset(self) -> None:
        for end in (self.client, self.upstream):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Passes everything on to the host of `url`, from a port of its own, until it is told
    otherwise. Its own `url` is that one with this port.

    With `tls` it speaks TLS with its clients. Another context is for the connections that come
    after it was set.
    """

    def __init__(
        self, url: str, *, tls: ssl.SSLContext | None = None, keeps_requests: bool = False
    ) -> None:
        """With `keeps_requests`, `asked` has all that clients have sent."""
        upstream = urlsplit(url)
        self._target = (upstream.hostname or "", upstream.port or _DEFAULT_PORTS[upstream.scheme])
        self.tls = tls
        self.accepted = 0
        self.asked = bytearray()
        self._keeps_requests = keeps_requests
        self._answers_may_pass = threading.Event()
        self._answers_may_pass.set()
        self._loses_answers = False
        self._state: _State = "pass"
        self._delay_seconds = 0.0
        self._bytes_per_second: float | None = None
        self._line = threading.Lock()
        self._free_at = 0.0
        self._changed = threading.Condition()
        self._links: set[_Link] = set()
        self._holds: list[Hold] = []
        self._refused: re.Pattern[bytes] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = self._listener.getsockname()[1]
        login, at, _ = upstream.netloc.rpartition("@")
        scheme = f"{upstream.scheme}s" if tls else upstream.scheme
        self.url = upstream._replace(scheme=scheme, netloc=f"{login}{at}127.0.0.1:{port}").geturl()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def heal(self) -> None:
        """Pass everything again; what a black hole has kept so far goes on."""
        self._become("pass")

    def cut(self) -> None:
        """Reset every connection, and each new one at once."""
        self._become("cut")
        self.reset()

    def reset(self) -> None:
        """Reset the connections that there are; new ones pass."""
        for link in self._all_links():
            link.reset()

    def black_hole(self) -> None:
        """Take connections and bytes, and pass nothing on."""
        self._become("black hole")

    def swallow(self) -> None:
        """Lose what comes on all connections; those that come after `heal` pass."""
        self._become("swallow")
        self.forget()

    def delay(self, seconds: float) -> None:
        """Each piece waits so long before it goes on."""
        self._delay_seconds = seconds

    def slow_down(self, bytes_per_second: float | None) -> None:
        """All that clients send shares a line of that rate; None to end that."""
        self._bytes_per_second = bytes_per_second

    def forget(self) -> None:
        """Lose what comes on the connections that there are, as a firewall does that forgot them;
        new ones pass."""
        for link in self._all_links():
            link.forgotten = True

    def hold_answers(self) -> None:
        """Keep all that comes back, until `release_answers`."""
        self._answers_may_pass.clear()

    def release_answers(self) -> None:
        self._answers_may_pass.set()

    def lose_answers(self, loses: bool) -> None:
        """Lose what comes back, while the connections stay."""
        self._loses_answers = loses

    def tell_clients(self, data: bytes) -> None:
        """Send that to each client, as if it came from where it is connected to."""
        for link in self._all_links():
            link.client.sendall(data)

    def hold(self, pattern: bytes) -> Hold:
        """Stop the first request that matches, on its way there."""
        return self._add(Hold(pattern, answer=False))

    def hold_answer(self, pattern: bytes) -> Hold:
        """Let the first request that matches go there, and stop what comes back."""
        return self._add(Hold(pattern, answer=True))

    def refuse(self, pattern: bytes | None) -> None:
        """Reset connections on which a request matches; None to end that."""
        self._refused = re.compile(pattern, re.DOTALL) if pattern else None

    def close(self) -> None:
        self._become("cut")
        self.release_answers()
        for hold in self._holds:
            hold.drop()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _add(self, hold: Hold) -> Hold:
        with self._changed:
            self._holds.append(hold)
        return hold

    def _become(self, state: _State) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _all_links(self) -> list[_Link]:
        with self._changed:
            return list(self._links)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            self._until_passing()
            if self.tls is not None:
                client = self.tls.wrap_socket(client, server_side=True)
            upstream = socket.create_connection(self._target, timeout=10)
        except OSError:
            with suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        for end in (client, upstream):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            link = _Link(client, upstream, forgotten=self._state == "swallow")
            self._links.add(link)
        back = threading.Thread(
            target=self._pump, args=[link, upstream, client, False], daemon=True
        )
        back.start()
        self._pump(link, client, upstream, True)
        back.join()
        link.reset()
        with self._changed:
            self._links.discard(link)

    def _queue(self, seconds: float) -> float:
        """How long a piece takes to get over the line, behind those that came before it."""
        with self._line:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + seconds
            return self._free_at - now

    def _until_passing(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._state != "black hole")
            if self._state == "cut":
                raise ConnectionResetError

    def _pump(
        self, link: _Link, source: socket.socket, target: socket.socket, asking: bool
    ) -> None:
        window = b""
        try:
            while piece := source.recv(_PIECE_BYTES):
                window = window[-_OVERLAP_BYTES:] + piece
                if not (self._may_ask(link, window) if asking else self._may_answer(link)):
                    raise ConnectionResetError
                if link.forgotten or (self._loses_answers and not asking):
                    continue
                if self._keeps_requests and asking:
                    self.asked += piece
                if self._delay_seconds:
                    time.sleep(self._delay_seconds)
                if asking and (bytes_per_second := self._bytes_per_second):
                    time.sleep(self._queue(len(piece) / bytes_per_second))
                self._until_passing()
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            link.reset()

    def _may_ask(self, link: _Link, window: bytes) -> bool:
        if self._refused is not None and self._refused.search(window):
            return False
        with self._changed:
            holds = list(self._holds)
        for hold in holds:
            if hold.matches(window):
                if hold.answer:
                    link.answers.append(hold)
                elif not hold.stop_here():
                    return False
        return True

    def _may_answer(self, link: _Link) -> bool:
        self._answers_may_pass.wait()
        return all(hold.stop_here() for hold in link.answers)
