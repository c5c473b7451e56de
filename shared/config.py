"""Settings: environment variables, each also readable from the file that its `_FILE` twin names.

Each is declared once, with what reads it and what it is for; README's table is held to this list
by a test.
"""

import dataclasses
import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from environs import EnvError, FileAwareEnv

from shared.dicom.limits import MAX_ELEMENTS, MAX_METADATA_BYTES, MAX_NESTED_SEQUENCES, MOST

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client keeps its counts when several processes serve as one. It looks on import,
so this is not declared beside it."""

JWT_ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Those that verify with a public key (RFC 7518 3.1, RFC 8037). With the others whoever can verify
a token can make one, and a public key taken for a shared secret would let anyone."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_OWN_PATHS = ("dicomweb", "payloads", "config", "health", "metrics", "openapi.json")

_PREFIX = "STOWGATE_"
_TEST_PREFIX = "STOWGATE_TEST_"
_FILE = "_FILE"

MOST_PARTS = 36_000
"""Of one request, whatever is set. Each takes up to 435 bytes of the workflow request, and so many
leave 1 MiB to its other fields in 16 MiB, the largest message that RabbitMQ 4 takes by default."""

_UPLOADS = 12
"""At a time, by default: each may need 5 MiB, and two cores are busy with fewer."""

_OPENINGS = 4
_EMBEDDED_OPENINGS = 2
"""At a time, by default; more would wait for Python's lock, and have uploads wait for it."""

_SPARE_THREADS = 2
"""Of an API process, so that health and status answer while uploads run."""

_SPARE_THREADS_WITH_AUTH = 8
"""There, up to all but one of these wait for a password's hash, or for an issuer's keys."""


class BadSetting(ValueError):
    """One line: the variable, what it holds (secrets aside), and what would be right."""


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(text: str) -> Address:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", text)
    if not found or int(found[2]) > 65535:
        raise ValueError("host:port with a port from 0 to 65535, such as 127.0.0.1:8080")
    return Address(found[1].strip("[]"), int(found[2]))


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
        if value < least or (most is not None and value > most):
            bound = f"of {least} or more" if most is None else f"from {least} to {most}"
            digits = ", of 18 digits at most" if len(text) > 18 else ""
            raise ValueError(f"a whole number {bound}{digits}")
        return value

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(" or ".join(choices))
        return text

    return parse


# RFC 3986 2; it goes into headers and data sets.
_URL_CHARACTERS = r"(?:[A-Za-z0-9_.~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+"
# Of a URL with a user and a password, which are used as they are.
_CHARACTERS_OF_A_LOGIN = r"[^\s\x00-\x1f]+"


def _url(*schemes: str, path: bool = False, user: bool = False) -> Callable[[str], str]:
    """An absolute URL of one of the schemes; also any plain word named among them."""
    words = [s for s in schemes if not s.endswith("://")]
    starts = tuple(s for s in schemes if s.endswith("://"))

    def parse(text: str) -> str:
        if text in words:
            return text
        try:
            parts = urlsplit(text)
            usable = text.startswith(starts) and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if (
            not usable
            or parts.query
            or parts.fragment
            or not re.fullmatch(_CHARACTERS_OF_A_LOGIN if user else _URL_CHARACTERS, text)
            or ("@" in parts.netloc and not user)
            or (parts.path.strip("/") and not path)
            # A slash in the name of a virtual host is written %2F.
            or (user and "/" in parts.path.strip("/"))
        ):
            before = "user:password@" if user else ""
            behind = "/vhost" if user else "/path" if path else ""
            forms = [f"{start}{before}host:port{behind}" for start in starts]
            spelling = (
                "" if text.isascii() else ", in ASCII: other letters as %XX, in a host as xn--"
            )
            raise ValueError(" or ".join([*words, *forms]) + spelling)
        return text.rstrip("/")

    return parse


def _broker(text: str) -> str:
    """One URL, or several with commas between; a comma in a password is none of these."""
    urls = re.split(r",\s*(?=amqps?://)", text)
    words = ("memory",) if len(urls) == 1 else ()
    one = _url(*words, "amqp://", "amqps://", path=True, user=True)
    try:
        if any("," in url.rpartition("@")[2] for url in urls):
            raise ValueError("memory or amqp(s)://user:password@host:port/vhost")
        return ",".join(one(url) for url in urls)
    except ValueError as error:
        raise ValueError(f"{error}; for several nodes, such URLs with commas between") from None


def without_password(url: str) -> str:
    """For messages about what may be no URL."""
    return re.sub(r"(?s).*@", "…@", url)


http_url = _url("http://", "https://", path=True)
"""Without a slash at the end. Raises ValueError, with what would be right, for anything else."""


def _bucket(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", text) or ".." in text:
        raise ValueError("a bucket name: 3 to 63 of a-z 0-9 . -, first and last a letter or digit")
    return text


def _amqp_name(text: str) -> str:
    if not 1 <= len(text.encode()) <= 200 or not text.isprintable():
        raise ValueError("1 to 200 bytes of printable text")
    return text


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _some_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        given = tuple(word.strip() for word in text.split(","))
        if not set(given) <= set(choices):
            raise ValueError(f"some of {', '.join(choices)}, with commas between")
        return given

    return parse


def _origins(text: str) -> tuple[str, ...]:
    """Exactly as browsers serialise them (RFC 6454 6.2), since they are compared byte by byte."""
    given = tuple(word.strip() for word in text.split(","))
    for origin in given:
        found = re.fullmatch(
            r"(https?)://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?", origin
        )
        if not found or (found[1], found[2]) in (("http", "80"), ("https", "443")):
            raise ValueError(
                "origins as browsers send them, with commas between, such as "
                "https://viewer.example: in lower case, without a slash at the end, a default "
                "port or *"
            )
    return given


def _header_names(text: str) -> tuple[str, ...]:
    """RFC 9110 5.1, but for `*`, which would let a page send any."""
    given = tuple(word.strip() for word in text.split(","))
    if not all(re.fullmatch(r"[A-Za-z0-9!#$%&'+.^_`|~-]+", name) for name in given):
        raise ValueError(
            "names of header fields, with commas between, such as traceparent,baggage,sentry-trace"
        )
    return given


def _proxies(text: str) -> int | tuple[Network, ...]:
    if re.fullmatch(r"[0-9]|1[0-6]", text):
        return int(text)
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError(
            "a number from 0 to 16, or addresses or networks such as 10.0.3.7,fd00::/64 with no "
            "bits set behind their length"
        ) from None


def _keys(text: str) -> str:
    """The URL of a JWK Set, or the absolute path of a file."""
    if "://" not in text:
        return str(Path(text).absolute())
    try:
        parts = urlsplit(text)
        host, usable = parts.hostname or "", parts.port != 0
    except ValueError:
        host, usable = "", False
    if (
        not usable
        or not host
        or parts.scheme not in ("https", "http")
        or (parts.scheme == "http" and not is_loopback(host))
        or "@" in parts.netloc
        or parts.fragment
        or re.search(r"[\s\x00-\x1f]", text)
    ):
        raise ValueError("https://host/path, or the path of a file; http:// on loopback only")
    return text


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(text: str) -> str:
    return text


def _visible(text: str) -> str:
    """What is sent in a header field as it is."""
    if not re.fullmatch("[!-~]+", text):
        raise ValueError("visible ASCII characters without spaces")
    return text


def _path(text: str) -> Path:
    return Path(text).absolute()


def setting(
    default: str | None, parse: Callable[[str], Any], doc: str, *, secret: bool = False
) -> Any:
    """A field of `Settings`, named as its variable is without the prefix, in lower case."""
    return dataclasses.field(
        metadata={"default": default, "parse": parse, "doc": doc, "secret": secret}
    )


@dataclass(frozen=True)
class Settings:
    listen: Address = setting(
        "127.0.0.1:8080",
        _address,
        "the API's address; port 0 takes a free one and prints it, and `[::]` takes IPv4 too",
    )
    worker_listen: Address = setting(
        "127.0.0.1:8081",
        _address,
        "the worker's health and metrics; in `stowgate run` they are on the API's port",
    )
    data: Path = setting(
        "./data",
        _path,
        "folder of the spool, of the embedded store, and with the `memory` broker of the workflow "
        "requests",
    )
    object_store: str = setting(
        "folder",
        _url("folder", "http://", "https://"),
        "`folder`, or an S3 store as `http(s)://host:port`",
    )
    object_store_credentials: str = setting(
        "static",
        _one_of("static", "iam"),
        "where the keys come from: `static` is the three settings below, whose files are read "
        "again when they change; `iam` a web identity (`AWS_WEB_IDENTITY_TOKEN_FILE` and "
        "`AWS_ROLE_ARN`), else a container (`AWS_CONTAINER_CREDENTIALS_RELATIVE_URI` or "
        "`…_FULL_URI`), else the metadata service of the instance",
    )
    object_store_access_key: str | None = setting(None, _visible, "S3 access key", secret=True)
    object_store_secret_key: str | None = setting(None, _text, "S3 secret key", secret=True)
    object_store_session_token: str | None = setting(
        None,
        _visible,
        "session token that belongs to these keys, where they are temporary",
        secret=True,
    )
    object_store_credentials_url: str | None = setting(
        None,
        http_url,
        "for `iam`: the STS or the metadata service, in place of AWS's own; for MinIO's STS the "
        "URL of the store",
    )
    object_store_region: str = setting("us-east-1", _visible, "S3 region")
    object_store_ca: Path | None = setting(
        None,
        _path,
        "PEM file of the authorities that the certificate of the object store may come from, with "
        "`https://`; by default those that the system trusts",
    )
    object_store_client_certificate: Path | None = setting(
        None,
        _path,
        "certificate that the object store is shown (mutual TLS), a PEM file with the intermediate "
        "ones behind it",
    )
    object_store_client_key: Path | None = setting(
        None, _path, "private key of that certificate, a PEM file that is not encrypted"
    )
    broker: str = setting(
        "memory",
        _broker,
        "`memory`, or RabbitMQ as `amqp(s)://user:password@host:port/vhost`; for several nodes, "
        "such URLs with commas between, which are tried in random order",
        secret=True,
    )
    broker_password: str | None = setting(
        None,
        _text,
        "password in place of that in the URL of `STOWGATE_BROKER`; its file is read again for "
        "each new connection",
        secret=True,
    )
    broker_ca: Path | None = setting(
        None,
        _path,
        "PEM file of the authorities that the certificate of RabbitMQ may come from, with "
        "`amqps://`; by default those that the system trusts",
    )
    broker_client_certificate: Path | None = setting(
        None,
        _path,
        "certificate that RabbitMQ is shown (mutual TLS), a PEM file with the intermediate ones "
        "behind it",
    )
    broker_client_key: Path | None = setting(
        None, _path, "private key of that certificate, a PEM file that is not encrypted"
    )
    broker_confirm_seconds: int = setting(
        "10",
        _whole(1, 3600),
        "how long RabbitMQ may take to confirm a message, beside the time that its bytes take at "
        "1 Mbit/s. An announcement that is overdue is left to the relay; a workflow request is "
        "waited for as long as the connection lives, and shown by `/health/ready`",
    )
    bucket: str = setting(
        "monaideploy", _bucket, "bucket of the payloads, shared with the Workflow Manager"
    )
    state_bucket: str = setting("stowgate", _bucket, "bucket of the records and the VAE registry")
    public_url: str | None = setting(
        None,
        http_url,
        "base of links; without it they are relative. Its path may stand in front of every path "
        "that is asked for",
    )
    retrieve_url: str | None = setting(
        None,
        http_url,
        "base URL, in front of `/studies`, of the archive that instances can be retrieved from, as "
        "answers tell senders in RetrieveURL; without it that is empty",
    )
    tls_certificate: Path | None = setting(
        None,
        _path,
        "the API's certificate, a PEM file with the intermediate ones behind it; with it the API "
        "speaks HTTPS and nothing else, by TLS 1.2 or newer",
    )
    tls_key: Path | None = setting(
        None, _path, "private key of that certificate, a PEM file that is not encrypted"
    )
    auth: str = setting(
        "none",
        _one_of("none", "basic", "jwt"),
        "who may enter: `none` lets everybody in, `basic` asks for user and password, `jwt` for a "
        "token",
    )
    allow_anyone: bool = setting(
        "false",
        _flag,
        "`true` lets `STOWGATE_AUTH=none` serve on an address other than loopback, and under any "
        "host name",
    )
    metrics_open: bool = setting(
        "true", _flag, "`false` shows the API's `/metrics` to callers with the scope `read` only"
    )
    cors_origins: tuple[str, ...] | None = setting(
        None,
        _origins,
        "origins whose pages may call this API from a browser, such as `https://viewer.example`, "
        "with commas between",
    )
    cors_headers: tuple[str, ...] | None = setting(
        None,
        _header_names,
        "further request headers that such a page may send, with commas between, such as "
        "`traceparent,tracestate,baggage,sentry-trace`",
    )
    users: Path | None = setting(
        None, _path, "for `basic`: file of the users, a line of `stowgate user` each"
    )
    jwt_keys: str | None = setting(
        None,
        _keys,
        "for `jwt`: keys of the issuer, as the `https://` URL of its JWK Set, or a file with one "
        "or with a public key in PEM",
    )
    jwt_issuer: str | None = setting(None, _text, "for `jwt`: what `iss` must be")
    jwt_audience: str | None = setting(None, _text, "for `jwt`: what `aud` must have in it")
    jwt_algorithms: tuple[str, ...] = setting(
        "RS256",
        _some_of(*JWT_ALGORITHMS),
        "for `jwt`: algorithms that are accepted, with commas between; those with a public key "
        "only",
    )
    jwt_leeway_seconds: int = setting(
        "30", _whole(0, 600), "for `jwt`: how far the issuer's clock may be off"
    )
    jwt_vaes_claim: str = setting(
        "stowgate_vaes",
        _text,
        "for `jwt`: claim with what a caller is bound to: AE titles, or `AET/workflow`; without it "
        "the caller may store to all",
    )
    client_user: str | None = setting(
        None, _text, "user name that `stowgate send` and the like give the API"
    )
    client_password: str | None = setting(None, _text, "password of that user", secret=True)
    client_token: str | None = setting(None, _text, "token that they give it instead", secret=True)
    client_ca: Path | None = setting(
        None,
        _path,
        "PEM file of the authorities that the API's certificate may come from; by default those "
        "that the system trusts",
    )
    log: str | None = setting(
        None,
        _one_of("console", "json"),
        "`console` or `json`; by default `console` on a terminal, else `json`",
    )
    api_processes: int = setting("1", _whole(1, 64), "processes of `stowgate api`")
    api_threads: int = setting(
        "40",
        _whole(2, 256),
        "threads of each API process: one for each upload that it takes at a time, and at least "
        "two for all else, or up to eight where `STOWGATE_AUTH` asks who sends; uploads that wait "
        "for their turn need none",
    )
    max_uploads: int | None = setting(
        None,
        _whole(1, 254),
        "uploads that each API process takes at a time, at most as many as it has threads for; by "
        f"default up to {_UPLOADS}",
    )
    upload_wait_seconds: int = setting(
        "10",
        _whole(0, 60),
        "longest wait of an upload for its turn; above it 429, and at once where as many wait "
        "already as half of the connections that a process takes (500, or a quarter of its open "
        "files)",
    )
    rate_per_sender: int = setting(
        "0",
        _whole(0, 1_000_000),
        "POSTs a minute that each API process takes from one address, up to as many at once; "
        "above it 429. 0 takes any number",
    )
    trusted_proxies: int | tuple[Network, ...] = setting(
        "0",
        _proxies,
        "proxies whose X-Forwarded-For tells who sends: addresses or networks with commas between, "
        "or their number where nobody can get past them",
    )
    keep_alive_seconds: int = setting(
        "65",
        _whole(1, 86400),
        "how long an idle connection is kept; longer than a load balancer in front keeps it, see "
        "[docs/load-balancers.md](docs/load-balancers.md)",
    )
    max_request_line_bytes: int = setting(
        "4094",
        _whole(256, 8190),
        "longest request line, and so URL; above it 414",
    )
    max_head_bytes: int = setting(
        "32768",
        _whole(1024, 1 << 20),
        "largest head of a request, the request line and all header fields, of which one may take "
        "all, such as a token of 200 groups; above it, and above 100 fields, 431",
    )
    max_body_bytes: int = setting(
        "68719476736", _whole(1), "largest request body; above it 413 (64 GiB)"
    )
    max_part_bytes: int = setting(
        "8589934592", _whole(1), "largest single instance; above it 413 (8 GiB)"
    )
    max_parts: int = setting(
        "20000",
        _whole(1, MOST_PARTS),
        f"most parts of one request, up to {MOST_PARTS}, whose workflow request RabbitMQ takes "
        "with the 16 MiB that it allows by default; above it 413",
    )
    max_part_header_bytes: int = setting(
        "16384", _whole(256, 1 << 20), "largest headers of one part; above it 400"
    )
    max_nested_sequences: int = setting(
        str(MAX_NESTED_SEQUENCES),
        _whole(1, MOST.nested_sequences),
        "deepest nesting of sequences in an instance; above it that instance fails with C000",
    )
    max_elements: int = setting(
        str(MAX_ELEMENTS),
        _whole(1000, MOST.elements),
        "most data elements and sequence items of an instance that its metadata sidecar describes; "
        "an instance with more is stored and described in part. A worker may need 1 kB of memory "
        "for each",
    )
    max_metadata_bytes: int = setting(
        str(MAX_METADATA_BYTES),
        _whole(1 << 16, MOST.metadata_bytes),
        "most bytes of an instance, apart from pixel data and other bulk values, that its metadata "
        "sidecar describes; an instance with more is stored and described in part. A worker needs "
        "a multiple of this in memory (64 MiB)",
    )
    spool_memory_bytes: int = setting(
        "1048576", _whole(0), "an instance larger than this is spooled on disk on arrival"
    )
    min_free_bytes: int = setting(
        "67108864",
        _whole(0),
        "watermark: below this much free disk, the spool's or the folder store's, uploads are "
        "refused with 507 before their body",
    )
    idle_seconds: int = setting(
        "30",
        _whole(1, 3600),
        "a sender that sends nothing for this long, or less than 1 MiB (64 KiB with an "
        "`Idempotency-Key`) in four times this long, is cut off with 408",
    )
    max_upload_seconds: int = setting(
        "21600",
        _whole(1, 43200),
        "longest upload; above it 408. What an upload that died leaves is swept after twice this "
        "time",
    )
    stop_seconds: int = setting(
        "25",
        _whole(5, 3600),
        "how long a stop may take, of which uploads under way have four fifths to end; less than "
        "what kills the process then waits: 30 s on Kubernetes, 10 s with `docker stop`",
    )
    lease_seconds: int = setting(
        "60",
        _whole(2, 3600),
        "how long a worker, or an upload with an `Idempotency-Key`, keeps others waiting when it "
        "dies",
    )
    event_exchange: str = setting(
        "stowgate", _amqp_name, "exchange of Stowgate's own events, and prefix of its queues"
    )
    worker_threads: int | None = setting(
        None,
        _whole(1, 64),
        f"payloads that one worker opens at a time; by default {_OPENINGS}, and "
        f"{_EMBEDDED_OPENINGS} with the `memory` broker, as it shares a process with the API",
    )
    relay_seconds: int = setting("5", _whole(1, 3600), "pause between two passes of the relay")
    sweep_seconds: int = setting("600", _whole(1, 86400), "pause between two sweeps")
    workflow_manager_exchange: str = setting(
        "monaideploy", _amqp_name, "topic exchange of the Workflow Manager"
    )
    workflow_manager_routing_key: str = setting(
        "md.workflow.request", _amqp_name, "routing key of a workflow request"
    )
    workflow_manager_queue: str = setting(
        "md.workflow.request",
        _amqp_name,
        "queue that the Workflow Manager declares: while it is missing, requests are held, and "
        "`/health/ready` says so",
    )

    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Where the settings of these names were read from, of those that a file holds."""

    def current(self, name: str) -> Callable[[], str]:
        """What reads a setting that is text: from its file, each time, where one holds it.

        The call raises `OSError` where the file cannot be read.
        """
        path, text = self.files.get(name), getattr(self, name) or ""
        return (lambda: text) if path is None else (lambda: path.read_text("utf-8").strip())

    @property
    def scheme(self) -> str:
        """Of the API's URL."""
        return "http" if self.tls_certificate is None else "https"

    @property
    def path_prefix(self) -> str:
        """What a proxy may put in front of every path, as WSGI decodes one (PEP 3333); empty where
        there is none."""
        return unquote_to_bytes(urlsplit(self.public_url or "").path).decode("latin-1")

    @property
    def is_for_this_machine(self) -> bool:
        """Whether a loopback address is all that keeps strangers out (see `guard_listen`)."""
        return self.auth == "none" and not self.allow_anyone

    @property
    def spool(self) -> Path:
        return self.data / "spool"

    @property
    def workflow_requests(self) -> Path:
        """Where they are written with the `memory` broker."""
        return self.data / "workflow-requests"

    @property
    def concurrent_uploads(self) -> int:
        """Per API process."""
        return self.max_uploads or min(_UPLOADS, self._most_uploads)

    @property
    def openings(self) -> int:
        """Payloads that a worker opens at a time."""
        return self.worker_threads or (_EMBEDDED_OPENINGS if self.broker == "memory" else _OPENINGS)

    @property
    def uploads_end_seconds(self) -> float:
        """Of a stop, what uploads under way have to end in."""
        return 0.8 * self.stop_seconds

    @property
    def hand_back_seconds(self) -> float:
        """Of a stop, what a worker has for the payloads that it has in hand."""
        return 0.4 * self.stop_seconds

    @property
    def routines_end_seconds(self) -> float:
        """Of a stop, what the relay and its like have to end in after that."""
        return 0.2 * self.stop_seconds

    @property
    def most_waiting_to_enter(self) -> int:
        return max(1, self._spare_threads - 1)

    @property
    def _most_uploads(self) -> int:
        return max(1, self.api_threads - self._spare_threads)

    @property
    def _spare_threads(self) -> int:
        if self.auth == "none":
            return _SPARE_THREADS
        return max(_SPARE_THREADS, min(_SPARE_THREADS_WITH_AUTH, self.api_threads // 2))


_NEEDED_BY_AUTH = {"basic": ("users",), "jwt": ("jwt_keys", "jwt_issuer", "jwt_audience")}


class Declared(NamedTuple):
    """One setting as an operator sees it; `default` is None where there is none."""

    variable: str
    default: str | None
    doc: str


def declared() -> list[Declared]:
    return [
        Declared(_variable(f), f.metadata["default"], f.metadata["doc"]) for f in _setting_fields()
    ]


def _setting_fields() -> list["dataclasses.Field[Any]"]:
    return [field for field in dataclasses.fields(Settings) if "parse" in field.metadata]


def load_settings() -> Settings:
    """Read the process's environment. Raises `BadSetting` at the first value that will not do."""
    env = FileAwareEnv(strip_whitespace=True)
    values: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for field in _setting_fields():
        variable, spec = _variable(field), field.metadata
        try:
            raw = env.str(variable, None)
        except (EnvError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            why = cause.strerror if isinstance(cause, OSError) else "it is no UTF-8"
            # Who confuses the two variables has the secret itself in this one.
            shown = "" if spec["secret"] else f"is {os.environ[variable + _FILE]!r}, but "
            raise BadSetting(
                f"{variable}{_FILE} {shown}must name a file that can be read: {why}"
            ) from error
        if file := os.environ.get(variable + _FILE):
            files[field.name] = Path(file).absolute()
        raw = spec["default"] if raw is None or raw == "" else raw
        try:
            values[field.name] = None if raw is None else spec["parse"](raw)
        except ValueError as error:
            # A password has no place in any other URL, and stands in one all the same.
            shown = "(a secret)" if spec["secret"] else repr(without_password(raw))
            raise BadSetting(f"{variable} is {shown}, but must be {error}") from None
    settings = Settings(**values, files=files)
    if (
        settings.object_store != "folder"
        and settings.object_store_credentials == "static"
        and not (settings.object_store_access_key and settings.object_store_secret_key)
    ):
        raise BadSetting(
            f"{_PREFIX}OBJECT_STORE is {settings.object_store!r}, which needs "
            f"{_PREFIX}OBJECT_STORE_ACCESS_KEY and {_PREFIX}OBJECT_STORE_SECRET_KEY"
        )
    for needed in _NEEDED_BY_AUTH.get(settings.auth, ()):
        if getattr(settings, needed) is None:
            raise BadSetting(
                f"{_PREFIX}AUTH is {settings.auth!r}, which needs {_PREFIX}{needed.upper()}"
            )
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise BadSetting(
            f"{_PREFIX}TLS_CERTIFICATE and {_PREFIX}TLS_KEY need each other, and one is not set"
        )
    for engine in ("OBJECT_STORE", "BROKER"):
        names = [f"{engine.lower()}_client_{what}" for what in ("certificate", "key")]
        if len({getattr(settings, name) is None for name in names}) > 1:
            raise BadSetting(
                f"{_PREFIX}{engine}_CLIENT_CERTIFICATE and {_PREFIX}{engine}_CLIENT_KEY need each "
                "other, and one is not set"
            )
    if settings.path_prefix.strip("/").partition("/")[0] in _OWN_PATHS:
        raise BadSetting(
            f"{_PREFIX}PUBLIC_URL is {settings.public_url!r}, but must be what comes before "
            "/dicomweb and its like"
        )
    if settings.bucket == settings.state_bucket:
        raise BadSetting(
            f"{_PREFIX}STATE_BUCKET is {settings.bucket!r}, but must be another bucket than "
            f"{_PREFIX}BUCKET: the Workflow Manager reads that one"
        )
    for name in ("bucket", "state_bucket"):
        bucket = getattr(settings, name)
        taken = (settings.spool, settings.workflow_requests)
        if settings.object_store == "folder" and settings.data / bucket in taken:
            raise BadSetting(
                f"{_PREFIX}{name.upper()} is {bucket!r}, but must be another name: that folder of "
                f"{_PREFIX}DATA is for something else"
            )
    if settings.concurrent_uploads > settings._most_uploads:
        raise BadSetting(
            f"{_PREFIX}MAX_UPLOADS is '{settings.max_uploads}', but must be at most "
            f"{settings._most_uploads}, as the rest of {_PREFIX}API_THREADS, which is "
            f"{settings.api_threads}, is for health and status"
        )
    return settings


def guard_listen(settings: Settings) -> None:
    """Raises `BadSetting` where strangers could reach an API that asks nobody."""
    if settings.is_for_this_machine and not is_loopback(settings.listen.host):
        raise BadSetting(
            f"{_PREFIX}LISTEN is '{settings.listen}', which others can reach, and {_PREFIX}AUTH "
            f"lets everybody in: set {_PREFIX}AUTH to basic or jwt, or {_PREFIX}ALLOW_ANYONE to "
            "true where something else keeps strangers out"
        )


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each `STOWGATE_` variable that nothing reads, as a typo leaves it."""
    known = [d.variable for d in declared()]
    known += [name + _FILE for name in known]
    words = [name.removeprefix(_PREFIX) for name in known]
    sentences = []
    for name in sorted(environ):
        if name.startswith(_PREFIX) and not name.startswith(_TEST_PREFIX) and name not in known:
            near = difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1)
            hint = f"; did you mean {_PREFIX}{near[0]}?" if near else ""
            sentences.append(f"{name} is set, but no setting has that name{hint}")
    return sentences


def _variable(field: "dataclasses.Field[Any]") -> str:
    return _PREFIX + field.name.upper()
