"""An OpenID Connect provider that signs everybody in at once, as the same operator."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode, urlsplit

from answering import Answering, serving
from issuer import Key

CLIENT_ID = "stowgate-page"


@contextmanager
def providing(key: Key, scope: str) -> Iterator[str]:
    """Issue access tokens with that scope; yields the issuer."""
    nonces: dict[str, str] = {}
    lock = threading.Lock()

    class Provider(Answering):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            issuer = f"http://{self.headers['Host']}"
            if url.path == "/.well-known/openid-configuration":
                self.tell(
                    {
                        "issuer": issuer,
                        "authorization_endpoint": f"{issuer}/authorize",
                        "token_endpoint": f"{issuer}/token",
                        "jwks_uri": f"{issuer}/jwks",
                        "response_types_supported": ["code"],
                        "subject_types_supported": ["public"],
                        "id_token_signing_alg_values_supported": ["RS256"],
                        "token_endpoint_auth_methods_supported": ["client_secret_basic"],
                    }
                )
            elif url.path == "/jwks":
                self.tell({"keys": [key.jwk()]})
            else:
                given = {name: values[0] for name, values in parse_qs(url.query).items()}
                with lock:
                    code = f"code-{len(nonces)}"
                    nonces[code] = given.get("nonce", "")
                answer = urlencode({"code": code, "state": given["state"]})
                self.answer(302, Location=f"{given['redirect_uri']}?{answer}")

        def do_POST(self) -> None:
            issuer = f"http://{self.headers['Host']}"
            given = parse_qs(self.received().decode())
            nonce = nonces[given["code"][0]]
            self.tell(
                {
                    "access_token": key.token(iss=issuer, sub="anna", scope=scope),
                    "id_token": key.token(iss=issuer, sub="anna", aud=CLIENT_ID, nonce=nonce),
                    "token_type": "Bearer",
                    "expires_in": 600,
                }
            )

        def tell(self, content: object) -> None:
            self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    with serving(Provider) as url:
        yield url
