"""Paths as they are routed here, however they were written or passed on."""

import re
from urllib.parse import unquote_to_bytes, urlsplit

_STORE = "dicomweb"

_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")

_NOWHERE = "/."
"""A path that nothing is routed to."""


def own_path(path: str, prefix: str) -> str:
    """`path` without `prefix` where it begins with that; and below `/dicomweb`, with one slash
    between its steps and none behind.

    So it does not matter whether a proxy that serves all this under a prefix takes it away.
    """
    steps, before = _steps(path), _steps(prefix)
    if steps[: len(before)] == before:
        steps = steps[len(before) :]
    if steps[:1] == [_STORE]:
        return "/" + "/".join(steps)
    return _without(path, prefix)


def routed_path(path: str, target: str, public_url: str | None) -> str:
    """`own_path` of a request with this `target` (RFC 9112 3.2), whose path is `path` once decoded.

    Outside `/dicomweb` each path has one spelling, so that a rule of a proxy about `/config` holds.
    With slashes doubled or behind it, or with `%63` for a letter, a path is not ours: a proxy may
    compare such paths as they are or not.
    """
    written_prefix = urlsplit(public_url or "").path
    own = own_path(path, _decoded(written_prefix))
    if _steps(own)[:1] == [_STORE]:
        return own
    written = re.sub(r"^[a-zA-Z]+://[^/?#]*", "", target).partition("?")[0]
    is_normal = _ESCAPE.sub(_needed, _without(written, written_prefix)) == own
    # werkzeug folds slashes at the start.
    return own if is_normal and not own.startswith("//") else _NOWHERE


def _decoded(path: str) -> str:
    """As WSGI decodes it (PEP 3333)."""
    return unquote_to_bytes(path).decode("latin-1")


def _needed(escape: re.Match[str]) -> str:
    """The character, unless it needs no escape (RFC 3986 6.2.2.2)."""
    character = chr(int(escape[1], 16))
    return escape[0] if re.fullmatch(r"[A-Za-z0-9._~/-]", character) else character


def _without(path: str, prefix: str) -> str:
    prefix = prefix.rstrip("/")
    return path.removeprefix(prefix) or "/" if f"{path}/".startswith(f"{prefix}/") else path


def _steps(path: str) -> list[str]:
    return [step for step in path.split("/") if step]
