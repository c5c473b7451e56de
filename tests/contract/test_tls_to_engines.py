"""TLS to the object store and to the broker, with authorities that no system knows."""

import contextlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from engines import ObjectStoreEndpoint
from proxy import Proxy
from service import wait_for

from shared.adapters.rabbitmq.publisher import RabbitEventPublisher
from shared.adapters.s3.conformance import check_state_bucket
from shared.adapters.s3.store import MinioObjectStore
from shared.errors import BrokerUnavailable, StoreUnavailable, StowgateError
from shared.runtime.backends import open_backends
from shared.runtime.tls_files import TlsFiles, client_tls
from shared.settings.loader import BadSetting, load
from shared.settings.services import CommonSettings

HOST = "127.0.0.1"


def server_context(
    authority: trustme.CA, *names: str, clients: trustme.CA | None = None, **issue: Any
) -> ssl.SSLContext:
    """Of a server with a certificate for these names; `clients` have to show one of that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or (HOST,)), **issue).configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@dataclass
class Files:
    """What a client is given, as PEM files."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    def trust(self, authority: trustme.CA) -> None:
        self.ca.write_bytes(authority.cert_pem.bytes())

    def show(self, authority: trustme.CA) -> None:
        issued = authority.issue_cert("stowgate@hospital.example")
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())

    def tls(self) -> TlsFiles:
        return client_tls(
            "STOWGATE_TEST_",
            ca=self.ca if self.ca.exists() else None,
            certificate=self.certificate if self.certificate.exists() else None,
            key=self.key if self.key.exists() else None,
        )


@dataclass
class Engine:
    """`reach` is one new connection to it, through the proxy."""

    proxy: Proxy
    reach: Callable[[TlsFiles], Callable[[], None]]
    unavailable: type[StowgateError]


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(params=["object store", "broker"])
def engine(request: pytest.FixtureRequest, authority: trustme.CA) -> Iterator[Engine]:
    with contextlib.ExitStack() as stack:
        if request.param == "object store":
            endpoint: ObjectStoreEndpoint = request.getfixturevalue("object_store_endpoint")
            bucket: str = request.getfixturevalue("bucket")
            url = endpoint.url
        else:
            url = request.getfixturevalue("broker_url")
        proxy = stack.enter_context(Proxy(url, tls=server_context(authority)))

        def store(tls: TlsFiles) -> Callable[[], None]:
            return MinioObjectStore.connect(
                proxy.url,
                access_key=endpoint.access_key,
                secret_key=endpoint.secret_key,
                region="us-east-1",
                bucket=bucket,
                threads=4,
                tls=tls.context,
            ).prepare

        def publisher(tls: TlsFiles) -> Callable[[], None]:
            made = RabbitEventPublisher(proxy.url, topology=[], tls=tls.context)
            stack.callback(made.close)
            return made.ping

        if request.param == "object store":
            yield Engine(proxy, store, StoreUnavailable)
        else:
            yield Engine(proxy, publisher, BrokerUnavailable)


def test_an_authority_of_the_site_is_trusted(
    engine: Engine, files: Files, authority: trustme.CA
) -> None:
    files.trust(authority)
    engine.reach(files.tls())()


def test_an_authority_that_is_not_configured_is_not_trusted(engine: Engine, files: Files) -> None:
    words = r"(?i)certificate.verify.failed.*check its certificate.*STOWGATE_\w+_CA"
    with pytest.raises(engine.unavailable, match=words):
        engine.reach(files.tls())()
    files.trust(trustme.CA())
    with pytest.raises(engine.unavailable, match=r"(?i)certificate.verify.failed"):
        engine.reach(files.tls())()


def test_a_certificate_of_another_host_is_refused(
    engine: Engine, files: Files, authority: trustme.CA
) -> None:
    files.trust(authority)
    engine.proxy.tls = server_context(authority, "127.0.0.2", "other.example")
    with pytest.raises(engine.unavailable, match=r"(?i)IP address mismatch.*127\.0\.0\.1"):
        engine.reach(files.tls())()


def test_a_certificate_that_has_expired_is_refused(
    engine: Engine, files: Files, authority: trustme.CA
) -> None:
    files.trust(authority)
    engine.proxy.tls = server_context(authority, not_after=datetime.now(UTC) - timedelta(hours=1))
    with pytest.raises(engine.unavailable, match="certificate has expired"):
        engine.reach(files.tls())()


def test_a_server_that_requires_a_client_certificate_gets_it(
    engine: Engine, files: Files, authority: trustme.CA
) -> None:
    clients = trustme.CA()
    files.trust(authority)
    engine.proxy.tls = server_context(authority, clients=clients)
    with pytest.raises(engine.unavailable):
        engine.reach(files.tls())()
    files.show(trustme.CA())
    with pytest.raises(engine.unavailable):
        engine.reach(files.tls())()
    files.show(clients)
    engine.reach(files.tls())()


def test_changed_files_apply_to_new_connections(
    engine: Engine, files: Files, authority: trustme.CA
) -> None:
    clients = trustme.CA()
    files.trust(authority)
    files.show(trustme.CA())
    reach = engine.reach(files.tls())
    reach()
    successor = trustme.CA()
    engine.proxy.tls = server_context(successor, clients=clients)
    engine.proxy.reset()
    with pytest.raises(engine.unavailable):
        wait_for(lambda: reach())
    files.trust(successor)
    files.show(clients)

    def reached() -> bool:
        with contextlib.suppress(engine.unavailable):
            reach()
            return True
        return False

    wait_for(reached)
    # What is written half, or removed, changes nothing.
    files.ca.write_text("-----BEGIN CERTIFICATE-----")
    files.key.unlink()
    engine.proxy.reset()
    wait_for(reached)


def test_a_store_is_raced_over_tls(
    object_store_endpoint: ObjectStoreEndpoint, bucket: str, files: Files, authority: trustme.CA
) -> None:
    files.trust(authority)
    with Proxy(object_store_endpoint.url, tls=server_context(authority)) as proxy:
        store = MinioObjectStore.connect(
            proxy.url,
            access_key=object_store_endpoint.access_key,
            secret_key=object_store_endpoint.secret_key,
            region="us-east-1",
            bucket=bucket,
            threads=4,
            tls=files.tls().context,
        )
        store.prepare()
        check_state_bucket(store)


@pytest.mark.parametrize("which", ["OBJECT_STORE", "BROKER"])
def test_unusable_tls_files_stop_the_start_with_the_reason(
    which: str, files: Files, monkeypatch: pytest.MonkeyPatch, authority: trustme.CA
) -> None:
    for name, value in {
        "OBJECT_STORE": "https://127.0.0.1:1",
        "OBJECT_STORE_ACCESS_KEY": "access",
        "OBJECT_STORE_SECRET_KEY": "secret",
        "BROKER": "amqps://user:password@127.0.0.1:1",
        f"{which}_CA": str(files.ca),
    }.items():
        monkeypatch.setenv(f"STOWGATE_{name}", value)
    with pytest.raises(BadSetting, match=f"STOWGATE_{which}_CA is .*No such file"):
        open_backends(load(CommonSettings), store_threads=4)
    files.ca.write_text("no certificate")
    with pytest.raises(BadSetting, match=f"STOWGATE_{which}_CA is .*PEM file"):
        open_backends(load(CommonSettings), store_threads=4)
    files.trust(authority)
    monkeypatch.setenv(f"STOWGATE_{which}_CLIENT_CERTIFICATE", str(files.certificate))
    with pytest.raises(BadSetting, match=f"{which}_CLIENT_KEY need each other"):
        load(CommonSettings)
    monkeypatch.setenv(f"STOWGATE_{which}_CLIENT_KEY", str(files.key))
    files.show(authority)
    open_backends(load(CommonSettings), store_threads=4)
    files.key.write_bytes(authority.issue_cert("other").private_key_pem.bytes())
    with pytest.raises(BadSetting, match=f"STOWGATE_{which}_CLIENT_KEY .*KEY_VALUES_MISMATCH"):
        open_backends(load(CommonSettings), store_threads=4)
