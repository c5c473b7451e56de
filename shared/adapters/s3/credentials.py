"""Keys of the object store that end, or change, while a service runs."""

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

# Of their life, how much is left when keys are renewed, within these bounds.
_AHEAD_SHARE = 0.25
_MIN_AHEAD_SECONDS = 15.0
_MAX_AHEAD_SECONDS = 300.0
# Where the clocks differ so much that new keys seem to have ended already.
_MIN_LIFE_SECONDS = 60.0
_AGAIN_SECONDS = 10.0
_READ_AGAIN_SECONDS = 10.0

# What S3 says of keys that have ended, were changed or are not known; AccessDenied is all that the
# answer to a HEAD, which has no body, leaves.
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
    """Whether other keys may be answered otherwise."""
    return error.code in _REFUSED_KEYS


class RenewedCredentials(Provider):
    """Keys that are renewed ahead of their end, by one thread for all. Safe between threads.

    `fetch` returns keys, and raises `OSError`, `ValueError` or what urllib3 raises. Where it fails,
    those before are used for as long as they last. How long they last is counted from when they
    were fetched, so that a clock which is set later changes nothing.
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
        self._why = "never asked for"
        self._refused: Credentials | None = None
        self._refused_at = -math.inf

    def end(self) -> datetime | None:
        """When the keys that were fetched last expire; None if they do not."""
        ends = self._current.expiration if self._current else None
        return ends.replace(tzinfo=UTC) if ends else None

    def retrieve(self) -> Credentials:
        """The keys as they are. Raises `StoreUnavailable` where there are none that last."""
        moment = self._clock()
        # While another thread renews them, those that still last will do.
        if moment >= self._due_at and self._renewing.acquire(blocking=moment >= self._ends_at):
            try:
                if self._clock() >= self._due_at:
                    self._renew()
            finally:
                self._renewing.release()
        if self._current is None or self._clock() >= self._ends_at:
            raise StoreUnavailable(
                f"there are no keys for the object store: {self._why}; look at "
                "STOWGATE_OBJECT_STORE_CREDENTIALS and the service that gives them"
            )
        return self._current

    def renew(self, refused: Credentials) -> bool:
        """Fetch keys in place of those that the store refused; whether there are others now.

        Asks once for the same keys, and again after 10 seconds at the earliest, for all threads.
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
            # The texts of minio-py and urllib3 have URLs in them, and those a token.
            self._why = _words(error)
            self._due_at = moment + _AGAIN_SECONDS
            _log.warning("keys of the object store not renewed", error=self._why)
            return
        self._current = found
        if found.expiration is None:
            self._due_at, self._ends_at = moment + _READ_AGAIN_SECONDS, float("inf")
            return
        ends = found.expiration.replace(tzinfo=UTC)
        life_seconds = max(_MIN_LIFE_SECONDS, (ends - self._now()).total_seconds())
        ahead_seconds = _AHEAD_SHARE * life_seconds
        ahead_seconds = min(max(ahead_seconds, _MIN_AHEAD_SECONDS), _MAX_AHEAD_SECONDS)
        self._ends_at = moment + life_seconds
        self._due_at = self._ends_at - ahead_seconds
        _log.info("keys of the object store renewed", ends=ends.isoformat())


def static_credentials(
    access_key: Callable[[], str], secret_key: Callable[[], str], session_token: Callable[[], str]
) -> RenewedCredentials:
    """Keys from settings, whose files are read again every few seconds."""
    return RenewedCredentials(
        lambda: Credentials(access_key(), secret_key(), session_token() or None)
    )


def iam_credentials(
    http_client: urllib3.PoolManager, *, url: str | None, region: str
) -> RenewedCredentials:
    """Keys for a web identity, a container or an instance, as AWS_ variables say (IamAwsProvider).

    `url` is that of the STS or of the metadata service, in place of AWS's own.
    """

    def fetch() -> Credentials:
        # A new one each time: it keeps what it fetched until ten seconds before the end.
        provider = IamAwsProvider(custom_endpoint=url, http_client=http_client, region=region)
        found: Credentials = provider.retrieve()
        return found

    return RenewedCredentials(fetch)


class RenewingMinio(Minio):
    """Tries a request again, once, with other keys where the store refused those it had."""

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
        return f"the service that gives them answered HTTP {status[1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"the service that gives them did not answer as it should ({type(error).__name__})"
