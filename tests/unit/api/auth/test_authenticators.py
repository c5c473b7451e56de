"""Authentication, without a process of its own."""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from answering import Answering, serving
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flask import Flask
from issuer import Key, issuing
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from prometheus_client import CollectorRegistry
from service import wait_for
from werkzeug.datastructures import Authorization

import api.main
from api.auth.basic import BasicUsers, User, parse_users, user_line
from api.auth.guard import Caller, NoAuthentication, install
from api.auth.issuer_keys import FetchedKeys, parse_jwk_set, parse_keys
from api.auth.watched_file import Malformed, WatchedFile
from api.http.problems import TooBusy, Unauthorized, Unavailable
from api.http.problems import install as install_problems
from api.routes import SCOPES, Scope
from api.settings import ApiSettings
from shared.runtime.backends import open_backends
from shared.settings.loader import load

PASSWORD = "correct-horse-battery"
JOINING = 6
OTHER_PASSWORD = "battery-horse-correct"


@pytest.fixture(scope="module")
def line() -> str:
    return user_line("archive", [Scope.STORE, Scope.READ], PASSWORD, ["AE-1", "AE-2/w-9"])


def test_every_endpoint_has_a_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("STOWGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    settings = load(ApiSettings)
    backends = open_backends(settings, store_threads=4)

    app = api.main.compose(settings, backends, CollectorRegistry())

    backends.close()
    assert {rule.endpoint for rule in app.url_map.iter_rules()} == set(SCOPES)


def test_an_endpoint_without_a_scope_is_forbidden_for_all_callers() -> None:
    app = Flask(__name__, static_folder=None)
    install_problems(app)
    app.add_url_rule("/given", "given", lambda: "here")
    app.add_url_rule("/forgotten", "forgotten", lambda: "here")
    install(app, NoAuthentication(), {"given": Scope.READ}, page_origins=())

    assert app.test_client().get("/given").status_code == 200
    assert app.test_client().get("/forgotten").status_code == 403


def test_a_line_has_the_scopes_and_vaes_of_a_caller(line: str) -> None:
    users = parse_users(f"# archives\n\n{line}\n")

    assert users["archive"].caller == Caller(
        "archive", frozenset({Scope.STORE, Scope.READ}), frozenset({"AE-1", "AE-2/w-9"})
    )
    assert PASSWORD not in line


def test_two_lines_with_the_same_password_differ(line: str) -> None:
    again = user_line("archive", [Scope.STORE, Scope.READ], PASSWORD, ["AE-1", "AE-2"])

    assert again != line


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda line: line.replace("scrypt", "plain"), "line 1 is not"),
        (lambda line: line.replace(":32768:", ":2:"), "line 1 is not"),
        (lambda line: line.replace("store,read", "store,everything"), "line 1 has a scope"),
        (lambda line: line.replace("store,read", ""), "line 1 is not"),
        (lambda line: line.replace("AE-1", "A E"), "line 1 has an invalid binding"),
        (lambda line: line.replace("/w-9", "/"), "line 1 has an invalid binding"),
        (lambda line: line.replace("/w-9", "/vae"), "line 1 has an invalid binding"),
        (lambda line: line.replace("/w-9", "/w-9/x"), "line 1 has an invalid binding"),
        (lambda line: f"{line}:", "line 1 is not"),
        (lambda line: line[:60], "line 1 is not"),
        (lambda line: f"{line}\n{line}", "line 2 repeats a user name"),
        (lambda line: f"#{line}", "no user"),
    ],
)
def test_an_invalid_line_is_reported_by_its_number(line: str, spoil: Any, words: str) -> None:
    with pytest.raises(Malformed, match=words) as caught:
        parse_users(spoil(line))

    assert line.split("$")[-1][:20] not in str(caught.value)


class Hashes:
    """Counts password checks, and blocks those of guesses."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.concurrent = 0
        self.max_concurrent = 0
        self.release_guesses, self.release_correct = threading.Event(), threading.Event()
        self.release_correct.set()
        self._lock = threading.Lock()

    def check(self, password_hash: str, password: str) -> bool:
        with self._lock:
            self.concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self.concurrent)
        is_guess = password.startswith("guess")
        (self.release_guesses if is_guess else self.release_correct).wait(60)
        with self._lock:
            self.concurrent -= 1
            self.done.append(password_hash)
        return password == PASSWORD


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def users_of(tmp_path: Path, *lines: str) -> WatchedFile[Mapping[str, User]]:
    file = tmp_path / "users"
    file.write_text("\n".join(lines))
    return WatchedFile(file, parse_users, "STOWGATE_USERS")


ADDRESS, OTHER_ADDRESS = "10.0.0.7", "198.51.100.7"
HOUR = 3600.0


def given(name: str, password: str) -> Authorization:
    return Authorization("basic", {"username": name, "password": password})


def test_a_correct_password_is_not_hashed_again_while_it_is_in_use(
    tmp_path: Path, line: str
) -> None:
    hashes, clock = Hashes(), Clock()
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, clock, hashes.check)

    for _ in range(5):
        assert users.caller(given("archive", PASSWORD), ADDRESS).name == "archive"
        clock.now += HOUR - 1
    assert len(hashes.done) == 1
    clock.now += 2
    users.caller(given("archive", PASSWORD), ADDRESS)
    assert len(hashes.done) == 2


def test_a_wrong_password_is_never_cached(tmp_path: Path, line: str) -> None:
    hashes = Hashes()
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, check=hashes.check)
    users.caller(given("archive", PASSWORD), ADDRESS)

    for _ in range(3):
        with pytest.raises(Unauthorized):
            users.caller(given("archive", OTHER_PASSWORD), ADDRESS)
    assert len(hashes.done) == 4


def test_an_unknown_user_costs_the_same_hash_as_a_known_one(tmp_path: Path, line: str) -> None:
    hashes = Hashes()
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, check=hashes.check)

    for name in ("archive", "nobody"):
        with pytest.raises(Unauthorized):
            users.caller(given(name, OTHER_PASSWORD), ADDRESS)

    known, unknown = (password_hash.split("$") for password_hash in hashes.done)
    assert known[0] == unknown[0]
    assert list(map(len, known)) == list(map(len, unknown))


def test_a_changed_line_invalidates_the_cached_password(tmp_path: Path, line: str) -> None:
    file = users_of(tmp_path, line)
    users = BasicUsers(file, 4, JOINING)
    users.caller(given("archive", PASSWORD), ADDRESS)

    users_of(tmp_path, user_line("archive", [Scope.READ], OTHER_PASSWORD))

    with pytest.raises(Unauthorized):
        users.caller(given("archive", PASSWORD), ADDRESS)
    assert users.caller(given("archive", OTHER_PASSWORD), ADDRESS).scopes == {Scope.READ}


GUESSES_WAITING = 5


class KnownSenders:
    """Two known senders, `archive` and `viewer`, whose cached passwords have expired."""

    def __init__(self, tmp_path: Path, line: str) -> None:
        self.hashes, self._clock = Hashes(), Clock()
        self._guesses = count()
        lines = [line, line.replace("archive", "viewer", 1)]
        self.users = BasicUsers(
            users_of(tmp_path, *lines), 7, JOINING, self._clock, self.hashes.check
        )
        for name in ("archive", "viewer"):
            self.enter(name)
        self._clock.now += HOUR + 1
        self.hashes.done.clear()

    def enter(self, name: str) -> str | None:
        return self.users.caller(given(name, PASSWORD), ADDRESS).name

    def guess(self, name: str, address: str) -> type[Exception]:
        with pytest.raises((Unauthorized, TooBusy)) as caught:
            self.users.caller(given(name, f"guess {next(self._guesses)}"), address)
        return caught.type

    @contextmanager
    def guessers(self, address: str, guessers: int = 12) -> Iterator[list[type[Exception]]]:
        """Guess passwords of `archive`; yields the outcomes, which are complete after the block."""
        outcomes: list[type[Exception]] = []
        with ThreadPoolExecutor(guessers) as pool:
            guesses = [pool.submit(self.guess, "archive", address) for _ in range(guessers)]
            try:
                wait_for(lambda: sum(done.done() for done in guesses) == guessers - GUESSES_WAITING)
                yield outcomes
            finally:
                self.hashes.release_guesses.set()
            outcomes += [guess.result() for guess in guesses]


@pytest.fixture
def known(tmp_path: Path, line: str) -> KnownSenders:
    return KnownSenders(tmp_path, line)


def test_a_flood_of_guesses_is_limited_in_waiting_and_in_concurrent_hashes(
    known: KnownSenders,
) -> None:
    with known.guessers(OTHER_ADDRESS) as outcomes:
        pass

    assert (outcomes.count(TooBusy), outcomes.count(Unauthorized)) == (7, GUESSES_WAITING)
    assert known.hashes.max_concurrent == 2


def test_a_burst_with_one_password_is_checked_once(known: KnownSenders) -> None:
    """A page sends its first uploads in such a burst."""
    known.hashes.release_correct.clear()
    with ThreadPoolExecutor(JOINING + 3) as pool:
        burst = [pool.submit(known.enter, "archive") for _ in range(JOINING + 3)]
        wait_for(lambda: sum(done.done() for done in burst) == 2)
        known.hashes.release_correct.set()
        outcomes = Counter(type(done.exception()) for done in burst)

    assert outcomes == {type(None): JOINING + 1, TooBusy: 2}
    assert len(known.hashes.done) == 1


def test_a_burst_with_one_wrong_password_is_rejected_by_one_check(known: KnownSenders) -> None:
    def wrong() -> None:
        known.users.caller(given("archive", "guess"), OTHER_ADDRESS)

    with ThreadPoolExecutor(JOINING + 1) as pool:
        burst = [pool.submit(wrong) for _ in range(JOINING + 1)]
        wait_for(lambda: known.hashes.concurrent == 1)
        known.hashes.release_guesses.set()
        assert {type(done.exception()) for done in burst} == {Unauthorized}


def test_guesses_from_another_address_do_not_delay_a_known_sender(known: KnownSenders) -> None:
    with known.guessers(OTHER_ADDRESS):
        for name in ("archive", "viewer", "archive"):
            assert known.enter(name) == name


def test_guesses_from_the_same_address_delay_only_the_guessed_user(known: KnownSenders) -> None:
    known.hashes.release_guesses.set()
    assert known.guess("archive", ADDRESS) is Unauthorized
    known.hashes.release_guesses.clear()

    with known.guessers(ADDRESS):
        assert known.enter("viewer") == "viewer"
        with pytest.raises(TooBusy):
            known.enter("archive")


def test_a_known_sender_has_one_reserved_place(known: KnownSenders) -> None:
    with ThreadPoolExecutor(1) as pool, known.guessers(OTHER_ADDRESS):
        guess = pool.submit(known.guess, "viewer", ADDRESS)
        wait_for(lambda: known.hashes.concurrent == 3)

        with pytest.raises(TooBusy):
            known.enter("viewer")
    assert guess.result() is Unauthorized


def test_an_unknown_sender_has_no_reserved_place(known: KnownSenders) -> None:
    with known.guessers(OTHER_ADDRESS):
        for name in ("archive", "nobody"):
            with pytest.raises(TooBusy):
                known.users.caller(given(name, PASSWORD), "203.0.113.9")


def test_the_cache_is_bounded(tmp_path: Path, line: str) -> None:
    checked: list[str] = []

    def accept(_: str, password: str) -> bool:
        checked.append(password)
        return True

    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, check=accept)
    for number in range(12_000):
        users.caller(given("archive", f"right {number}"), f"2001:db8::{number:x}")

    assert (len(users._verified), len(users._known)) == (1024, 10_000)
    users.caller(given("archive", "right 11999"), ADDRESS)
    assert len(checked) == 12_000
    users.caller(given("archive", "right 0"), ADDRESS)
    assert len(checked) == 12_001


RSA = rsa.generate_private_key(65537, 2048)
WEAK = rsa.generate_private_key(65537, 1024)
P256 = ec.generate_private_key(ec.SECP256R1())
K256 = ec.generate_private_key(ec.SECP256K1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk_set(*jwks: dict[str, Any]) -> bytes:
    return json.dumps({"keys": jwks}).encode()


def test_a_key_verifies_only_the_algorithms_of_its_type() -> None:
    keys = parse_jwk_set(
        jwk_set(
            {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "any-rsa"},
            {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "ps", "alg": "PS256"},
            {**ECAlgorithm.to_jwk(P256.public_key(), as_dict=True), "kid": "ec"},
            {**OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True), "kid": "ed"},
        )
    )

    assert {key.kid: key.algorithms for key in keys} == {
        "any-rsa": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
        "ps": ("PS256",),
        "ec": ("ES256",),
        "ed": ("EdDSA",),
    }


@pytest.mark.parametrize(
    "jwk",
    [
        pytest.param({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}, id="shared-secret"),
        pytest.param(RSAAlgorithm.to_jwk(RSA, as_dict=True), id="private"),
        pytest.param(RSAAlgorithm.to_jwk(WEAK.public_key(), as_dict=True), id="weak"),
        pytest.param(ECAlgorithm.to_jwk(K256.public_key(), as_dict=True), id="curve"),
        pytest.param(
            {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "use": "enc"}, id="encryption"
        ),
        pytest.param(
            {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "alg": "ES256"}, id="lies"
        ),
        pytest.param(
            {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "alg": "HS256"}, id="confused"
        ),
        pytest.param({"kty": "RSA", "n": 7, "e": []}, id="numbers"),
        pytest.param({"kty": []}, id="kind"),
        pytest.param({}, id="empty"),
    ],
)
def test_an_unsuitable_key_is_ignored(jwk: dict[str, Any]) -> None:
    good = {**ECAlgorithm.to_jwk(P256.public_key(), as_dict=True), "kid": "good"}

    assert [key.kid for key in parse_jwk_set(jwk_set(jwk, good))] == ["good"]
    with pytest.raises(Malformed):
        parse_jwk_set(jwk_set(jwk))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"keys": 7}',
        '{"keys": [7]}',
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        WEAK.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
    ],
)
def test_a_file_without_a_usable_key_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        parse_keys(text)


def test_old_keys_are_refreshed_in_the_background() -> None:
    first, second = Key("first"), Key("second")
    clock = Clock()
    with issuing(first) as issuer:
        keys = FetchedKeys(issuer.url, 1, clock=clock)
        assert keys.find("first") is not None
        issuer.keys = [second]
        clock.now = 301.0

        assert keys.find("first") is not None
        wait_for(lambda: keys.find("first") is None)
        assert keys.find("second") is not None
        assert issuer.asked == 2


def test_keys_are_fetched_on_a_connection_of_their_own_each_time() -> None:
    """A firewall forgets one that idles for five minutes, and it would be used in vain."""
    addresses: list[object] = []
    keys_made = json.dumps({"keys": [Key("first").jwk()]}).encode()

    class KeepsConnections(Answering):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            addresses.append(self.client_address)
            self.answer(200, keys_made)

    with serving(KeepsConnections) as url:
        keys = FetchedKeys(url, 1)
        keys.ping()
        keys.ping()

    assert len(set(addresses)) == 2


def test_concurrent_requests_share_one_fetch_and_few_wait() -> None:
    with issuing(Key("first")) as issuer, ThreadPoolExecutor(10) as callers:
        issuer.goes_on.clear()
        keys = FetchedKeys(issuer.url, 3, wait_seconds=60)

        def find(_: int) -> bool:
            try:
                return keys.find("first") is not None
            except Unavailable:
                return False

        found = [callers.submit(find, number) for number in range(10)]
        wait_for(lambda: sum(answer.done() for answer in found) == 7)
        issuer.goes_on.set()

        assert [answer.result() for answer in found].count(True) == 3
        assert issuer.asked == 1


@pytest.mark.parametrize("fault", ["status", "empty", "long", "redirect"])
def test_an_invalid_response_of_the_issuer_keeps_the_known_keys(fault: str) -> None:
    key, clock = Key("first"), Clock()
    with issuing(key) as issuer:
        keys = FetchedKeys(issuer.url, 1, clock=clock)
        assert keys.find("first") is not None
        if fault == "empty":
            issuer.keys = []
        elif fault == "long":
            issuer.keys = [Key("x" * (1 << 20), key.private)]
        else:
            issuer.status = 302 if fault == "redirect" else 500
        clock.now = 10.0

        with pytest.raises(Unavailable, match="issuer"):
            keys.find("unknown")
        assert keys.find("first") is not None
