"""Conditional writes that reach an S3 store at the same time.

Threads are too slow for this: Python sends their requests one after the other, and a store that
accepts several of them is detected in one of thirty rounds. So each request is first sent without
the last byte of its body, and then all last bytes follow within a fraction of a millisecond.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from xml.etree import ElementTree

from shared.adapters.s3.requests import SignedRequests
from shared.errors import StoreUnavailable

_SECONDS = 9.0


@dataclass(frozen=True)
class Reply:
    """The answer of the store to one writer; `code` is the S3 error code, empty on success."""

    status: int
    code: str

    def __str__(self) -> str:
        return f"HTTP {self.status} {self.code}".rstrip()


def put_at_once(
    requests: SignedRequests, key: str, bodies: Sequence[bytes], condition: Mapping[str, str]
) -> list[Reply]:
    """Write each body to `key` under that condition, each over its own connection.

    Returns the answers in the order of `bodies`, none of which may be empty. Raises
    `StoreUnavailable` if an answer is missing.
    """
    with ExitStack() as stack:
        try:
            writers = [stack.enter_context(closing(_connection(requests))) for _ in bodies]
            for writer, body in zip(writers, bodies, strict=True):
                _begin(requests, writer, key, body, condition)
            for writer, body in zip(writers, bodies, strict=True):
                # A store may answer early and close the connection; its answer can be read.
                with suppress(BrokenPipeError, ConnectionResetError):
                    writer.send(body[-1:])
            return [_reply(writer.getresponse()) for writer in writers]
        except (OSError, HTTPException) as error:
            raise StoreUnavailable(
                f"object store {requests.server.geturl()}: no answer to one of {len(bodies)} "
                f"concurrent writes ({type(error).__name__}: {error}); check its health and log"
            ) from error


def _connection(requests: SignedRequests) -> HTTPConnection:
    server = requests.server
    host, port = server.hostname or "", server.port
    if server.scheme == "https":
        return HTTPSConnection(host, port, timeout=_SECONDS, context=requests.tls())
    return HTTPConnection(host, port, timeout=_SECONDS)


def _begin(
    requests: SignedRequests,
    writer: HTTPConnection,
    key: str,
    body: bytes,
    condition: Mapping[str, str],
) -> None:
    md5 = hashlib.md5(body, usedforsecurity=False).digest()
    target, headers = requests.signed(
        "PUT",
        key,
        len(body),
        {},
        # A bucket with object lock requires the MD5 digest.
        {**condition, "Content-Type": "text/plain", "Content-MD5": b64encode(md5).decode()},
        hashlib.sha256(body).hexdigest(),
    )
    writer.putrequest("PUT", target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        writer.putheader(name, value)
    writer.endheaders()
    with suppress(BrokenPipeError, ConnectionResetError):
        writer.send(body[:-1])


def _reply(response: HTTPResponse) -> Reply:
    body = response.read()
    if response.status < 300:
        return Reply(response.status, "")
    try:
        # The answer comes from the configured object store; minio-py parses it in the same way.
        code = ElementTree.fromstring(body).findtext("{*}Code") or ""  # noqa: S314
    except ElementTree.ParseError:
        code = ""
    return Reply(response.status, code)
