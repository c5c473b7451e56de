"""User names and passwords (HTTP Basic, RFC 7617), from a file with a line for each user."""

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

from api.auth.guard import BINDING_RULE, REALM, Caller, Scope, is_binding
from api.auth.watched_file import Malformed, WatchedFile
from api.problems import TooBusy, Unauthorized
from shared.ids import SOURCE_RULE, is_source

if TYPE_CHECKING:
    from collections.abc import Iterator

# 32 MiB and a few tenths of a second for each password that is tried. There is one method, so
# that every user, also one that does not exist, costs the same.
_METHOD = "scrypt:32768:8:3"
_AT_ONCE = 2
_OWN_AT_ONCE = 1
_NOBODY = f"{_METHOD}${'0' * 16}${'0' * 128}"

_REMEMBERED = 1024
_REMEMBERED_SECONDS = 3600.0
_SENDERS_KNOWN = 10_000

_CHALLENGE = {"WWW-Authenticate": f'Basic realm="{REALM}", charset="UTF-8"'}

_TOO_MANY = "too many passwords are being checked; send it again later"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
_LINE = re.compile(
    rf"(?P<name>{_NAME}):(?P<scopes>[a-z,]+):"
    rf"(?P<hash>{re.escape(_METHOD)}\$[A-Za-z0-9]+\$[0-9a-f]{{128}})"
    r"(?::(?P<vaes>[^:]*)(?::(?P<source>[^:]+))?)?"
)
LINE_RULE = "name:scopes:hash[:bindings[:source]], as `stowgate user` prints it"


@dataclass(frozen=True)
class User:
    caller: Caller
    password_hash: str = field(repr=False)


def check_user(name: str, vaes: Iterable[str], source: str | None = None) -> None:
    """Raises `Malformed` for a name, a binding or a source that is not valid."""
    if not re.fullmatch(_NAME, name):
        raise Malformed(
            f"{name!r} is no user name: one is 1 to 64 of A-Z a-z 0-9 . _ @ - and begins with a "
            "letter or digit"
        )
    for binding in vaes:
        if not is_binding(binding):
            raise Malformed(f"{binding!r} is no binding: {BINDING_RULE}")
    if source is not None and not is_source(source):
        raise Malformed(f"{source!r} is not a valid source: {SOURCE_RULE}")


def user_line(
    name: str,
    scopes: Iterable[Scope],
    password: str,
    vaes: Iterable[str] = (),
    source: str | None = None,
) -> str:
    """The line of a user that `check_user` has let pass."""
    fields = [name, ",".join(scopes), generate_password_hash(password, _METHOD), ",".join(vaes)]
    return ":".join([*fields, source or ""]).rstrip(":")


def parse_users(text: str) -> Mapping[str, User]:
    """By name. Empty lines and those that begin with # say nothing. Raises `Malformed`."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        # Nobody is let store anywhere because a binding is empty.
        if not found or (found["vaes"] == "" and found["source"] is None):
            raise Malformed(f"its line {number} is not {LINE_RULE}")
        scopes = found["scopes"].split(",")
        if not set(scopes) <= set(Scope):
            raise Malformed(f"its line {number} has a scope other than {', '.join(Scope)}")
        if found["name"] in users:
            raise Malformed(f"its line {number} is a second one of the same name")
        vaes = frozenset(found["vaes"].split(",")) if found["vaes"] else None
        if not all(map(is_binding, vaes or ())):
            raise Malformed(f"its line {number} has a binding that is none: {BINDING_RULE}")
        source = found["source"]
        if source is not None and not is_source(source):
            raise Malformed(f"its line {number} has a source that is not valid: {SOURCE_RULE}")
        caller = Caller(found["name"], frozenset(map(Scope, scopes)), vaes, source)
        users[caller.name or ""] = User(caller, found["hash"])
    if not users:
        raise Malformed("it has no user")
    return users


_Sender = tuple[str, str]
"""An address, and the user name that is given from there."""


@dataclass
class _Check:
    """One name and password that are being checked, for all requests that give these."""

    user: User | None
    is_done: threading.Event = field(default_factory=threading.Event)
    is_right: bool | None = None
    """None while it is not known, and where there was no place to find out."""


class BasicUsers:
    """Callers by user name and password.

    A password that was right is remembered, as an HMAC under a key of this object, until it was not
    used for an hour.

    `most_waiting` bounds the passwords that wait for a hash, so that some threads stay free. A
    third of these places is for senders whose last password was right, one for each at a time: so
    whoever guesses cannot keep them waiting, unless by their own address and name. Up to
    `most_joining` requests more wait for a check of the same name and password that is under way:
    senders come in bursts.
    """

    scheme = "basic"

    def __init__(
        self,
        users: WatchedFile[Mapping[str, User]],
        most_waiting: int,
        most_joining: int,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[str, str], bool] = check_password_hash,
    ) -> None:
        self._users = users
        self._clock = clock
        self._check = check
        self._most_own_places = most_waiting // 3
        self._waiting = threading.BoundedSemaphore(most_waiting - self._most_own_places)
        self._hashing = threading.BoundedSemaphore(_AT_ONCE)
        self._own_hashing = threading.BoundedSemaphore(_OWN_AT_ONCE)
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._verified: OrderedDict[bytes, tuple[User, float]] = OrderedDict()
        self._known: OrderedDict[_Sender, None] = OrderedDict()
        self._own_places: set[_Sender] = set()
        self._joining = threading.BoundedSemaphore(most_joining)
        self._checks: dict[bytes, _Check] = {}

    def caller(self, given: Authorization | None, address: str) -> Caller:
        if given is None or given.type != self.scheme:
            raise Unauthorized("this needs a user name and a password (HTTP Basic)", _CHALLENGE)
        if given.username is None:
            raise Unauthorized(
                "the user name and the password cannot be read: they must be UTF-8 (RFC 7617), and "
                "the client may have sent them in another character set, such as Latin-1; a "
                "password of ASCII characters is the same in all",
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
            raise Unauthorized("the user name or the password is wrong", _CHALLENGE)
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
            # A line that changed since is another user.
            is_first = check is None or check.user != user
            if check is None or is_first:
                check = self._checks[mark] = _Check(user)
        if not is_first:
            return self._joined(check)
        try:
            with self._turn(sender):
                # It may have been checked just before this began.
                check.is_right = (user is not None and self._remembers(mark, user)) or self._check(
                    user.password_hash if user else _NOBODY, password
                )
        finally:
            with self._lock:
                if self._checks.get(mark) is check:
                    del self._checks[mark]
            check.is_done.set()
        return check.is_right

    def _joined(self, check: _Check) -> bool:
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
        if self._takes_own_place(sender):
            try:
                with self._own_hashing:
                    yield
            finally:
                with self._lock:
                    self._own_places.remove(sender)
            return
        if not self._waiting.acquire(blocking=False):
            raise TooBusy(_TOO_MANY)
        try:
            with self._hashing:
                yield
        finally:
            self._waiting.release()

    def _takes_own_place(self, sender: _Sender) -> bool:
        with self._lock:
            has_one = (
                sender in self._known
                and sender not in self._own_places
                and len(self._own_places) < self._most_own_places
            )
            if has_one:
                self._own_places.add(sender)
            return has_one

    def _remembers(self, mark: bytes, user: User) -> bool:
        with self._lock:
            known, until = self._verified.get(mark, (None, 0.0))
            # A line that changed since is another user.
            return known == user and self._clock() < until

    def _remember(self, mark: bytes, user: User, sender: _Sender) -> None:
        with self._lock:
            self._verified[mark] = (user, self._clock() + _REMEMBERED_SECONDS)
            self._verified.move_to_end(mark)
            if len(self._verified) > _REMEMBERED:
                self._verified.popitem(last=False)
            self._known[sender] = None
            self._known.move_to_end(sender)
            if len(self._known) > _SENDERS_KNOWN:
                self._known.popitem(last=False)

    def _forget(self, sender: _Sender) -> None:
        """Who guesses in the place of a sender that is known is one that is not."""
        with self._lock:
            self._known.pop(sender, None)
