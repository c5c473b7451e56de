"""Bearer authentication (RFC 6750) with signed JSON Web Tokens (RFC 7519)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jwt
from werkzeug.datastructures import Authorization

from api.auth.guard import REALM, Caller
from api.auth.issuer_keys import IssuerKeys
from api.http.problems import Unauthorized
from api.http.routes import Scope
from shared.ids import SOURCE_RULE, is_source

SCOPE_PREFIX = "stowgate:"
"""The prefix of a scope in a token, so that the `admin` of another service gets no access."""

_SCOPE_CLAIMS = ("scope", "scp", "roles")
_REQUIRED = ["exp", "iss", "aud", "sub"]
_MAX_NAME_CHARACTERS = 255

# The first match counts. PyJWT's own messages may repeat the content of the token.
_WORDS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it is for another audience"),
    (jwt.InvalidIssuerError, "it is from another issuer"),
    (jwt.InvalidAlgorithmError, "it is signed with an algorithm that is not accepted"),
    (jwt.InvalidSignatureError, "its signature is not valid"),
    (jwt.MissingRequiredClaimError, f"it lacks one of the claims {', '.join(_REQUIRED)}"),
    (jwt.PyJWTError, "it is malformed"),
)


@dataclass(frozen=True)
class TokenRules:
    """The requirements for a token; `vaes_claim` and `source_claim` name the claims with the
    caller's bindings and source."""

    issuer: str
    audience: str
    algorithms: Sequence[str]
    leeway_seconds: int
    vaes_claim: str
    source_claim: str


class BearerTokens:
    """Authenticates callers by a signed token."""

    scheme = "bearer"

    def __init__(self, keys: IssuerKeys, rules: TokenRules) -> None:
        self._keys = keys
        self._rules = rules

    def caller(self, given: Authorization | None, address: str) -> Caller:  # noqa: ARG002
        if given is None or given.type != self.scheme or not given.token:
            raise Unauthorized(
                "a token is required (Authorization: Bearer)",
                {"WWW-Authenticate": f'Bearer realm="{REALM}"'},
            )
        try:
            return self._caller_of(self._claims(given.token))
        except jwt.PyJWTError as error:
            raise _invalid(next(why for kind, why in _WORDS if isinstance(error, kind))) from None

    def lacks(self, scope: Scope) -> dict[str, str]:
        return {
            "WWW-Authenticate": f'Bearer realm="{REALM}", error="insufficient_scope", '
            f'scope="{SCOPE_PREFIX}{scope}"'
        }

    def ping(self) -> None:
        self._keys.ping()

    def _claims(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        # Checked before the key is looked up, which may take a request to the issuer.
        if header.get("alg") not in list(self._rules.algorithms):
            raise jwt.InvalidAlgorithmError
        key = self._keys.find(header.get("kid"))
        if key is None:
            raise _invalid("it is signed with an unknown key")
        claims: dict[str, Any] = jwt.decode(
            token,
            key.public_key,
            algorithms=[name for name in key.algorithms if name in self._rules.algorithms],
            issuer=self._rules.issuer,
            audience=self._rules.audience,
            leeway=self._rules.leeway_seconds,
            options={"require": _REQUIRED},
        )
        return claims

    def _caller_of(self, claims: dict[str, Any]) -> Caller:
        name = claims["sub"]
        if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME_CHARACTERS:
            raise _invalid(f"sub must be 1 to {_MAX_NAME_CHARACTERS} printable characters")
        given = {word for claim in _SCOPE_CLAIMS for word in _words(claims.get(claim)) or []}
        scopes = frozenset(scope for scope in Scope if SCOPE_PREFIX + scope in given)
        vaes = None
        if self._rules.vaes_claim in claims:
            words = _words(claims[self._rules.vaes_claim])
            if words is None:
                raise _invalid(
                    "the bindings must be a list of strings, or one string with spaces between them"
                )
            vaes = frozenset(words)
        source = claims.get(self._rules.source_claim)
        if source is not None and not (isinstance(source, str) and is_source(source)):
            raise _invalid(f"its source is not valid: {SOURCE_RULE}")
        return Caller(name, scopes, vaes, source)


def _words(claim: Any) -> list[str] | None:
    """Split a claim, which is a string with spaces (RFC 8693 4.2) or a list; None for any other.

    An issuer may use a claim of the same name for something else.
    """
    words = claim.split() if isinstance(claim, str) else claim
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    return words


def _invalid(why: str) -> Unauthorized:
    return Unauthorized(
        f"the token is not valid: {why}",
        {"WWW-Authenticate": f'Bearer realm="{REALM}", error="invalid_token"'},
    )
