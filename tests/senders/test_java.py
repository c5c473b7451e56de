"""Java's own HTTP clients, which Weasis, Karnak and others send by, when a large upload is refused.

`HttpURLConnection` looks for an answer only when it has sent everything.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ages import JAVA
from certificates import certificates
from clients import had_by_one_of, java_from_pypi
from instances import multipart, new_instance
from service import Service, running

# More than any buffer on the way holds, and enough for a sender that was hung up on to notice.
LARGE_BYTES = 96 << 20
LIMITS = {"STOWGATE_MAX_BODY_BYTES": str(256 << 20), "STOWGATE_MAX_PART_BYTES": str(8 << 20)}

# A client that is installed first is a fixture, and may take minutes.
pytestmark = pytest.mark.timeout(180, func_only=True)

Posts = Callable[..., str]
CLIENTS = ("HttpURLConnection", "HttpClient")


def _posts(java: Path, classes: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [java, "-cp", classes, "Posts", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _told(process: "subprocess.Popen[str]", *words: str) -> str:
    """What is told of one POST: its client, framing, body, Content-Type and URL."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\t".join(words) + "\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.fixture(scope="session")
def classes(java: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `Posts`, for Java 11 and all since."""
    folder = tmp_path_factory.mktemp("classes")
    source = Path(__file__).with_name("Posts.java")
    subprocess.run(
        [java.with_name("javac"), "--release", "11", "-d", folder, source],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


@pytest.fixture(scope="module")
def posts(java: Path, classes: Path) -> Iterator[Posts]:
    """What one client is told of a large body that it frames in one of its ways."""
    with _posts(java, classes) as process:

        def post(client: str, framing: str, url: str, content_type: str) -> str:
            return _told(process, client, framing, str(LARGE_BYTES), content_type, url)

        yield post
        process.terminate()


class Refusal(NamedTuple):
    status: int
    path: str = "/dicomweb/studies"
    content_type: str = "application/dicom"


REFUSALS = [
    Refusal(400, "/dicomweb/vae/nobody/studies"),
    Refusal(404, "/nowhere"),
    Refusal(413),
    Refusal(415, content_type="text/plain"),
]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running("run", tmp_path_factory.mktemp("strict"), **LIMITS) as service:
        yield service


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: str(refusal.status))
@pytest.mark.parametrize(
    ("client", "framing"),
    [
        ("HttpURLConnection", "length"),
        ("HttpURLConnection", "chunks"),
        ("HttpURLConnection", "collected"),
        ("HttpClient", "length"),
        ("HttpClient", "chunks"),
    ],
)
def test_the_refusal_of_a_large_upload_is_read(
    posts: Posts, strict: Service, client: str, framing: str, refusal: Refusal
) -> None:
    told = posts(client, framing, strict.url + refusal.path, refusal.content_type)

    assert told.startswith(f"{refusal.status} "), told


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "users"
    path.write_text(f"ct:store:scrypt:32768:8:3$salt${'0' * 128}\n")
    return path


@pytest.mark.parametrize("status", [401, 429, 507])
def test_the_refusal_of_whoever_may_not_send_now_is_read(
    posts: Posts, tmp_path: Path, users: Path, status: int
) -> None:
    settings = {
        401: {"STOWGATE_AUTH": "basic", "STOWGATE_USERS": str(users)},
        429: {"STOWGATE_RATE_PER_SENDER": "1"},
        507: {"STOWGATE_MIN_FREE_BYTES": str(10**17)},
    }[status]
    with running("run", tmp_path, **settings) as service:
        service.post("/dicomweb/studies", b"", "application/dicom")
        for client in CLIENTS:
            told = posts(client, "chunks", f"{service.url}/dicomweb/studies", "application/dicom")

            assert told.startswith(f"{status} "), told


def test_a_refusal_is_read_through_tls(java: Path, classes: Path, tmp_path: Path) -> None:
    made = certificates(tmp_path / "certificates")
    tls = {"STOWGATE_TLS_CERTIFICATE": str(made.certificate), "STOWGATE_TLS_KEY": str(made.key)}
    with (
        running("run", tmp_path / "data", **tls, **LIMITS) as service,
        _posts(java, classes, str(made.authority)) as process,
    ):
        for client in CLIENTS:
            for framing in ("length", "chunks"):
                place = f"{service.url}/dicomweb/studies"
                told = _told(process, client, framing, str(LARGE_BYTES), "application/dicom", place)

                assert told.startswith("413 "), told
        process.terminate()


@pytest.mark.parametrize("age", JAVA)
def test_java_stores_several_and_reads_the_refusal_of_a_large_upload(
    classes: Path, age: str, stowgate: Service, strict: Service, tmp_path: Path
) -> None:
    java = had_by_one_of(f"java {age}", lambda: java_from_pypi(JAVA[age]))
    body = tmp_path / "body"
    with _posts(java, classes) as process:
        for client in CLIENTS:
            for framing in ("length", "chunks"):
                instances = [new_instance("MR_small.dcm") for _ in range(3)]
                sent, content_type = multipart(*instances)
                body.write_bytes(sent)
                place = f"{stowgate.url}/dicomweb/studies"
                told = _told(process, client, framing, str(body), content_type, place)
                assert told.startswith("200 "), told
                (payload,) = set.union(*map(stowgate.payloads_with, instances))
                assert stowgate.opened(payload)["file_count"] == 3

                place = f"{strict.url}/dicomweb/studies"
                told = _told(process, client, framing, str(LARGE_BYTES), "text/plain", place)
                assert told.startswith("415 "), told
        process.terminate()
