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
"""Algorithms that verify with a public key (RFC 7518 3.1, RFC 8037). With a shared secret, every
verifier could issue tokens, and so could anyone if a public key were used as the secret."""

MAX_PARTS = 36_000
"""Upper limit of `max_parts`. Each part takes up to 435 bytes of the workflow request; this number
leaves 1 MiB for its other fields in 16 MiB, the default maximum of a message in RabbitMQ 4."""

_UPLOADS = 12
"""Default of concurrent uploads: each may need 5 MiB, and fewer keep two cores busy."""

_SPARE_THREADS = 2
"""Threads per API process for health and status during uploads."""

_SPARE_THREADS_WITH_AUTH = 8
"""The same with authentication, where all but one may wait for a password hash or an issuer."""

_DEFAULT_PORTS = {"http": 80, "https": 443}

_NEEDED_BY_AUTH = {"basic": ("users",), "jwt": ("jwt_keys", "jwt_issuer", "jwt_audience")}


@dataclass(frozen=True)
class UrlSettings(SettingsSection):
    """The URL of the API, which clients on the same machine read too."""

    listen: Address = setting(
        "127.0.0.1:8080",
        address,
        "address of the API; port 0 selects a free port and prints it, `[::]` includes IPv4",
    )
    public_url: str | None = setting(
        None,
        http_url,
        "public base URL of the API, for links; without it they are relative. If it has a path, "
        "every request path may begin with that",
    )
    tls_certificate: Path | None = setting(
        None,
        absolute_path,
        "certificate of the API, a PEM file followed by the intermediate certificates; with it the "
        "API serves only HTTPS, with TLS 1.2 or newer",
    )

    @property
    def scheme(self) -> str:
        """The scheme of the API's URL."""
        return "http" if self.tls_certificate is None else "https"


@dataclass(frozen=True)
class ApiSettings(UrlSettings, CommonSettings):
    tls_key: Path | None = setting(
        None, absolute_path, "private key of that certificate, an unencrypted PEM file"
    )
    page: bool = setting("true", flag, "`false` turns off the operator's page, at `/` and `/ui`")
    retrieve_url: str | None = setting(
        None,
        http_url,
        "base URL, without `/studies`, of the archive that serves the instances; RetrieveURL in "
        "responses begins with it, and is empty without it",
    )
    auth: str = setting(
        "none",
        one_of("none", "basic", "jwt"),
        "authentication: `none`, `basic` (user and password) or `jwt` (token)",
    )
    allow_anyone: bool = setting(
        "false",
        flag,
        "`true` allows `STOWGATE_AUTH=none` on an address other than loopback, and with any host "
        "name",
    )
    users: Path | None = setting(
        None, absolute_path, "for `basic`: users file, with a line of `stowgate user` for each"
    )
    jwt_keys: str | None = setting(
        None,
        keys_source,
        "for `jwt`: keys of the issuer, as the `https://` URL of its JWK Set, or a file with a JWK "
        "Set or a public key in PEM",
    )
    jwt_issuer: str | None = setting(None, plain_text, "for `jwt`: required value of `iss`")
    jwt_audience: str | None = setting(None, plain_text, "for `jwt`: required member of `aud`")
    jwt_algorithms: tuple[str, ...] = setting(
        "RS256",
        some_of(*JWT_ALGORITHMS),
        "for `jwt`: accepted algorithms, comma-separated; only those with a public key",
    )
    jwt_leeway_seconds: int = setting(
        "30", whole_number(0, 600), "for `jwt`: maximum deviation of the issuer's clock"
    )
    jwt_vaes_claim: str = setting(
        "stowgate_vaes",
        plain_text,
        "for `jwt`: claim with the bindings of a caller: AE titles, or `AET/workflow`; without the "
        "claim the caller may store to all",
    )
    jwt_source_claim: str = setting(
        "stowgate_source",
        plain_text,
        "for `jwt`: claim with the caller's source name for the Workflow Manager; without the "
        "claim, the source is the address of the sender",
    )
    metrics_open: bool = setting(
        "true", flag, "`false` requires the scope `read` for the API's `/metrics`"
    )
    trace_senders: bool = setting(
        "false",
        flag,
        "`true` adds the address of the sender, and the AE title in the URL, to the spans that are "
        "exported, see [docs/tracing.md](docs/tracing.md)",
    )
    cors_origins: tuple[str, ...] | None = setting(
        None,
        origins,
        "origins of web pages that may call this API, comma-separated, such as "
        "`https://viewer.example`",
    )
    cors_headers: tuple[str, ...] | None = setting(
        None,
        header_names,
        "further request headers that such pages may send, comma-separated, such as "
        "`traceparent,tracestate,baggage,sentry-trace`",
    )
    api_processes: int = setting("1", whole_number(1, 64), "processes of `stowgate api`")
    api_threads: int = setting(
        "40",
        whole_number(2, 256),
        "threads per API process: one for each concurrent upload, and at least two for other "
        "requests, or up to eight with authentication; waiting uploads need none",
    )
    max_uploads: int | None = setting(
        None,
        whole_number(1, 254),
        "maximum concurrent uploads per API process, limited by its threads; default: up to "
        f"{_UPLOADS}",
    )
    upload_wait_seconds: int = setting(
        "10",
        whole_number(0, 60),
        "maximum wait of an upload for a free slot; above it 429. If half of the connections of "
        "the process (500, or a quarter of its open files) are already waiting, 429 is immediate",
    )
    rate_per_sender: int = setting(
        "0",
        whole_number(0, 1_000_000),
        "rate limit: POSTs per minute from one address, per API process; above it 429. 0 means no "
        "limit",
    )
    trusted_proxies: int | tuple[Network, ...] = setting(
        "0",
        proxies,
        "trusted proxies, whose X-Forwarded-For names the sender: comma-separated addresses or "
        "networks, or the number of proxies if no client can bypass them",
    )
    keep_alive_seconds: int = setting(
        "65",
        whole_number(1, 86400),
        "how long an idle connection stays open; must exceed that time of a load balancer in "
        "front, see [docs/load-balancers.md](docs/load-balancers.md)",
    )
    max_request_line_bytes: int = setting(
        "4094",
        whole_number(256, 8190),
        "maximum request line, which contains the URL; above it 414",
    )
    max_head_bytes: int = setting(
        "32768",
        whole_number(1024, 1 << 20),
        "maximum size of the request line and all header fields together; one field may use all of "
        "it, such as a token with 200 groups. Above it, or above 100 fields, 431",
    )
    max_body_bytes: int = setting(
        "68719476736", whole_number(1), "maximum request body; above it 413 (64 GiB)"
    )
    max_part_bytes: int = setting(
        "8589934592", whole_number(1), "maximum size of an instance; above it 413 (8 GiB)"
    )
    max_parts: int = setting(
        "20000",
        whole_number(1, MAX_PARTS),
        f"maximum parts of a request; above it 413. It can be up to {MAX_PARTS}: their workflow "
        "request fits into 16 MiB, RabbitMQ's default maximum",
    )
    max_part_header_bytes: int = setting(
        "16384", whole_number(256, 1 << 20), "maximum headers of a part; above it 400"
    )
    max_nested_sequences: int = setting(
        str(MAX_NESTED_SEQUENCES),
        whole_number(1, HIGHEST.max_nested_sequences),
        "maximum nesting of sequences in an instance; above it the instance fails with C000",
    )
    max_elements: int = setting(
        str(MAX_ELEMENTS),
        whole_number(1000, HIGHEST.max_elements),
        "maximum data elements and sequence items in the metadata sidecar of an instance; an "
        "instance with more is stored and described in part. A worker may need 1 kB of memory for "
        "each",
    )
    max_metadata_bytes: int = setting(
        str(MAX_METADATA_BYTES),
        whole_number(1 << 16, HIGHEST.max_metadata_bytes),
        "maximum bytes of an instance that its metadata sidecar describes, without pixel data and "
        "other bulk values; an instance with more is stored and described in part. A worker needs "
        "a multiple of this in memory (64 MiB)",
    )
    spool_memory_bytes: int = setting(
        "1048576", whole_number(0), "instances above this size are spooled on disk on arrival"
    )
    idle_seconds: int = setting(
        "30",
        whole_number(1, 3600),
        "timeout of a sender: 408 if it sends nothing for this time, or less than 1 MiB (64 KiB "
        "with an `Idempotency-Key`) in four times this time",
    )
    workflow_manager_url: str | None = setting(
        None,
        http_url,
        "base URL of the Workflow Manager's API, from which `GET /payloads/{id}` reads the "
        "progress of a payload; without it there is no progress",
    )
    workflow_manager_user: str | None = setting(
        None, plain_text, "user name for the Workflow Manager's API"
    )
    workflow_manager_password: str | None = setting(
        None, plain_text, "password of that user", secret=True
    )
    workflow_manager_token: str | None = setting(
        None, visible, "token for the same API, instead of user and password", secret=True
    )
    workflow_manager_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the certificate authorities that are trusted for the Workflow Manager's API; "
        "default: those of the system",
    )

    @property
    def path_prefix(self) -> str:
        """The path of `public_url`, decoded as by WSGI (PEP 3333), which a proxy may put before
        every path; empty if there is none."""
        return unquote_to_bytes(urlsplit(self.public_url or "").path).decode("latin-1")

    @property
    def own_origin(self) -> str | None:
        """The origin of `public_url`, as browsers write it (RFC 6454 6.2); None without a URL."""
        if self.public_url is None:
            return None
        url = urlsplit(self.public_url)
        port = "" if url.port in (None, _DEFAULT_PORTS[url.scheme]) else f":{url.port}"
        host = url.hostname or ""
        return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}"

    @property
    def is_for_this_machine(self) -> bool:
        """Whether only the loopback address prevents unauthorized access (see `guard_listen`)."""
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
        """Maximum concurrent uploads per API process."""
        return self.max_uploads or min(_UPLOADS, self._max_uploads)

    @property
    def uploads_end_seconds(self) -> float:
        """Part of `stop_seconds` for uploads in progress to end."""
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
            raise BadSetting("STOWGATE_TLS_CERTIFICATE and STOWGATE_TLS_KEY must be set together")
        if self.path_prefix.strip("/").partition("/")[0] in RESERVED:
            raise BadSetting(
                f"STOWGATE_PUBLIC_URL is {self.public_url!r}, but must be the URL before "
                "/dicomweb and other paths of the API"
            )
        if self.concurrent_uploads > self._max_uploads:
            raise BadSetting(
                f"STOWGATE_MAX_UPLOADS is '{self.max_uploads}', but must be at most "
                f"{self._max_uploads}: the rest of STOWGATE_API_THREADS, which is "
                f"{self.api_threads}, is reserved for other requests"
            )


def guard_listen(settings: ApiSettings) -> None:
    """Raise `BadSetting` if an API without authentication would be reachable for others."""
    if settings.is_for_this_machine and not is_loopback(settings.listen.host):
        raise BadSetting(
            f"STOWGATE_LISTEN is '{settings.listen}', which others can reach, and STOWGATE_AUTH is "
            "none: set STOWGATE_AUTH to basic or jwt, or STOWGATE_ALLOW_ANYONE to true if access "
            "is restricted in another way"
        )
