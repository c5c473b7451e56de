"""Who may enter: the parts of it that need no process of their own."""

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

import api.wsgi
from api.app import SCOPES
from api.auth.basic import BasicUsers, User, parse_users, user_line
from api.auth.guard import Anyone, Caller, Scope, install
from api.auth.issuer_keys import FetchedKeys, parse_jwk_set, parse_keys
from api.auth.watched_file import Malformed, WatchedFile
from api.problems import TooBusy, Unauthorized, Unavailable
from api.problems import install as install_problems
from shared.config import load_settings
from shared.engines import open_engines

PASSWORD = "correct-horse-battery"
JOINING = 6
OTHER_PASSWORD = "battery-horse-correct"


@pytest.fixture(scope="module")
def line() -> str:
    return user_line("archive", [Scope.STORE, Scope.READ], PASSWORD, ["AE-1", "AE-2/w-9"])


def test_every_endpoint_has_been_given_a_scope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("STOWGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    settings = load_settings()
    engines = open_engines(settings)

    app = api.wsgi.compose(settings, engines, CollectorRegistry())

    engines.close()
    assert {rule.endpoint for rule in app.url_map.iter_rules()} == set(SCOPES)


def test_an_endpoint_without_a_scope_is_for_nobody() -> None:
    app = Flask(__name__, static_folder=None)
    install_problems(app)
    app.add_url_rule("/given", "given", lambda: "here")
    app.add_url_rule("/forgotten", "forgotten", lambda: "here")
    install(app, Anyone(), {"given": Scope.READ}, page_origins=())

    assert app.test_client().get("/given").status_code == 200
    assert app.test_client().get("/forgotten").status_code == 403


def test_a_line_is_a_caller_with_scopes_and_vaes(line: str) -> None:
    users = parse_users(f"# archives\n\n{line}\n")

    assert users["archive"].caller == Caller(
        "archive", frozenset({Scope.STORE, Scope.READ}), frozenset({"AE-1", "AE-2/w-9"})
    )
    assert PASSWORD not in line


def test_two_lines_of_one_password_differ(line: str) -> None:
    again = user_line("archive", [Scope.STORE, Scope.READ], PASSWORD, ["AE-1", "AE-2"])

    assert again != line


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda line: line.replace("scrypt", "plain"), "line 1 is not"),
        (lambda line: line.replace(":32768:", ":2:"), "line 1 is not"),
        (lambda line: line.replace("store,read", "store,everything"), "line 1 has a scope"),
        (lambda line: line.replace("store,read", ""), "line 1 is not"),
        (lambda line: line.replace("AE-1", "A E"), "line 1 has a binding that is none"),
        (lambda line: line.replace("/w-9", "/"), "line 1 has a binding that is none"),
        (lambda line: line.replace("/w-9", "/vae"), "line 1 has a binding that is none"),
        (lambda line: line.replace("/w-9", "/w-9/x"), "line 1 has a binding that is none"),
        (lambda line: f"{line}:", "line 1 is not"),
        (lambda line: line[:60], "line 1 is not"),
        (lambda line: f"{line}\n{line}", "line 2 is a second one"),
        (lambda line: f"#{line}", "no user"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, spoil: Any, words: str) -> None:
    with pytest.raises(Malformed, match=words) as caught:
        parse_users(spoil(line))

    assert line.split("$")[-1][:20] not in str(caught.value)


class Hashes:
    """Counts the hashes, and holds those of guesses back; what is a hash it does not decide."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self.guesses_go_on, self.rights_go_on = threading.Event(), threading.Event()
        self.rights_go_on.set()
        self._lock = threading.Lock()

    def check(self, password_hash: str, password: str) -> bool:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        is_guess = password.startswith("guess")
        (self.guesses_go_on if is_guess else self.rights_go_on).wait(60)
        with self._lock:
            self.at_once -= 1
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


WARD, ELSEWHERE = "10.0.0.7", "198.51.100.7"
HOUR = 3600.0


def given(name: str, password: str) -> Authorization:
    return Authorization("basic", {"username": name, "password": password})


def test_a_right_password_is_not_hashed_again_while_it_is_used(tmp_path: Path, line: str) -> None:
    hashes, clock = Hashes(), Clock()
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, clock, hashes.check)

    for _ in range(5):
        assert users.caller(given("archive", PASSWORD), WARD).name == "archive"
        clock.now += HOUR - 1
    assert len(hashes.done) == 1
    clock.now += 2
    users.caller(given("archive", PASSWORD), WARD)
    assert len(hashes.done) == 2


def test_a_wrong_password_is_never_remembered(tmp_path: Path, line: str) -> None:
    hashes = Hashes()
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, check=hashes.check)
    users.caller(given("archive", PASSWORD), WARD)

    for _ in range(3):
        with pytest.raises(Unauthorized):
            users.caller(given("archive", OTHER_PASSWORD), WARD)
    assert len(hashes.done) == 4


def test_an_unknown_user_costs_a_hash_of_the_same_method(tmp_path: Path, line: str) -> None:
    hashes = Hashes()
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, check=hashes.check)

    for name in ("archive", "nobody"):
        with pytest.raises(Unauthorized):
            users.caller(given(name, OTHER_PASSWORD), WARD)

    known, unknown = (password_hash.split("$") for password_hash in hashes.done)
    assert known[0] == unknown[0]
    assert list(map(len, known)) == list(map(len, unknown))


def test_a_user_whose_line_changed_is_not_remembered(tmp_path: Path, line: str) -> None:
    file = users_of(tmp_path, line)
    users = BasicUsers(file, 4, JOINING)
    users.caller(given("archive", PASSWORD), WARD)

    users_of(tmp_path, user_line("archive", [Scope.READ], OTHER_PASSWORD))

    with pytest.raises(Unauthorized):
        users.caller(given("archive", PASSWORD), WARD)
    assert users.caller(given("archive", OTHER_PASSWORD), WARD).scopes == {Scope.READ}


GUESSES_WAITING = 5


class Ward:
    """Users `archive` and `viewer`, who entered a while ago and are hashed again by now."""

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
        return self.users.caller(given(name, PASSWORD), WARD).name

    def guess(self, name: str, address: str) -> type[Exception]:
        with pytest.raises((Unauthorized, TooBusy)) as caught:
            self.users.caller(given(name, f"guess {next(self._guesses)}"), address)
        return caught.type

    @contextmanager
    def guessers(self, address: str, guessers: int = 12) -> Iterator[list[type[Exception]]]:
        """Of the name `archive`, those with a place until the block ends; then their outcomes."""
        outcomes: list[type[Exception]] = []
        with ThreadPoolExecutor(guessers) as pool:
            guesses = [pool.submit(self.guess, "archive", address) for _ in range(guessers)]
            try:
                wait_for(lambda: sum(done.done() for done in guesses) == guessers - GUESSES_WAITING)
                yield outcomes
            finally:
                self.hashes.guesses_go_on.set()
            outcomes += [guess.result() for guess in guesses]


@pytest.fixture
def ward(tmp_path: Path, line: str) -> Ward:
    return Ward(tmp_path, line)


def test_a_flood_of_guesses_is_bounded_in_places_and_in_hashes_at_a_time(ward: Ward) -> None:
    with ward.guessers(ELSEWHERE) as outcomes:
        pass

    assert (outcomes.count(TooBusy), outcomes.count(Unauthorized)) == (7, GUESSES_WAITING)
    assert ward.hashes.most_at_once == 2


def test_of_a_burst_with_one_password_it_is_checked_once(ward: Ward) -> None:
    """As when the uploads of a page come all at once, and nobody came before."""
    ward.hashes.rights_go_on.clear()
    with ThreadPoolExecutor(JOINING + 3) as pool:
        burst = [pool.submit(ward.enter, "archive") for _ in range(JOINING + 3)]
        wait_for(lambda: sum(done.done() for done in burst) == 2)
        ward.hashes.rights_go_on.set()
        outcomes = Counter(type(done.exception()) for done in burst)

    assert outcomes == {type(None): JOINING + 1, TooBusy: 2}
    assert len(ward.hashes.done) == 1


def test_a_burst_with_one_wrong_password_is_refused_by_one_check(ward: Ward) -> None:
    def wrong() -> None:
        ward.users.caller(given("archive", "guess"), ELSEWHERE)

    with ThreadPoolExecutor(JOINING + 1) as pool:
        burst = [pool.submit(wrong) for _ in range(JOINING + 1)]
        wait_for(lambda: ward.hashes.at_once == 1)
        ward.hashes.guesses_go_on.set()
        assert {type(done.exception()) for done in burst} == {Unauthorized}


def test_guessers_elsewhere_do_not_keep_a_sender_waiting_that_was_right_before(ward: Ward) -> None:
    with ward.guessers(ELSEWHERE):
        for name in ("archive", "viewer", "archive"):
            assert ward.enter(name) == name


def test_who_guesses_at_the_address_of_others_keeps_only_the_names_guessed_from_waiting(
    ward: Ward,
) -> None:
    ward.hashes.guesses_go_on.set()
    assert ward.guess("archive", WARD) is Unauthorized
    ward.hashes.guesses_go_on.clear()

    with ward.guessers(WARD):
        assert ward.enter("viewer") == "viewer"
        with pytest.raises(TooBusy):
            ward.enter("archive")


def test_one_sender_has_one_place_of_its_own_at_a_time(ward: Ward) -> None:
    with ThreadPoolExecutor(1) as pool, ward.guessers(ELSEWHERE):
        guess = pool.submit(ward.guess, "viewer", WARD)
        wait_for(lambda: ward.hashes.at_once == 3)

        with pytest.raises(TooBusy):
            ward.enter("viewer")
    assert guess.result() is Unauthorized


def test_a_name_that_was_never_right_has_no_place_of_its_own_whether_it_is_one_or_not(
    ward: Ward,
) -> None:
    with ward.guessers(ELSEWHERE):
        for name in ("archive", "nobody"):
            with pytest.raises(TooBusy):
                ward.users.caller(given(name, PASSWORD), "203.0.113.9")


def test_what_is_remembered_is_bounded(tmp_path: Path, line: str) -> None:
    hashes = Hashes()
    hashes.check = lambda *_: bool(hashes.done.append("") or True)  # type: ignore[method-assign]
    users = BasicUsers(users_of(tmp_path, line), 4, JOINING, check=hashes.check)
    for number in range(12_000):
        users.caller(given("archive", f"right {number}"), f"2001:db8::{number:x}")

    assert (len(users._verified), len(users._known)) == (1024, 10_000)
    users.caller(given("archive", "right 11999"), WARD)
    assert len(hashes.done) == 12_000
    users.caller(given("archive", "right 0"), WARD)
    assert len(hashes.done) == 12_001


RSA = rsa.generate_private_key(65537, 2048)
WEAK = rsa.generate_private_key(65537, 1024)
P256 = ec.generate_private_key(ec.SECP256R1())
K256 = ec.generate_private_key(ec.SECP256K1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk_set(*jwks: dict[str, Any]) -> bytes:
    return json.dumps({"keys": jwks}).encode()


def test_keys_of_a_set_are_good_for_the_algorithms_of_their_kind_only() -> None:
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
def test_a_key_that_must_not_verify_is_left_out(jwk: dict[str, Any]) -> None:
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


def test_keys_that_are_old_are_fetched_behind_the_answer() -> None:
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


def test_many_who_ask_at_once_are_one_fetch_and_few_of_them_wait() -> None:
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
def test_an_answer_that_is_no_set_keeps_the_keys_that_are_known(fault: str) -> None:
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
