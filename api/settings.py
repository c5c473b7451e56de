"""The settings of the API."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from api.http.routes import RESERVED
from shared.dicom.limits import (
    HIGHEST,
    MAX_ELEMENTS,
    MAX_METADATA_BYTES,
    MAX_NESTED_SEQUENCES,
    StructureLimits,
)
from shared.settings.loader import BadSetting, SettingsSection, setting
from shared.settings.parsers import (
    Address,
    Network,
    absolute_path,
    address,
    flag,
    header_names,
    http_url,
    is_loopback,
    keys_source,
    one_of,
    origins,
    plain_text,
    proxies,
    some_of,
    visible,
    whole_number,
)
from shared.settings.services import CommonSettings

JWT_ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Those that verify with a public key (RFC 7518 3.1, RFC 8037). With the others whoever can verify
a token can make one, and a public key taken for a shared secret would let anyone."""

MAX_PARTS = 36_000
"""Of one request, whatever is set. Each takes up to 435 bytes of the workflow request, and so many
leave 1 MiB to its other fields in 16 MiB, the largest message that RabbitMQ 4 takes by default."""

_UPLOADS = 12
"""At a time, by default: each may need 5 MiB, and two cores are busy with fewer."""

_SPARE_THREADS = 2
"""Of an API process, so that health and status answer while uploads run."""

_SPARE_THREADS_WITH_AUTH = 8
"""There, up to all but one of these wait for a password's hash, or for an issuer's keys."""

_NEEDED_BY_AUTH = {"basic": ("users",), "jwt": ("jwt_keys", "jwt_issuer", "jwt_audience")}


@dataclass(frozen=True)
class UrlSettings(SettingsSection):
    """Where the API is found; its clients on the same machine read them too."""

    listen: Address = setting(
        "127.0.0.1:8080",
        address,
        "the API's address; port 0 takes a free one and prints it, and `[::]` takes IPv4 too",
    )
    public_url: str | None = setting(
        None,
        http_url,
        "base of links; without it they are relative. Its path may stand in front of every path "
        "that is asked for",
    )
    tls_certificate: Path | None = setting(
        None,
        absolute_path,
        "the API's certificate, a PEM file with the intermediate ones behind it; with it the API "
        "speaks HTTPS and nothing else, by TLS 1.2 or newer",
    )

    @property
    def scheme(self) -> str:
        """Of the API's URL."""
        return "http" if self.tls_certificate is None else "https"


@dataclass(frozen=True)
class ApiSettings(UrlSettings, CommonSettings):
    retrieve_url: str | None = setting(
        None,
        http_url,
        "base URL, in front of `/studies`, of the archive that instances can be retrieved from, as "
        "answers tell senders in RetrieveURL; without it that is empty",
    )
    tls_key: Path | None = setting(
        None, absolute_path, "private key of that certificate, a PEM file that is not encrypted"
    )
    auth: str = setting(
        "none",
        one_of("none", "basic", "jwt"),
        "who may enter: `none` lets everybody in, `basic` asks for user and password, `jwt` for a "
        "token",
    )
    allow_anyone: bool = setting(
        "false",
        flag,
        "`true` lets `STOWGATE_AUTH=none` serve on an address other than loopback, and under any "
        "host name",
    )
    users: Path | None = setting(
        None, absolute_path, "for `basic`: file of the users, a line of `stowgate user` each"
    )
    jwt_keys: str | None = setting(
        None,
        keys_source,
        "for `jwt`: keys of the issuer, as the `https://` URL of its JWK Set, or a file with one "
        "or with a public key in PEM",
    )
    jwt_issuer: str | None = setting(None, plain_text, "for `jwt`: what `iss` must be")
    jwt_audience: str | None = setting(None, plain_text, "for `jwt`: what `aud` must have in it")
    jwt_algorithms: tuple[str, ...] = setting(
        "RS256",
        some_of(*JWT_ALGORITHMS),
        "for `jwt`: algorithms that are accepted, with commas between; those with a public key "
        "only",
    )
    jwt_leeway_seconds: int = setting(
        "30", whole_number(0, 600), "for `jwt`: how far the issuer's clock may be off"
    )
    jwt_vaes_claim: str = setting(
        "stowgate_vaes",
        plain_text,
        "for `jwt`: claim with what a caller is bound to: AE titles, or `AET/workflow`; without it "
        "the caller may store to all",
    )
    jwt_source_claim: str = setting(
        "stowgate_source",
        plain_text,
        "for `jwt`: claim with the caller's name for the Workflow Manager, `source`; without it, "
        "that is the address that it sends from",
    )
    metrics_open: bool = setting(
        "true", flag, "`false` shows the API's `/metrics` to callers with the scope `read` only"
    )
    cors_origins: tuple[str, ...] | None = setting(
        None,
        origins,
        "origins whose pages may call this API from a browser, such as `https://viewer.example`, "
        "with commas between",
    )
    cors_headers: tuple[str, ...] | None = setting(
        None,
        header_names,
        "further request headers that such a page may send, with commas between, such as "
        "`traceparent,tracestate,baggage,sentry-trace`",
    )
    api_processes: int = setting("1", whole_number(1, 64), "processes of `stowgate api`")
    api_threads: int = setting(
        "40",
        whole_number(2, 256),
        "threads of each API process: one for each upload that it takes at a time, and at least "
        "two for all else, or up to eight where `STOWGATE_AUTH` asks who sends; uploads that wait "
        "for their turn need none",
    )
    max_uploads: int | None = setting(
        None,
        whole_number(1, 254),
        "uploads that each API process takes at a time, at most as many as it has threads for; by "
        f"default up to {_UPLOADS}",
    )
    upload_wait_seconds: int = setting(
        "10",
        whole_number(0, 60),
        "longest wait of an upload for its turn; above it 429, and at once where as many wait "
        "already as half of the connections that a process takes (500, or a quarter of its open "
        "files)",
    )
    rate_per_sender: int = setting(
        "0",
        whole_number(0, 1_000_000),
        "POSTs a minute that each API process takes from one address, up to as many at once; "
        "above it 429. 0 takes any number",
    )
    trusted_proxies: int | tuple[Network, ...] = setting(
        "0",
        proxies,
        "proxies whose X-Forwarded-For tells who sends: addresses or networks with commas between, "
        "or their number where nobody can get past them",
    )
    keep_alive_seconds: int = setting(
        "65",
        whole_number(1, 86400),
        "how long an idle connection is kept; longer than a load balancer in front keeps it, see "
        "[docs/load-balancers.md](docs/load-balancers.md)",
    )
    max_request_line_bytes: int = setting(
        "4094",
        whole_number(256, 8190),
        "longest request line, and so URL; above it 414",
    )
    max_head_bytes: int = setting(
        "32768",
        whole_number(1024, 1 << 20),
        "largest head of a request, the request line and all header fields, of which one may take "
        "all, such as a token of 200 groups; above it, and above 100 fields, 431",
    )
    max_body_bytes: int = setting(
        "68719476736", whole_number(1), "largest request body; above it 413 (64 GiB)"
    )
    max_part_bytes: int = setting(
        "8589934592", whole_number(1), "largest single instance; above it 413 (8 GiB)"
    )
    max_parts: int = setting(
        "20000",
        whole_number(1, MAX_PARTS),
        f"most parts of one request, up to {MAX_PARTS}, whose workflow request RabbitMQ takes "
        "with the 16 MiB that it allows by default; above it 413",
    )
    max_part_header_bytes: int = setting(
        "16384", whole_number(256, 1 << 20), "largest headers of one part; above it 400"
    )
    max_nested_sequences: int = setting(
        str(MAX_NESTED_SEQUENCES),
        whole_number(1, HIGHEST.max_nested_sequences),
        "deepest nesting of sequences in an instance; above it that instance fails with C000",
    )
    max_elements: int = setting(
        str(MAX_ELEMENTS),
        whole_number(1000, HIGHEST.max_elements),
        "most data elements and sequence items of an instance that its metadata sidecar describes; "
        "an instance with more is stored and described in part. A worker may need 1 kB of memory "
        "for each",
    )
    max_metadata_bytes: int = setting(
        str(MAX_METADATA_BYTES),
        whole_number(1 << 16, HIGHEST.max_metadata_bytes),
        "most bytes of an instance, apart from pixel data and other bulk values, that its metadata "
        "sidecar describes; an instance with more is stored and described in part. A worker needs "
        "a multiple of this in memory (64 MiB)",
    )
    spool_memory_bytes: int = setting(
        "1048576", whole_number(0), "an instance larger than this is spooled on disk on arrival"
    )
    idle_seconds: int = setting(
        "30",
        whole_number(1, 3600),
        "a sender that sends nothing for this long, or less than 1 MiB (64 KiB with an "
        "`Idempotency-Key`) in four times this long, is cut off with 408",
    )
    workflow_manager_url: str | None = setting(
        None,
        http_url,
        "base URL of the Workflow Manager's API, which `GET /payloads/{id}` asks how far a payload "
        "is; without it nothing is asked",
    )
    workflow_manager_user: str | None = setting(
        None, plain_text, "user name that the Workflow Manager's API is given"
    )
    workflow_manager_password: str | None = setting(
        None, plain_text, "password of that user", secret=True
    )
    workflow_manager_token: str | None = setting(
        None, visible, "token that it is given instead", secret=True
    )
    workflow_manager_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the authorities that the certificate of the Workflow Manager's API may come "
        "from; by default those that the system trusts",
    )

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
    def structure_limits(self) -> StructureLimits:
        return StructureLimits(
            max_nested_sequences=self.max_nested_sequences,
            max_elements=self.max_elements,
            max_metadata_bytes=self.max_metadata_bytes,
        )

    @property
    def concurrent_uploads(self) -> int:
        """Per API process."""
        return self.max_uploads or min(_UPLOADS, self._max_uploads)

    @property
    def uploads_end_seconds(self) -> float:
        """Of a stop, what uploads under way have to end in."""
        return 0.8 * self.stop_seconds

    @property
    def max_waiting_to_enter(self) -> int:
        return max(1, self._spare_threads - 1)

    @property
    def _max_uploads(self) -> int:
        return max(1, self.api_threads - self._spare_threads)

    @property
    def _spare_threads(self) -> int:
        if self.auth == "none":
            return _SPARE_THREADS
        return max(_SPARE_THREADS, min(_SPARE_THREADS_WITH_AUTH, self.api_threads // 2))

    def validate(self) -> None:
        super().validate()
        for needed in _NEEDED_BY_AUTH.get(self.auth, ()):
            if getattr(self, needed) is None:
                raise BadSetting(
                    f"STOWGATE_AUTH is {self.auth!r}, which needs STOWGATE_{needed.upper()}"
                )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise BadSetting(
                "STOWGATE_TLS_CERTIFICATE and STOWGATE_TLS_KEY need each other, and one is not set"
            )
        if self.path_prefix.strip("/").partition("/")[0] in RESERVED:
            raise BadSetting(
                f"STOWGATE_PUBLIC_URL is {self.public_url!r}, but must be what comes before "
                "/dicomweb and its like"
            )
        if self.concurrent_uploads > self._max_uploads:
            raise BadSetting(
                f"STOWGATE_MAX_UPLOADS is '{self.max_uploads}', but must be at most "
                f"{self._max_uploads}, as the rest of STOWGATE_API_THREADS, which is "
                f"{self.api_threads}, is for health and status"
            )


def guard_listen(settings: ApiSettings) -> None:
    """Raises `BadSetting` where strangers could reach an API that asks nobody."""
    if settings.is_for_this_machine and not is_loopback(settings.listen.host):
        raise BadSetting(
            f"STOWGATE_LISTEN is '{settings.listen}', which others can reach, and STOWGATE_AUTH "
            "lets everybody in: set STOWGATE_AUTH to basic or jwt, or STOWGATE_ALLOW_ANYONE to "
            "true where something else keeps strangers out"
        )
