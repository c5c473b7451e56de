"""HTTPS in the API itself, with regular and hostile clients."""

import hmac
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from certificates import Certificates, certificates
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from instances import multipart, new_instance
from service import STOWGATE, Service, environment, running, wait_for
from wire import connect, everything, head, read_answer, statuses

# A client that blocked a thread or the main loop would do so for longer.
DEADLINE_SECONDS = 8.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def service(made: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(
        "run",
        tmp_path_factory.mktemp("tls"),
        STOWGATE_TLS_CERTIFICATE=str(made.certificate),
        STOWGATE_TLS_KEY=str(made.key),
        STOWGATE_API_THREADS="4",
        STOWGATE_IDLE_SECONDS="1",
    ) as service:
        yield service


@pytest.fixture(scope="module")
def trusting(made: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=made.authority)


def encrypted(service: Service, trusting: ssl.SSLContext) -> ssl.SSLSocket:
    return trusting.wrap_socket(connect(service), server_hostname="127.0.0.1")


def large_instance(mebibytes: int) -> bytes:
    return new_instance(Rows=1024, Columns=512 * mebibytes, PixelData=bytes(mebibytes << 20))


def test_the_printed_url_is_https(service: Service) -> None:
    assert service.url.startswith("https://127.0.0.1:")


@pytest.mark.parametrize("in_chunks", [False, True], ids=["length", "chunks"])
def test_an_upload_of_some_megabytes_is_stored_unchanged(
    service: Service, made: Certificates, in_chunks: bool
) -> None:
    instance = large_instance(8)
    body, content_type = multipart(instance, new_instance())
    pieces = (body[start : start + 70_001] for start in range(0, len(body), 70_001))

    answer = requests.post(
        f"{service.url}/dicomweb/studies",
        data=pieces if in_chunks else body,
        headers={"Content-Type": content_type},
        verify=str(made.authority),
        timeout=60,
    )

    assert answer.status_code == 200, answer.text
    objects = service.data / "monaideploy" / answer.headers["X-Payload-ID"]
    assert instance in [path.read_bytes() for path in objects.rglob("*.dcm")]


def test_a_connection_is_kept_alive(service: Service, trusting: ssl.SSLContext) -> None:
    with encrypted(service, trusting) as sock:
        for _ in range(3):
            sock.sendall(head("GET /health/live HTTP/1.1"))
            assert read_answer(sock)[0] == 200
            sock.sendall(head("POST /dicomweb/studies HTTP/1.1", "Content-Type: text/plain"))
            assert read_answer(sock)[0] == 204


@pytest.mark.parametrize("rest_bytes", [1000, 8192])
def test_a_request_decrypted_with_the_end_of_a_body_is_served(
    service: Service, trusting: ssl.SSLContext, rest_bytes: int
) -> None:
    """The kernel has no more data then, so the poller does not report the request."""
    instance = new_instance()
    upload = head(
        "POST /dicomweb/studies HTTP/1.1",
        "Content-Type: application/dicom",
        f"Content-Length: {len(instance)}",
    )
    # Longer than one read of the server, and in one record with the data before it.
    next_head = head(
        "GET /health/live HTTP/1.1", f"X-A: {'a' * 5000}", f"X-B: {'b' * 2500}", "Connection: close"
    )
    with encrypted(service, trusting) as sock:
        sock.sendall(upload + instance[:-rest_bytes])
        sock.sendall(instance[-rest_bytes:] + next_head)

        assert statuses(everything(sock)) == [200, 200]


def half_a_hello(trusting: ssl.SSLContext) -> bytes:
    sent = ssl.MemoryBIO()
    peer = trusting.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        peer.do_handshake()
    hello = sent.read()
    return hello[: len(hello) // 2]


@pytest.mark.parametrize("what", ["nothing", "half a hello"])
def test_other_requests_are_served_beside_incomplete_handshakes(
    service: Service, made: Certificates, trusting: ssl.SSLContext, what: str
) -> None:
    sent = b"" if what == "nothing" else half_a_hello(trusting)
    with ExitStack() as connections:
        ready = connections.enter_context(encrypted(service, trusting))
        peers = [connections.enter_context(connect(service)) for _ in range(50)]
        for peer in peers:
            peer.sendall(sent)

        stored = requests.post(
            f"{service.url}/dicomweb/studies",
            data=new_instance(),
            headers={"Content-Type": "application/dicom"},
            verify=str(made.authority),
            timeout=DEADLINE_SECONDS,
        )

        assert stored.status_code == 200
        # In the end they are disconnected.
        assert [peer.recv(100) for peer in peers] == [b""] * len(peers)
        # A connection after its handshake has the usual time for its request.
        ready.sendall(head("GET /health/live HTTP/1.1"))
        assert read_answer(ready)[0] == 200


def test_a_request_without_tls_gets_a_clear_error(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(head("POST /dicomweb/studies HTTP/1.1", "Content-Length: 1000") + bytes(1000))
        status, _, body = read_answer(sock)

        assert status == 400
        assert "https" in json.loads(body)["detail"]
        assert sock.recv(100) == b""
    assert "Traceback" not in service.log.read_text()


def test_noise_and_lost_connections_are_not_logged_as_server_errors(
    service: Service, made: Certificates, trusting: ssl.SSLContext
) -> None:
    logged = len(service.log.read_text())
    connect(service).close()
    with connect(service) as sock:
        sock.sendall(b"\x16\x03\x01\x00\x05DOE^J" + bytes(100))
        everything_raw(sock)
    with encrypted(service, trusting) as sock:
        sock.sendall(
            head(
                "POST /dicomweb/studies HTTP/1.1",
                "Content-Type: application/dicom",
                "Content-Length: 1000",
            )
        )
        socket.socket.sendall(sock, b"\x17\x03\x03\x00\x20" + bytes(32))
        everything_raw(sock)

    answer = requests.get(
        f"{service.url}/health/live", verify=str(made.authority), timeout=DEADLINE_SECONDS
    )
    assert answer.status_code == 200
    log = service.log.read_text()[logged:]
    assert "TLS handshake with 127.0.0.1 failed" in log
    assert "EOF" not in log
    for word in ("Traceback", "DOE", "request failed"):
        assert word not in log


def everything_raw(sock: socket.socket) -> None:
    """Read until the service closes the connection."""
    try:
        while socket.socket.recv(sock, 65536):
            pass
    except ConnectionResetError:
        pass


UPLOAD = head(
    "POST /dicomweb/studies HTTP/1.1",
    "Content-Type: application/dicom",
    "Content-Length: 100000",
)


def test_a_stalled_body_gets_408(service: Service, trusting: ssl.SSLContext) -> None:
    with encrypted(service, trusting) as sock:
        sock.sendall(UPLOAD + bytes(1000))

        assert read_answer(sock)[0] == 408


def test_a_trickling_body_gets_an_encrypted_408(service: Service, trusting: ssl.SSLContext) -> None:
    with encrypted(service, trusting) as sock:
        sock.sendall(UPLOAD)
        sock.settimeout(0.3)

        def answered() -> int | None:
            try:
                sock.sendall(b"x")
                return read_answer(sock)[0]
            except TimeoutError:
                return None

        assert wait_for(answered) == 408


def test_a_client_reads_its_error_while_sending_a_large_body(
    service: Service, made: Certificates
) -> None:
    answer = requests.post(
        f"{service.url}/dicomweb/vae/nobody/studies",
        data=bytes(16 << 20),
        headers={"Content-Type": "application/dicom"},
        verify=str(made.authority),
        timeout=60,
    )

    assert answer.status_code == 400


def test_tls_older_than_1_2_is_rejected(service: Service) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1

    with connect(service) as sock, pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        old.wrap_socket(sock)


def test_two_processes_serve_https(made: Certificates, tmp_path: Path) -> None:
    settings = {
        "STOWGATE_TLS_CERTIFICATE": str(made.certificate),
        "STOWGATE_TLS_KEY": str(made.key),
        "STOWGATE_API_PROCESSES": "2",
    }
    with running("api", tmp_path, **settings) as service:
        for _ in range(10):
            live = requests.get(
                f"{service.url}/health/live", verify=str(made.authority), timeout=60
            )
            assert live.status_code == 200


def run(*arguments: Any, **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STOWGATE, *map(str, arguments)],
        env=environment(Path("unused"), settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_commands_verify_the_api_with_the_given_authority(
    service: Service, made: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "image.dcm").write_bytes(new_instance())
    trusted = {"STOWGATE_CLIENT_CA": str(made.authority), "STOWGATE_PUBLIC_URL": service.url}

    sent = run("send", tmp_path, **trusted)
    listed = run("payloads", "list", **trusted)
    refused = run("send", tmp_path, "--url", service.url)

    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.split()[-1] in listed.stdout
    assert refused.returncode == 2
    assert "is not trusted" in refused.stderr
    assert "STOWGATE_CLIENT_CA" in refused.stderr


def test_an_invalid_authorities_file_is_reported_in_one_line(
    service: Service, made: Certificates
) -> None:
    asked = run("vae", "list", "--url", service.url, STOWGATE_CLIENT_CA=str(made.key))

    assert asked.returncode == 2
    (line,) = asked.stderr.splitlines()
    assert f"STOWGATE_CLIENT_CA is '{made.key}'" in line


@pytest.mark.parametrize(
    ("command", "certificate", "key", "words"),
    [
        ("run", "certificate", None, "must be set together"),
        ("api", "missing", "key", "STOWGATE_TLS_CERTIFICATE is '"),
        ("run", "certificate", "missing", "STOWGATE_TLS_KEY is '"),
        ("run", "key", "key", "PEM files"),
        ("api", "authority", "key", "private key of the certificate"),
        ("run", "certificate", "encrypted_key", "unencrypted"),
        ("check", "certificate", "encrypted_key", "unencrypted"),
    ],
)
def test_unusable_tls_files_are_reported_in_one_line(
    made: Certificates,
    tmp_path: Path,
    command: str,
    certificate: str,
    key: str | None,
    words: str,
) -> None:
    files = {**made._asdict(), "missing": tmp_path / "missing.pem"}
    settings = {"STOWGATE_TLS_CERTIFICATE": str(files[certificate])}
    if key is not None:
        settings["STOWGATE_TLS_KEY"] = str(files[key])

    started = run(command, **settings, STOWGATE_DATA=str(tmp_path))

    assert started.returncode == 1
    told = [line for line in (started.stderr + started.stdout).splitlines() if words in line]
    assert len(told) == 1
    if command != "check":
        assert started.stderr.splitlines() == told


def derived(secret: bytes, label: bytes, length: int) -> bytes:
    """Compute HKDF-Expand-Label (RFC 8446 7.1) for a cipher suite with SHA-384."""
    name = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0\x01"
    return hmac.digest(secret, info, "sha384")[:length]


def record(secret: bytes, kind: int, content: bytes) -> bytes:
    """Encrypt the first record under a traffic secret of TLS 1.3 (RFC 8446 5.2)."""
    length = len(content) + 17
    start = b"\x17\x03\x03" + length.to_bytes(2, "big")
    cipher = AESGCM(derived(secret, b"key", 32))
    return start + cipher.encrypt(derived(secret, b"iv", 12), content + bytes([kind]), start)


def test_a_client_that_floods_key_updates_is_disconnected(
    service: Service, made: Certificates, tmp_path: Path
) -> None:
    """OpenSSL reads all of them (RFC 8446 4.6.3) before it returns to the main loop."""
    secrets = tmp_path / "secrets"
    trusting = ssl.create_default_context(cafile=made.authority)
    trusting.keylog_filename = str(secrets)
    with encrypted(service, trusting) as sock:
        cipher = sock.cipher()
        if cipher is None or cipher[0] != "TLS_AES_256_GCM_SHA384":
            pytest.skip("another cipher suite than this test speaks")
        found = re.search(r"^CLIENT_TRAFFIC_SECRET_0 \w+ (\w+)$", secrets.read_text(), re.M)
        assert found
        secret, updates = bytes.fromhex(found[1]), []
        # More than OpenSSL can process in the time limit here.
        for _ in range(300_000):
            updates.append(record(secret, 22, b"\x18\0\0\x01\0"))
            secret = derived(secret, b"traffic upd", 48)
        request = record(secret, 23, head("GET /health/live HTTP/1.1", "Connection: close"))

        def send() -> None:
            with suppress(OSError):
                socket.socket.sendall(sock, b"".join(updates) + request)

        sender = threading.Thread(target=send)
        sender.start()
        with suppress(ConnectionError):
            assert everything(sock) == b""
        sock.shutdown(socket.SHUT_RDWR)
        sender.join()

    live = requests.get(f"{service.url}/health/live", verify=str(made.authority), timeout=60)
    assert live.status_code == 200


def test_the_health_check_of_the_image_uses_tls_if_the_api_does(
    service: Service, made: Certificates, stowgate: Service
) -> None:
    dockerfile = Path(__file__).parents[2] / "Dockerfile"
    found = re.search(r"^HEALTHCHECK .*\\\n *CMD (\[.*\])$", dockerfile.read_text(), re.M)
    assert found
    _, *arguments = json.loads(found[1])

    def healthy(url: str, **settings: str) -> bool:
        given = settings | {"STOWGATE_LISTEN": url.partition("//")[2]}
        probe = subprocess.run(
            [sys.executable, *arguments],
            env=environment(Path("unused"), given),
            capture_output=True,
            timeout=60,
            check=False,
        )
        return probe.returncode == 0

    assert healthy(stowgate.url)
    assert healthy(service.url, STOWGATE_TLS_CERTIFICATE=str(made.certificate))


def test_new_connections_get_a_changed_certificate(tmp_path: Path) -> None:
    first, second = certificates(tmp_path / "first"), certificates(tmp_path / "second")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"

    def install(made: Certificates) -> None:
        for source, target in ((made.certificate, certificate), (made.key, key)):
            (tmp_path / "new").write_bytes(source.read_bytes())
            (tmp_path / "new").replace(target)

    def trusts(made: Certificates, service: Service) -> bool:
        try:
            live = requests.get(f"{service.url}/health/live", verify=str(made.authority), timeout=9)
        except requests.exceptions.SSLError:
            return False
        return bool(live.status_code == 200)

    install(first)
    settings = {"STOWGATE_TLS_CERTIFICATE": str(certificate), "STOWGATE_TLS_KEY": str(key)}
    with running("run", tmp_path / "data", **settings) as service:
        assert trusts(first, service)
        install(second)
        wait_for(lambda: trusts(second, service))
        assert not trusts(first, service)
        key.write_text("half a")
        wait_for(
            lambda: (
                trusts(second, service)
                and "could not reload the TLS files" in service.log.read_text()
            )
        )
        assert trusts(second, service)
