"""What the text of a setting becomes. Each raises ValueError, with what would be right."""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", text)
    if not found or int(found[2]) > 65535:
        raise ValueError("host:port with a port from 0 to 65535, such as 127.0.0.1:8080")
    return Address(found[1].strip("[]"), int(found[2]))


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
        if value < least or (most is not None and value > most):
            bound = f"of {least} or more" if most is None else f"from {least} to {most}"
            digits = ", of 18 digits at most" if len(text) > 18 else ""
            raise ValueError(f"a whole number {bound}{digits}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(" or ".join(choices))
        return text

    return parse


# RFC 3986 2; it goes into headers and data sets.
_URL_CHARACTERS = r"(?:[A-Za-z0-9_.~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+"
# Of a URL with a user and a password, which are used as they are.
_CHARACTERS_OF_A_LOGIN = r"[^\s\x00-\x1f]+"


def url(*schemes: str, path: bool = False, user: bool = False) -> Callable[[str], str]:
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


def broker(text: str) -> str:
    """One URL, or several with commas between; a comma in a password is not one of these."""
    urls = re.split(r",\s*(?=amqps?://)", text)
    words = ("memory",) if len(urls) == 1 else ()
    one = url(*words, "amqp://", "amqps://", path=True, user=True)
    try:
        if any("," in each.rpartition("@")[2] for each in urls):
            raise ValueError("memory or amqp(s)://user:password@host:port/vhost")
        return ",".join(map(one, urls))
    except ValueError as error:
        raise ValueError(f"{error}; for several nodes, such URLs with commas between") from None


def without_password(url: str) -> str:
    """For messages about what may be no URL."""
    return re.sub(r"(?s).*@", "…@", url)


http_url = url("http://", "https://", path=True)
"""Without a slash at the end. Raises ValueError, with what would be right, for anything else."""


def bucket_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", text) or ".." in text:
        raise ValueError("a bucket name: 3 to 63 of a-z 0-9 . -, first and last a letter or digit")
    return text


def amqp_name(text: str) -> str:
    if not 1 <= len(text.encode()) <= 200 or not text.isprintable():
        raise ValueError("1 to 200 bytes of printable text")
    return text


def flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def some_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        given = tuple(word.strip() for word in text.split(","))
        if not set(given) <= set(choices):
            raise ValueError(f"some of {', '.join(choices)}, with commas between")
        return given

    return parse


def origins(text: str) -> tuple[str, ...]:
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


def header_names(text: str) -> tuple[str, ...]:
    """RFC 9110 5.1, but for `*`, which would let a page send any."""
    given = tuple(word.strip() for word in text.split(","))
    if not all(re.fullmatch(r"[A-Za-z0-9!#$%&'+.^_`|~-]+", name) for name in given):
        raise ValueError(
            "names of header fields, with commas between, such as traceparent,baggage,sentry-trace"
        )
    return given


def proxies(text: str) -> int | tuple[Network, ...]:
    if re.fullmatch(r"[0-9]|1[0-6]", text):
        return int(text)
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError(
            "a number from 0 to 16, or addresses or networks such as 10.0.3.7,fd00::/64 with no "
            "bits set behind their length"
        ) from None


def keys_source(text: str) -> str:
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


def plain_text(text: str) -> str:
    return text


def visible(text: str) -> str:
    """What is sent in a header field as it is."""
    if not re.fullmatch("[!-~]+", text):
        raise ValueError("visible ASCII characters without spaces")
    return text


def absolute_path(text: str) -> Path:
    return Path(text).absolute()
