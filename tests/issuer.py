"""An issuer of tokens: keys, tokens, and a JWK Set over HTTP."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

ISSUER = "https://issuer.example/realms/hospital"
AUDIENCE = "stowgate"


@dataclass
class Key:
    kid: str
    private: RSAPrivateKey = field(default_factory=lambda: generate_private_key(65537, 2048))

    def jwk(self) -> dict[str, Any]:
        found = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**found, "kid": self.kid, "use": "sig", "alg": "RS256"}

    def pem(self) -> bytes:
        public = self.private.public_key()
        return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def token(self, *, algorithm: str = "RS256", signed_with: Any = ..., **claims: Any) -> str:
        """Return a valid token, changed by the arguments; a claim of None is left out."""
        now = int(time.time())
        good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "modality-1", "iat": now, "exp": now + 600}
        payload = {name: value for name, value in {**good, **claims}.items() if value is not None}
        key = self.private if signed_with is ... else signed_with
        return jwt.encode(payload, key, algorithm, headers={"kid": self.kid})


class Issuer:
    """Serves a JWK Set on loopback. Tests change its keys, or let it hang or fail."""

    def __init__(self, *keys: Key) -> None:
        self.keys = list(keys)
        self.status = 200
        self.asked = 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                issuer.goes_on.wait(60)
                body = json.dumps({"keys": [key.jwk() for key in issuer.keys]}).encode()
                self.send_response(200 if self.path == "/moved" else issuer.status)
                if issuer.status == 302:
                    self.send_header("Location", "/moved")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Ignore a client that disconnected while the issuer hung."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/jwks"

    def close(self) -> None:
        """Stop serving; the port then refuses connections."""
        self.goes_on.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def issuing(*keys: Key) -> Iterator[Issuer]:
    issuer = Issuer(*keys)
    threading.Thread(target=issuer.server.serve_forever, daemon=True).start()
    try:
        yield issuer
    finally:
        issuer.close()
