"""Normalization of request paths before routing."""

import re
from urllib.parse import unquote_to_bytes, urlsplit

_STORE = "dicomweb"

_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")

_NOWHERE = "/."
"""A path that no route matches."""


def own_path(path: str, prefix: str) -> str:
    """Remove `prefix` from `path`, and below `/dicomweb` also doubled and trailing slashes.

    A proxy that serves the API under a prefix may remove the prefix or keep it.
    """
    steps, before = _steps(path), _steps(prefix)
    if steps[: len(before)] == before:
        steps = steps[len(before) :]
    if steps[:1] == [_STORE]:
        return "/" + "/".join(steps)
    return _without(path, prefix)


def routed_path(path: str, target: str, public_url: str | None) -> str:
    """Return the path by which a request is routed.

    Outside `/dicomweb` each path has one spelling, so that an access rule of a proxy for `/config`
    cannot be bypassed: a path with doubled or trailing slashes, or with `%63` for a letter, matches
    no route, because proxies differ in whether they normalize such paths.

    Args:
        path: The decoded path of the request.
        target: The request target as it was sent (RFC 9112 3.2).
        public_url: The URL whose path is the prefix that a proxy may keep.
    """
    written_prefix = urlsplit(public_url or "").path
    own = own_path(path, _decoded(written_prefix))
    if _steps(own)[:1] == [_STORE]:
        return own
    written = re.sub(r"^[a-zA-Z]+://[^/?#]*", "", target).partition("?")[0]
    is_normal = _ESCAPE.sub(_needed, _without(written, written_prefix)) == own
    # werkzeug merges slashes at the start.
    return own if is_normal and not own.startswith("//") else _NOWHERE


def _decoded(path: str) -> str:
    """WSGI decodes paths so (PEP 3333)."""
    return unquote_to_bytes(path).decode("latin-1")


def _needed(escape: re.Match[str]) -> str:
    """Decode an escape, unless its character must not be escaped (RFC 3986 6.2.2.2)."""
    character = chr(int(escape[1], 16))
    return escape[0] if re.fullmatch(r"[A-Za-z0-9._~/-]", character) else character


def _without(path: str, prefix: str) -> str:
    prefix = prefix.rstrip("/")
    return path.removeprefix(prefix) or "/" if f"{path}/".startswith(f"{prefix}/") else path


def _steps(path: str) -> list[str]:
    return [step for step in path.split("/") if step]


def bare_prefix(target: str, public_url: str | None) -> str | None:
    """Return the path of the public URL if a request names that path without a slash after it."""
    prefix = urlsplit(public_url or "").path.rstrip("/")
    return prefix if prefix and target.partition("?")[0] == prefix else None
