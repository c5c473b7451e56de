"""Keys of the object store that end or change while a service runs."""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from answering import serving
from credentials_service import CredentialsService
from engines import ObjectStoreEndpoint
from minio import MinioAdmin
from minio.credentials.credentials import Credentials
from minio.credentials.providers import AssumeRoleProvider, StaticProvider
from minio.error import MinioAdminException
from service import wait_for
from structlog.testing import capture_logs

from shared.adapters.s3.credentials import RenewedCredentials
from shared.adapters.s3.store import MinioObjectStore
from shared.errors import StoreRefused, StoreUnavailable
from shared.runtime.backends import open_stores
from shared.settings.loader import BadSetting, load
from shared.settings.services import CommonSettings

START = datetime(2026, 3, 1, tzinfo=UTC)
MIB = 1 << 20


class Clocks:
    """Our own, and the time since the start."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


class Source:
    """Keys that are numbered, and last for `life` by a clock that is `ahead` of ours."""

    def __init__(self, clocks: Clocks, life: float, ahead: float = 0.0) -> None:
        self._clocks = clocks
        self._life = timedelta(seconds=life + ahead)
        self.fetched = 0
        self.failure: Exception | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def fetch(self) -> Credentials:
        self.fetched += 1
        number = self.fetched
        self.may_go_on.wait(30)
        if self.failure is not None:
            raise self.failure
        return Credentials(f"key-{number}", "secret", "token", self._clocks.now() + self._life)


def renewed(source: Source, clocks: Clocks) -> RenewedCredentials:
    return RenewedCredentials(source.fetch, clock=clocks.monotonic, now=clocks.now)


def test_keys_are_renewed_before_they_expire_by_one_thread_while_others_continue() -> None:
    clocks = Clocks()
    source = Source(clocks, life=3600)
    credentials = renewed(source, clocks)
    assert credentials.retrieve().access_key == "key-1"
    clocks.seconds = 3600 - 301
    assert credentials.retrieve().access_key == "key-1"

    clocks.seconds = 3600 - 200
    source.may_go_on.clear()
    with ThreadPoolExecutor(16) as threads:
        renewing = threads.submit(credentials.retrieve)
        wait_for(lambda: source.fetched == 2)
        others = [threads.submit(credentials.retrieve) for _ in range(15)]
        assert {other.result(30).access_key for other in others} == {"key-1"}
        source.may_go_on.set()
        assert renewing.result(30).access_key == "key-2"
    assert credentials.retrieve().access_key == "key-2"
    assert source.fetched == 2


def test_first_keys_are_fetched_once_for_all_threads() -> None:
    clocks = Clocks()
    source = Source(clocks, life=3600)
    credentials = renewed(source, clocks)
    source.may_go_on.clear()
    with ThreadPoolExecutor(16) as threads:
        asking = [threads.submit(credentials.retrieve) for _ in range(16)]
        wait_for(lambda: source.fetched)
        source.may_go_on.set()
        assert {asked.result(30).access_key for asked in asking} == {"key-1"}
    assert source.fetched == 1


@pytest.mark.parametrize("ahead", [-7200.0, 7200.0])
def test_a_wrong_clock_causes_no_repeated_fetches_and_no_expired_keys(ahead: float) -> None:
    clocks = Clocks()
    source = Source(clocks, life=3600, ahead=ahead)
    credentials = renewed(source, clocks)
    for _ in range(600):
        credentials.retrieve()
        clocks.seconds += 1
    # Keys that seem to have ended count as valid for a minute.
    assert source.fetched == (1 if ahead > 0 else 14)
    refused = credentials.retrieve()
    clocks.seconds += 1
    assert credentials.renew(refused)
    assert credentials.retrieve() != refused


def test_keys_that_have_not_expired_are_used_while_no_others_can_be_fetched() -> None:
    clocks = Clocks()
    source = Source(clocks, life=3600)
    credentials = renewed(source, clocks)
    credentials.retrieve()
    source.failure = ValueError(
        "https://sts/?WebIdentityToken=hidden failed with HTTP status code 403"
    )
    clocks.seconds = 3500
    with capture_logs() as logged:
        for _ in range(50):
            assert credentials.retrieve().access_key == "key-1"
    assert source.fetched == 2
    assert "hidden" not in str(logged)
    clocks.seconds = 3601
    for _ in range(50):
        with pytest.raises(StoreUnavailable, match="answered HTTP 403") as caught:
            credentials.retrieve()
        assert "hidden" not in str(caught.value)
    assert source.fetched == 3
    source.failure = None
    clocks.seconds = 3612
    assert credentials.retrieve().access_key == "key-4"


def test_refused_keys_are_replaced_once_for_all_threads() -> None:
    clocks = Clocks()
    source = Source(clocks, life=3600)
    credentials = renewed(source, clocks)
    refused = credentials.retrieve()
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(credentials.renew, [refused] * 8))
    assert source.fetched == 2
    source.failure = ValueError("no")
    current = credentials.retrieve()
    assert not any(credentials.renew(current) for _ in range(8))
    assert source.fetched == 3


@pytest.fixture
def service() -> CredentialsService:
    return CredentialsService(("access", "secret", "token"))


@pytest.fixture
def service_url(service: CredentialsService) -> Iterator[str]:
    with serving(service.handler()) as url:
        yield url


@pytest.fixture(params=["web identity", "container", "instance"])
def asked(
    request: pytest.FixtureRequest,
    service_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The environment of such a service; what the service that gives keys is asked then."""
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "web identity":
        token = tmp_path / "token"
        token.write_text("the-web-token")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/stowgate")
        monkeypatch.setenv("STOWGATE_OBJECT_STORE_CREDENTIALS_URL", service_url)
        return "POST AssumeRoleWithWebIdentity arn:aws:iam::1:role/stowgate the-web-token"
    if request.param == "container":
        token = tmp_path / "token"
        token.write_text("the-container-token")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{service_url}/v1/credentials")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
        return "GET /v1/credentials the-container-token"
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_CREDENTIALS_URL", service_url)
    return "GET /latest/meta-data/iam/security-credentials/the-role imds-token"


def iam_store(
    endpoint: ObjectStoreEndpoint, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> MinioObjectStore:
    monkeypatch.setenv("STOWGATE_OBJECT_STORE", endpoint.url)
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_CREDENTIALS", "iam")
    monkeypatch.setenv("STOWGATE_BUCKET", bucket)
    store, _ = open_stores(load(CommonSettings), threads=4)
    assert isinstance(store, MinioObjectStore)
    return store


def test_temporary_keys_with_a_session_token_are_fetched_from_each_source_of_aws(
    asked: str,
    service: CredentialsService,
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = object_store_endpoint
    temporary = AssumeRoleProvider(
        sts_endpoint=endpoint.url,
        access_key=endpoint.access_key,
        secret_key=endpoint.secret_key,
    )
    try:
        keys = temporary.retrieve()
    except ValueError as error:
        pytest.skip(f"a store without an STS: {error}")
    service.keys = (keys.access_key, keys.secret_key, str(keys.session_token))
    store = iam_store(endpoint, bucket, monkeypatch)
    store.prepare()
    store.create("key", b"data", "text/plain")
    assert [found.key for found in store.list("")] == ["key"]
    store.delete(["key"])
    assert service.asked == [asked]


@pytest.fixture
def user(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[Callable[[], tuple[str, str]]]:
    """Create a user of the store with every permission, until the next one is created."""
    url = urlsplit(object_store_endpoint.url)
    admin = MinioAdmin(
        endpoint=url.netloc,
        credentials=StaticProvider(
            object_store_endpoint.access_key, object_store_endpoint.secret_key
        ),
        secure=url.scheme == "https",
    )
    names: list[str] = []

    def make() -> tuple[str, str]:
        name, secret = f"user-{secrets.token_hex(6)}", secrets.token_hex(12)
        try:
            admin.user_add(access_key=name, secret_key=secret)
            admin.policy_set(policy_name="readwrite", user=name)
        except MinioAdminException as error:
            pytest.skip(f"no MinIO that makes users: {error}")
        if names:
            admin.user_remove(access_key=names.pop())
        names.append(name)
        return name, secret

    yield make
    for name in names:
        admin.user_remove(access_key=name)


def test_an_upload_continues_with_new_keys_when_its_keys_expire(
    user: Callable[[], tuple[str, str]],
    service: CredentialsService,
    service_url: str,
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_CREDENTIALS_URL", service_url)
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_REGION", "us-east-1")
    # The service's clock is ahead, so nothing here knows that the first keys have ended.
    service.ahead_seconds = 7200
    service.keys = (*user(), "")
    store = iam_store(object_store_endpoint, bucket, monkeypatch)
    store.prepare()
    data = bytes(20 * MIB) + b"end"
    writing = store.begin("large", BytesIO(data), "application/dicom", len(data))
    writing.proceed(8 * MIB)
    assert len(service.asked) == 1
    wait_for(lambda: not store._parts._work_queue.qsize())

    service.keys = (*user(), "")
    writing.proceed(16 * MIB)
    writing.finish(len(data))

    assert store.read_range("large", len(data) - 3, 3) == b"end"
    assert len(service.asked) == 2
    service.keys = (*user(), "")
    calls: list[Callable[[], object]] = [
        lambda: store.create("small", b"1", "text/plain"),
        lambda: list(store.list("")),
        store.ping,
        lambda: store.delete(["small", "large"]),
    ]
    for call in calls:
        call()
        service.keys = (*user(), "")
    assert len(service.asked) == 6


def test_key_files_are_reloaded_when_the_store_refuses_the_keys(
    user: Callable[[], tuple[str, str]],
    object_store_endpoint: ObjectStoreEndpoint,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    access_key, secret_key = tmp_path / "access", tmp_path / "secret"

    def write() -> None:
        for file, text in zip((access_key, secret_key), user(), strict=True):
            file.write_text(text + "\n")

    write()
    monkeypatch.setenv("STOWGATE_OBJECT_STORE", object_store_endpoint.url)
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_ACCESS_KEY_FILE", str(access_key))
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_SECRET_KEY_FILE", str(secret_key))
    monkeypatch.setenv("STOWGATE_BUCKET", bucket)
    store, _ = open_stores(load(CommonSettings), threads=4)
    store.prepare()
    write()
    store.create("key", b"1", "text/plain")
    write()
    store.ping()
    secret_key.write_text("not-the-secret")
    user()
    with pytest.raises(StoreRefused, match="STOWGATE_OBJECT_STORE_SECRET_KEY") as caught:
        store.get("key")
    assert "not-the-secret" not in str(caught.value)


def test_a_failed_fetch_of_keys_is_reported_without_the_token(
    service: CredentialsService,
    service_url: str,
    object_store_endpoint: ObjectStoreEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text("hidden-token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_CREDENTIALS_URL", service_url)
    service.status = 403
    store = iam_store(object_store_endpoint, "bucket", monkeypatch)
    with capture_logs() as logged, pytest.raises(StoreUnavailable, match="HTTP 403") as caught:
        store.ping()
    assert "hidden-token" not in f"{caught.value}{logged}"
    # Those who ask next do not ask the service again.
    with contextlib.suppress(StoreUnavailable):
        store.ping()
    assert len(service.asked) == 1


def test_static_keys_are_required_unless_another_source_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STOWGATE_OBJECT_STORE", "https://s3.example")
    with pytest.raises(BadSetting, match="STOWGATE_OBJECT_STORE_ACCESS_KEY"):
        load(CommonSettings)
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_CREDENTIALS", "iam")
    load(CommonSettings)
