"""STS, container credentials and instance metadata, as AWS has them, on loopback."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

from answering import Answering

TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass
class CredentialsService:
    """Gives out `keys`, which last for `seconds` by a clock that is `ahead_seconds` ahead."""

    keys: tuple[str, str, str]
    seconds: float = 3600.0
    ahead_seconds: float = 0.0
    asked: list[str] = field(default_factory=list)
    status: int = 200
    hold: Callable[[], object] = lambda: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def handler(self) -> type[Answering]:
        service = self

        class Handler(Answering):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                self.answer(200, b"imds-token")

            def do_GET(self) -> None:
                if self.path.endswith("/security-credentials/"):
                    self.answer(200, b"the-role")
                    return
                token = self.headers.get("X-aws-ec2-metadata-token") or self.headers.get(
                    "Authorization", ""
                )
                self._give(f"GET {self.path} {token}", service.as_json)

            def do_POST(self) -> None:
                asked = parse_qs(urlsplit(self.path).query)
                words = " ".join(
                    asked.get(name, [""])[0] for name in ("Action", "RoleArn", "WebIdentityToken")
                )
                self._give(f"POST {words}", service.as_xml)

            def _give(self, asked: str, body: Callable[[], str]) -> None:
                with service.lock:
                    service.asked.append(asked)
                service.hold()
                if service.status == 200:
                    self.answer(200, body().encode())
                else:
                    self.answer(service.status, b"<Error/>")

        return Handler

    @property
    def _ends(self) -> str:
        ends = datetime.now(UTC) + timedelta(seconds=self.seconds + self.ahead_seconds)
        return ends.strftime(TIME)

    def as_json(self) -> str:
        access_key, secret_key, token = self.keys
        return json.dumps(
            {
                "Code": "Success",
                "AccessKeyId": access_key,
                "SecretAccessKey": secret_key,
                "Token": token,
                "Expiration": self._ends,
            }
        )

    def as_xml(self) -> str:
        access_key, secret_key, token = self.keys
        inner = (
            f"<AccessKeyId>{access_key}</AccessKeyId><SecretAccessKey>{secret_key}"
            f"</SecretAccessKey><SessionToken>{token}</SessionToken>"
            f"<Expiration>{self._ends}</Expiration>"
        )
        return (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            f"<AssumeRoleWithWebIdentityResult><Credentials>{inner}</Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
