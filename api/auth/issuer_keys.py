"""The public keys of the tokens' issuer: a JWK Set (RFC 7517) by URL, or a file."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import orjson
import structlog
import urllib3
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWK, PyJWTError

from api.auth.watched_file import Malformed, WatchedFile
from api.http.problems import Unavailable
from shared.errors import Transient

_log = structlog.get_logger()

_RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

_MIN_RSA_BITS = 2048

_MIN_INTERVAL_SECONDS = 5.0
_MAX_WAIT_SECONDS = 4.0
_REFRESH_SECONDS = 300.0
_CONNECT_SECONDS = 2.0
_READ_SECONDS = 3.0
_MAX_BYTES = 1 << 20

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True)
class IssuerKey:
    """A public key. `kid` is None for a key without an id, which then verifies any token."""

    kid: str | None
    public_key: PublicKey
    algorithms: tuple[str, ...]


class IssuerKeys(Protocol):
    """The public keys of an issuer."""

    def find(self, kid: str | None) -> IssuerKey | None:
        """Return the key with that id; without an id, the only key. Raises `Unavailable`."""

    def ping(self) -> None:
        """Check that the keys are available. Raises `Transient`."""


class FileKeys:
    """Reads the keys from a file."""

    def __init__(self, file: WatchedFile[list[IssuerKey]]) -> None:
        self._file = file

    def find(self, kid: str | None) -> IssuerKey | None:
        return _find(self._file.content(), kid)

    def ping(self) -> None:
        pass


class _Fetch:
    def __init__(self, begun_at: float) -> None:
        self.begun_at = begun_at
        self.done = threading.Event()
        self.failed = True


class FetchedKeys:
    """Fetches the JWK Set at `url` when a key is unknown, and every five minutes.

    Fetches run in the background, at least five seconds apart. Requests with a known key never
    wait. After a failed fetch the known keys stay valid.

    Args:
        url: The URL of the JWK Set.
        max_waiting: The maximum number of requests that wait for a fetch.
        wait_seconds: How long a request waits for a fetch.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        max_waiting: int,
        *,
        wait_seconds: float = _MAX_WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._waiting = threading.BoundedSemaphore(max_waiting)
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: list[IssuerKey] = []
        self._fetched_at = float("-inf")
        self._fetch: _Fetch | None = None

    def find(self, kid: str | None) -> IssuerKey | None:
        found = _find(self._keys, kid)
        if found is None:
            self._wait_for(self._fetch_if_due())
            found = _find(self._keys, kid)
        elif self._clock() > self._fetched_at + _REFRESH_SECONDS:
            self._fetch_if_due()
        return found

    def ping(self) -> None:
        try:
            self._download()
        except (urllib3.exceptions.HTTPError, Malformed) as error:
            raise Transient(
                f"could not fetch the issuer's keys from {self._url}: {_words(error)}"
            ) from error

    def _fetch_if_due(self) -> _Fetch:
        """Return the latest fetch, which may have ended."""
        with self._lock:
            now = self._clock()
            if self._fetch is None or now >= self._fetch.begun_at + _MIN_INTERVAL_SECONDS:
                self._fetch = _Fetch(now)
                threading.Thread(
                    target=self._run, args=[self._fetch], name="issuer-keys", daemon=True
                ).start()
            return self._fetch

    def _wait_for(self, fetch: _Fetch) -> None:
        if not fetch.done.is_set():
            if not self._waiting.acquire(blocking=False):
                raise Unavailable("the issuer's keys are being fetched; send it again")
            try:
                fetch.done.wait(self._wait_seconds)
            finally:
                self._waiting.release()
        if fetch.failed:
            raise Unavailable(
                "the key of this token is unknown, and the issuer's keys could not be fetched; "
                "send it again later"
            )

    def _run(self, fetch: _Fetch) -> None:
        try:
            keys = self._download()
            with self._lock:
                # A fetch that hung may end after a later one.
                if self._fetch is fetch:
                    self._keys = keys
                    self._fetched_at = self._clock()
            fetch.failed = False
        except (urllib3.exceptions.HTTPError, Malformed) as error:
            _log.error(
                "could not fetch the issuer's keys; the known keys stay valid",
                setting="STOWGATE_JWT_KEYS",
                error=_words(error),
            )
        finally:
            fetch.done.set()

    def _download(self) -> list[IssuerKey]:
        # A pool of its own: until the next fetch, a firewall in between may have forgotten a
        # connection, and an issuer may have closed it.
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS)
        with urllib3.PoolManager(retries=False, timeout=timeout) as pool:
            return self._download_from(pool)

    def _download_from(self, pool: urllib3.PoolManager) -> list[IssuerKey]:
        end = time.monotonic() + _MAX_WAIT_SECONDS
        answer = pool.request("GET", self._url, preload_content=False, redirect=False)
        try:
            if answer.status != 200:
                raise Malformed(f"the issuer responded with status {answer.status}")
            text = bytearray()
            while data := answer.read1(1 << 16):
                text += data
                if len(text) > _MAX_BYTES or time.monotonic() > end:
                    raise Malformed("the issuer's response is too long or too slow")
        finally:
            answer.close()
        return parse_jwk_set(bytes(text))


def parse_keys(text: str) -> list[IssuerKey]:
    """Parse a public key in PEM, or a JWK Set. Raises `Malformed`."""
    if not text.lstrip().startswith("-----BEGIN"):
        return parse_jwk_set(text.encode())
    try:
        key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Malformed("the PEM file has no valid PUBLIC KEY") from error
    usable = _usable(None, key)
    if usable is None:
        raise Malformed(_NO_USABLE_KEY)
    return [usable]


_NO_USABLE_KEY = (
    f"no usable public key for signatures: use RSA with at least {_MIN_RSA_BITS} bits, EC on "
    "P-256, P-384 or P-521, or Ed25519"
)


def parse_jwk_set(text: bytes) -> list[IssuerKey]:
    """Return the public keys for signatures. Raises `Malformed` if there are none."""
    try:
        jwks = list(orjson.loads(text)["keys"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise Malformed("neither a PEM key nor a JWK Set") from error
    keys = [key for jwk in jwks if isinstance(jwk, dict) and (key := _parse_jwk(jwk))]
    if not keys:
        raise Malformed(_NO_USABLE_KEY)
    return keys


def _parse_jwk(jwk: dict[str, object]) -> IssuerKey | None:
    kid, algorithm = jwk.get("kid"), jwk.get("alg")
    if jwk.get("use", "sig") != "sig" or not isinstance(kid, str | None):
        return None
    try:
        usable = _usable(kid, PyJWK(jwk).key)
    except (PyJWTError, TypeError, ValueError):
        # A set may have keys of other purposes or of newer types.
        return None
    if usable is None or algorithm is None:
        return usable
    if algorithm not in usable.algorithms:
        return None
    return IssuerKey(kid, usable.public_key, (str(algorithm),))


def _usable(kid: str | None, key: object) -> IssuerKey | None:
    """None for a private, a shared or a weak key."""
    if isinstance(key, RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return IssuerKey(kid, key, _RSA_ALGORITHMS)
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return IssuerKey(kid, key, (_CURVES[key.curve.name],))
    if isinstance(key, Ed25519PublicKey):
        return IssuerKey(kid, key, ("EdDSA",))
    return None


def _find(keys: list[IssuerKey], kid: str | None) -> IssuerKey | None:
    if kid is None:
        return keys[0] if len(keys) == 1 else None
    named = [key for key in keys if key.kid == kid]
    unnamed = [key for key in keys if key.kid is None]
    return next(iter(named or unnamed), None)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, Malformed) else type(error).__name__
