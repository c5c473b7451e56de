"""HTTP Basic authentication (RFC 7617) with a file of users."""

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from werkzeug.datastructures import Authorization
from werkzeug.security import check_password_hash, generate_password_hash

from api.auth.guard import BINDING_RULE, REALM, Caller, is_binding
from api.auth.watched_file import Malformed, WatchedFile
from api.http.problems import TooBusy, Unauthorized
from api.http.routes import Scope
from shared.ids import SOURCE_RULE, is_source

if TYPE_CHECKING:
    from collections.abc import Iterator

# Each attempt takes 32 MiB and some tenths of a second. All users have the same method, so that the
# time does not reveal whether a user exists.
_METHOD = "scrypt:32768:8:3"
_MAX_HASHES = 2
_MAX_RESERVED_HASHES = 1
_UNKNOWN_USER_HASH = f"{_METHOD}${'0' * 16}${'0' * 128}"

_MAX_VERIFIED = 1024
_VERIFIED_SECONDS = 3600.0
_MAX_KNOWN_SENDERS = 10_000

_CHALLENGE = {"WWW-Authenticate": f'Basic realm="{REALM}", charset="UTF-8"'}

_TOO_MANY = "too many concurrent password checks; send it again later"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
_LINE = re.compile(
    rf"(?P<name>{_NAME}):(?P<scopes>[a-z,]+):"
    rf"(?P<hash>{re.escape(_METHOD)}\$[A-Za-z0-9]+\$[0-9a-f]{{128}})"
    r"(?::(?P<vaes>[^:]*)(?::(?P<source>[^:]+))?)?"
)
LINE_RULE = "name:scopes:hash[:bindings[:source]], as `stowgate user` prints it"


@dataclass(frozen=True)
class User:
    """A line of the users file."""

    caller: Caller
    password_hash: str = field(repr=False)


def check_user(name: str, vaes: Iterable[str], source: str | None = None) -> None:
    """Check a user name, its bindings and its source. Raises `Malformed`."""
    if not re.fullmatch(_NAME, name):
        raise Malformed(
            f"{name!r} is not a valid user name: use 1 to 64 of A-Z a-z 0-9 . _ @ -, beginning "
            "with a letter or digit"
        )
    for binding in vaes:
        if not is_binding(binding):
            raise Malformed(f"{binding!r} is not a valid binding: {BINDING_RULE}")
    if source is not None and not is_source(source):
        raise Malformed(f"{source!r} is not a valid source: {SOURCE_RULE}")


def user_line(
    name: str,
    scopes: Iterable[Scope],
    password: str,
    vaes: Iterable[str] = (),
    source: str | None = None,
) -> str:
    """Return the line of a user that `check_user` has validated."""
    fields = [name, ",".join(scopes), generate_password_hash(password, _METHOD), ",".join(vaes)]
    return ":".join([*fields, source or ""]).rstrip(":")


def parse_users(text: str) -> Mapping[str, User]:
    """Parse the users by name. Skips empty lines and comments (#). Raises `Malformed`."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        # An empty binding allows no destination.
        if not found or (found["vaes"] == "" and found["source"] is None):
            raise Malformed(f"line {number} is not {LINE_RULE}")
        scopes = found["scopes"].split(",")
        if not set(scopes) <= set(Scope):
            raise Malformed(f"line {number} has a scope other than {', '.join(Scope)}")
        if found["name"] in users:
            raise Malformed(f"line {number} repeats a user name")
        vaes = frozenset(found["vaes"].split(",")) if found["vaes"] else None
        if not all(map(is_binding, vaes or ())):
            raise Malformed(f"line {number} has an invalid binding: {BINDING_RULE}")
        source = found["source"]
        if source is not None and not is_source(source):
            raise Malformed(f"line {number} has an invalid source: {SOURCE_RULE}")
        caller = Caller(found["name"], frozenset(map(Scope, scopes)), vaes, source)
        users[caller.name or ""] = User(caller, found["hash"])
    if not users:
        raise Malformed("the file has no users")
    return users


_Sender = tuple[str, str]
"""An address, and the user name in a request from there."""


@dataclass
class _Check:
    """The check of one user name and password, shared by all requests that have these."""

    user: User | None
    is_done: threading.Event = field(default_factory=threading.Event)
    is_right: bool | None = None
    """None until the check is done, and if too many checks were waiting."""


class BasicUsers:
    """Authenticates callers by user name and password.

    A correct password is cached, as an HMAC under a random key, until it is unused for an hour.

    A third of `max_waiting` is reserved for known senders, whose last password was correct, with
    one place each. So password guessing cannot delay a known sender, except from the same address
    with the same user name.

    Args:
        users: The users by name.
        max_waiting: The maximum number of requests that wait for a password hash.
        max_joining: The maximum number of further requests that wait for a check of the same user
            name and password, as senders send in bursts.
        clock: Returns monotonic seconds.
        check: Compares a password hash with a password.
    """

    scheme = "basic"

    def __init__(
        self,
        users: WatchedFile[Mapping[str, User]],
        max_waiting: int,
        max_joining: int,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[str, str], bool] = check_password_hash,
    ) -> None:
        self._users = users
        self._clock = clock
        self._check = check
        self._max_reserved = max_waiting // 3
        self._waiting = threading.BoundedSemaphore(max_waiting - self._max_reserved)
        self._hashing = threading.BoundedSemaphore(_MAX_HASHES)
        self._reserved_hashing = threading.BoundedSemaphore(_MAX_RESERVED_HASHES)
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._verified: OrderedDict[bytes, tuple[User, float]] = OrderedDict()
        self._known: OrderedDict[_Sender, None] = OrderedDict()
        self._reserved: set[_Sender] = set()
        self._joining = threading.BoundedSemaphore(max_joining)
        self._checks: dict[bytes, _Check] = {}

    def caller(self, given: Authorization | None, address: str) -> Caller:
        if given is None or given.type != self.scheme:
            raise Unauthorized("a user name and a password (HTTP Basic) are required", _CHALLENGE)
        if given.username is None:
            raise Unauthorized(
                "the user name and the password are not valid UTF-8 (RFC 7617); the client may "
                "use another character set, such as Latin-1: change the client, or use a "
                "password of ASCII characters",
                _CHALLENGE,
            )
        name, password = given.username or "", given.password or ""
        sender = (address, name)
        user = self._users.content().get(name)
        mark = hmac.digest(self._key, f"{name}:{password}".encode(), hashlib.sha256)
        if user is not None and self._remembers(mark, user):
            self._remember(mark, user, sender)
            return user.caller
        if not self._is_right(mark, user, password, sender) or user is None:
            self._forget(sender)
            raise Unauthorized("wrong user name or password", _CHALLENGE)
        self._remember(mark, user, sender)
        return user.caller

    def lacks(self, scope: Scope) -> dict[str, str]:  # noqa: ARG002
        return {}

    def ping(self) -> None:
        pass

    def _is_right(self, mark: bytes, user: User | None, password: str, sender: _Sender) -> bool:
        """Raises `TooBusy`."""
        with self._lock:
            check = self._checks.get(mark)
            # The line in the file may have changed since that check began.
            is_first = check is None or check.user != user
            if check is None or is_first:
                check = self._checks[mark] = _Check(user)
        if not is_first:
            return self._join(check)
        try:
            with self._turn(sender):
                # Another check may have finished just before this one began.
                check.is_right = (user is not None and self._remembers(mark, user)) or self._check(
                    user.password_hash if user else _UNKNOWN_USER_HASH, password
                )
        finally:
            with self._lock:
                if self._checks.get(mark) is check:
                    del self._checks[mark]
            check.is_done.set()
        return check.is_right

    def _join(self, check: _Check) -> bool:
        if not self._joining.acquire(blocking=False):
            raise TooBusy(_TOO_MANY)
        try:
            check.is_done.wait()
        finally:
            self._joining.release()
        if check.is_right is None:
            raise TooBusy(_TOO_MANY)
        return check.is_right

    @contextmanager
    def _turn(self, sender: _Sender) -> "Iterator[None]":
        if self._reserve(sender):
            try:
                with self._reserved_hashing:
                    yield
            finally:
                with self._lock:
                    self._reserved.remove(sender)
            return
        if not self._waiting.acquire(blocking=False):
            raise TooBusy(_TOO_MANY)
        try:
            with self._hashing:
                yield
        finally:
            self._waiting.release()

    def _reserve(self, sender: _Sender) -> bool:
        with self._lock:
            has_place = (
                sender in self._known
                and sender not in self._reserved
                and len(self._reserved) < self._max_reserved
            )
            if has_place:
                self._reserved.add(sender)
            return has_place

    def _remembers(self, mark: bytes, user: User) -> bool:
        with self._lock:
            known, until = self._verified.get(mark, (None, 0.0))
            # The line in the file may have changed since.
            return known == user and self._clock() < until

    def _remember(self, mark: bytes, user: User, sender: _Sender) -> None:
        with self._lock:
            self._verified[mark] = (user, self._clock() + _VERIFIED_SECONDS)
            self._verified.move_to_end(mark)
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.popitem(last=False)
            self._known[sender] = None
            self._known.move_to_end(sender)
            if len(self._known) > _MAX_KNOWN_SENDERS:
                self._known.popitem(last=False)

    def _forget(self, sender: _Sender) -> None:
        """A wrong password removes the sender from the known ones, as it may be a guess."""
        with self._lock:
            self._known.pop(sender, None)
