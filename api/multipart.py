"""A streaming reader of multipart/related bodies: RFC 2046 5.1, RFC 2387, DICOM PS3.18 8.6.1."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

MAX_BOUNDARY_CHARACTERS = 200
MAX_PREAMBLE_BYTES = 1 << 20
MAX_PART_HEADER_BYTES = 16 << 10
MAX_TRANSPORT_PADDING_BYTES = 256

# A value without quotes reaches to the next semicolon, so that `type=application/dicom`, which is
# not a token in the sense of RFC 2045 5.1 but is sent all the same, comes out whole.
_PARAMETER = re.compile(
    r""";\s*+ (?P<name>[^\s=;"]++) \s*+ = \s*+
        (?: "(?P<quoted>(?:[^"\\]|\\.)*+)" | (?P<plain>[^;]*+) )""",
    re.DOTALL | re.VERBOSE,
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
# PS3.10 7.1
_DICOM_PREFIX = b"DICM"

# A header block begins with the CR LF of the delimiter's line, behind which nothing is folded.
_FOLD = re.compile(rb"(?<=.)\r\n[ \t]+", re.DOTALL)


class MalformedMultipart(ValueError):
    """The body breaks RFC 2046. The text tells the sender what is wrong, and in which part."""


class ByteStream(Protocol):
    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, at least one, or none at the end of the stream."""


@dataclass(frozen=True)
class MediaType:
    """A Content-Type: the type in lower case, the parameters' names too, their values unquoted."""

    type: str
    parameters: Mapping[str, str]


def parse_media_type(header: str) -> MediaType:
    """Read a Content-Type header's value (RFC 2045 5.1). Never raises.

    What is no parameter is passed over; of two with one name the first counts; RFC 2231
    continuations are not joined. The type is all before the first semicolon, not validated.
    """
    parameters: dict[str, str] = {}
    for match in _PARAMETER.finditer(header):
        quoted = match["quoted"]
        value = match["plain"].strip() if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
        parameters.setdefault(match["name"].lower(), value)
    return MediaType(header.partition(";")[0].strip().lower(), parameters)


@dataclass(frozen=True, eq=False)
class Part:
    """One body part. Iterate it, once, for its body in pieces.

    `number` counts from 1. `headers` has lower-case names; of two with one name the first counts.
    The values are the sender's own, unvalidated. Iterating raises `MalformedMultipart` when the
    body ends inside this part, and whatever the stream raises.
    """

    number: int
    headers: Mapping[str, str]
    _chunks: Iterator[bytes]

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    @property
    def media_type(self) -> MediaType:
        """The part's Content-Type; its type is empty when the part has none."""
        return parse_media_type(self.headers.get("content-type", ""))


def read_parts(
    stream: ByteStream,
    boundary: str,
    chunk_bytes: int = 1 << 20,
    header_bytes: int = MAX_PART_HEADER_BYTES,
) -> Iterator[Part]:
    """Yield the parts of a body as they arrive, then read the epilogue to the end of the stream.

    What the caller leaves unread of a part is skipped when it asks for the next one. A boundary
    counts only after CR LF or at the very beginning, and only with nothing behind it on its line
    but `--` and up to 256 bytes of transport padding: everything else is data. The stream is
    asked for `chunk_bytes` at a time; whatever the body, the reader holds about twice that, the
    chunk it hands out included. The headers of a part are at most `header_bytes` long.

    Raises `MalformedMultipart`, and whatever the stream raises. The body was complete only if
    the iteration came to its own end.
    """
    body = _Body(stream, boundary, chunk_bytes, header_bytes)
    body.skip_preamble()
    while not body.is_closed:
        headers = body.read_headers()
        # Made of the method, not a generator: after an error it raises again rather than end, so
        # a caller that goes on to the next part cannot take a broken body for a complete one.
        part = Part(body.part_number, headers, iter(body.read_data, b""))
        yield part
        for _ in part:
            pass
    body.skip_epilogue()


class _Dropped:
    """Looks at what is read and forgotten, lest an instance be lost with it.

    RFC 2046 5.1.1 has preamble and epilogue ignored. But where a delimiter is malformed or missing,
    that is where the sender's instances end up, and it would be told that all is well.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._tail = b""

    def look_at(self, chunk: bytes) -> None:
        overlap = len(_DICOM_PREFIX) - 1
        if _DICOM_PREFIX in chunk or _DICOM_PREFIX in self._tail + chunk[:overlap]:
            raise MalformedMultipart(
                f"a DICOM instance lies {self._place}: a line that should be a delimiter is none. "
                "It is '--' and the boundary given in Content-Type, between CR LF and CR LF"
            )
        self._tail = (self._tail + chunk[-overlap:])[-overlap:]


class _Body:
    """A window over the stream, and the place in it up to which everything was handed out."""

    def __init__(
        self, stream: ByteStream, boundary: str, chunk_bytes: int, header_bytes: int
    ) -> None:
        # Latin-1 is how WSGI decodes a header (PEP 3333). Without control characters the
        # delimiter has a single CR, its first byte: no two candidates can overlap.
        if not re.fullmatch(rf"[ -~\x80-\xff]{{1,{MAX_BOUNDARY_CHARACTERS}}}", boundary):
            raise MalformedMultipart(
                f"the boundary in Content-Type must be 1 to {MAX_BOUNDARY_CHARACTERS} characters "
                "long, without control characters"
            )
        self.is_closed = False
        self.part_number = 0
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._header_bytes = header_bytes
        self._delimiter = b"\r\n--" + boundary.encode("latin-1")
        # A match without `line_end` is cut off by the end of the window: more is needed to decide.
        self._delimiter_line = re.compile(
            re.escape(self._delimiter)
            + rb"(?:(?P<close>--)?+[ \t]{0,%d}+(?:(?P<line_end>\r\n)|(?P<half>\r)?\Z)|-\Z)"
            % MAX_TRANSPORT_PADDING_BYTES
        )
        # The beginning of the body serves a delimiter as the beginning of a line.
        self._window = b"\r\n"
        self._position = 2

    def skip_preamble(self) -> None:
        if not self._read_more(keep_from=0):
            raise MalformedMultipart("the body is empty: it has not even a closing delimiter")
        preamble_bytes = 0
        dropped = _Dropped("in front of the first delimiter")
        for chunk in iter(self.read_data, b""):
            dropped.look_at(chunk)
            preamble_bytes += len(chunk)
            if preamble_bytes > MAX_PREAMBLE_BYTES:
                raise MalformedMultipart(
                    f"no delimiter in the first {MAX_PREAMBLE_BYTES} bytes: no line, ended by "
                    "CR LF, is '--' and the boundary given in Content-Type"
                )

    def read_headers(self) -> dict[str, str]:
        """The headers of the part that begins here, on the CR LF of its delimiter's line."""
        self.part_number += 1
        searched = 0
        while True:
            start, limit = self._position, self._position + self._header_bytes + 4
            end = self._window.find(b"\r\n\r\n", max(start, searched - 3), limit)
            if end >= 0:
                break
            if len(self._window) >= limit:
                raise MalformedMultipart(
                    f"the headers of part {self.part_number} are longer than "
                    f"{self._header_bytes} bytes, or the blank line behind them is missing"
                )
            searched = len(self._window) - start
            if not self._read_more(keep_from=start):
                raise MalformedMultipart(
                    "the closing delimiter is missing: the body ended inside the headers of part "
                    f"{self.part_number}"
                )
        self._position = end + 4
        unfolded = _FOLD.sub(b" ", self._window[start:end])
        headers: dict[str, str] = {}
        for header_number, line in enumerate(unfolded.split(b"\r\n")[1:], start=1):
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or line.startswith(self._delimiter[2:]):
                raise MalformedMultipart(
                    f"header {header_number} of part {self.part_number} is no header: it has no "
                    "colon, or the blank line behind the headers is missing"
                )
            headers.setdefault(name.strip().lower(), value.strip())
        return headers

    def read_data(self) -> bytes:
        """The next bytes before the coming delimiter; none once that is reached, and passed."""
        while True:
            window, start = self._window, self._position
            # The CR LF that ends the headers may be the one that begins the delimiter.
            search_from = max(start - 2, 0)
            candidate = window.find(self._delimiter, search_from)
            # find is several times as fast, but called for each of many look-alikes it is not.
            line = self._delimiter_line.search(window, candidate) if candidate >= 0 else None
            data_end = line.start() if line else self._unfinished_delimiter(search_from)
            if data_end > start:
                self._position = data_end
                return window[start:data_end]
            if line and line["line_end"]:
                self._position = line.end() - 2
                self.is_closed = line["close"] is not None
                return b""
            would_close = line is not None and line["close"] and not line["half"]
            del window, line  # or the old window would live on beside the new one
            if not self._read_more(keep_from=data_end):
                if would_close:
                    self.is_closed = True
                    return b""
                raise MalformedMultipart(
                    f"the closing delimiter is missing: the body ended inside part "
                    f"{self.part_number}"
                    if self.part_number
                    else "no delimiter in the body: no line, ended by CR LF, is '--' and the "
                    "boundary given in Content-Type"
                )

    def skip_epilogue(self) -> None:
        dropped = _Dropped("behind the closing delimiter")
        dropped.look_at(self._window[self._position :])
        self._window = b""
        while chunk := self._stream.read(self._chunk_bytes):
            dropped.look_at(chunk)

    def _unfinished_delimiter(self, search_from: int) -> int:
        """Where the window ends in the beginning of a delimiter; its length if it does not."""
        window = self._window
        start = window.rfind(b"\r", max(search_from, len(window) - len(self._delimiter) + 1))
        return start if start >= 0 and self._delimiter.startswith(window[start:]) else len(window)

    def _read_more(self, keep_from: int) -> bool:
        """Drop the window before `keep_from`, and add to it; False at the end of the stream."""
        self._window = self._window[keep_from:]
        self._position -= keep_from
        piece = self._stream.read(self._chunk_bytes)
        self._window += piece  # no copy when nothing was kept
        return bool(piece)
