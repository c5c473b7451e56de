"""Keys of the object store that expire, or change, while a service runs."""

import math
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import structlog
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import IamAwsProvider, Provider
from minio.error import S3Error
from urllib3.exceptions import HTTPError

from shared.errors import StoreUnavailable

_log = structlog.get_logger()

# Share of the lifetime of keys that is left when they are renewed, within these bounds.
_AHEAD_SHARE = 0.25
_MIN_AHEAD_SECONDS = 15.0
_MAX_AHEAD_SECONDS = 300.0
# Lifetime of new keys that seem to have expired already, because the clocks differ.
_MIN_LIFETIME_SECONDS = 60.0
_AGAIN_SECONDS = 10.0
_READ_AGAIN_SECONDS = 10.0

# The S3 error codes for expired, changed and unknown keys. minio-py reports AccessDenied for the
# answer to a HEAD, which has no body.
_REFUSED_KEYS = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "InvalidTokenId",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


def refuses_keys(error: S3Error) -> bool:
    """Check whether the same request may succeed with other keys."""
    return error.code in _REFUSED_KEYS


class RenewedCredentials(Provider):
    """Renews keys before they expire, in one thread for all callers. Safe between threads.

    `fetch` returns keys, and raises `OSError`, `ValueError` or what urllib3 raises. If it fails,
    the earlier keys are used until they expire. Their lifetime is measured from when they were
    fetched, so a later change of the clock has no effect.
    """

    def __init__(
        self,
        fetch: Callable[[], Credentials],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._now = now
        self._renewing = threading.Lock()
        self._current: Credentials | None = None
        self._due_at = self._ends_at = -math.inf
        self._why = "not fetched yet"
        self._refused: Credentials | None = None
        self._refused_at = -math.inf

    def end(self) -> datetime | None:
        """Return when the current keys expire; None if they do not."""
        ends = self._current.expiration if self._current else None
        return ends.replace(tzinfo=UTC) if ends else None

    def retrieve(self) -> Credentials:
        """Return valid keys. Raises `StoreUnavailable` if there are none."""
        moment = self._clock()
        # While another thread renews them, keys that have not expired are used.
        if moment >= self._due_at and self._renewing.acquire(blocking=moment >= self._ends_at):
            try:
                if self._clock() >= self._due_at:
                    self._renew()
            finally:
                self._renewing.release()
        if self._current is None or self._clock() >= self._ends_at:
            raise StoreUnavailable(
                f"there are no valid keys for the object store: {self._why}; check "
                "STOWGATE_OBJECT_STORE_CREDENTIALS and the service that issues the keys"
            )
        return self._current

    def renew(self, refused: Credentials) -> bool:
        """Replace keys that the store refused, and return whether there are other keys now.

        All threads together fetch once for the same refused keys, and again after 10 seconds.
        """
        with self._renewing:
            moment = self._clock()
            if self._current == refused and (
                refused != self._refused or moment - self._refused_at >= _AGAIN_SECONDS
            ):
                self._refused, self._refused_at = refused, moment
                self._renew()
            return self._current is not None and self._current != refused

    def _renew(self) -> None:
        moment = self._clock()
        try:
            found = self._fetch()
        except (HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # The texts of minio-py and urllib3 contain URLs, and those may contain a token.
            self._why = _words(error)
            self._due_at = moment + _AGAIN_SECONDS
            _log.warning("could not renew the keys of the object store", error=self._why)
            return
        self._current = found
        if found.expiration is None:
            self._due_at, self._ends_at = moment + _READ_AGAIN_SECONDS, float("inf")
            return
        ends = found.expiration.replace(tzinfo=UTC)
        lifetime_seconds = max(_MIN_LIFETIME_SECONDS, (ends - self._now()).total_seconds())
        ahead_seconds = _AHEAD_SHARE * lifetime_seconds
        ahead_seconds = min(max(ahead_seconds, _MIN_AHEAD_SECONDS), _MAX_AHEAD_SECONDS)
        self._ends_at = moment + lifetime_seconds
        self._due_at = self._ends_at - ahead_seconds
        _log.info("keys of the object store renewed", ends=ends.isoformat())


def static_credentials(
    access_key: Callable[[], str], secret_key: Callable[[], str], session_token: Callable[[], str]
) -> RenewedCredentials:
    """Return keys from settings, whose files are read again every few seconds."""
    return RenewedCredentials(
        lambda: Credentials(access_key(), secret_key(), session_token() or None)
    )


def iam_credentials(
    http_client: urllib3.PoolManager, *, url: str | None, region: str
) -> RenewedCredentials:
    """Return keys for a web identity, a container or an instance, by the AWS_ variables
    (`IamAwsProvider` of minio-py).

    `url` is the address of another STS or metadata service than that of AWS.
    """

    def fetch() -> Credentials:
        # A new provider each time: it caches its keys until ten seconds before they expire.
        provider = IamAwsProvider(custom_endpoint=url, http_client=http_client, region=region)
        found: Credentials = provider.retrieve()
        return found

    return RenewedCredentials(fetch)


class RenewingMinio(Minio):
    """Repeats a request once with other keys if the store refused the keys."""

    def _url_open(self, *given: Any, **named: Any) -> Any:
        provider = cast("RenewedCredentials", self._provider)
        used = provider.retrieve()
        try:
            return super()._url_open(*given, **named)
        except S3Error as error:
            if not refuses_keys(error) or not provider.renew(used):
                raise
        return super()._url_open(*given, **named)


def _words(error: Exception) -> str:
    status = re.search(r"HTTP status code (\d+)", str(error))
    if status:
        return f"the service that issues them answered HTTP {status[1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"the service that issues them gave no valid answer ({type(error).__name__})"
