"""A streaming reader of multipart/related bodies: RFC 2046 5.1, RFC 2387, DICOM PS3.18 8.6.1."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_BOUNDARY_CHARACTERS = 200
MAX_PREAMBLE_BYTES = 1 << 20
MAX_PART_HEADER_BYTES = 16 << 10
MAX_TRANSPORT_PADDING_BYTES = 256
MAX_TEXT_BEHIND_BYTES = 4 << 10

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
    but `--` and up to 256 bytes of transport padding: everything else is data. The closing one
    may end in any of CR, LF and NUL, and behind that may stand anything but an instance or
    another delimiter. With other bytes directly behind it, it counts if the body ends within
    4 KiB and no delimiter comes in between; so what only resembles it in the middle of an instance
    stays data.

    The stream is asked for `chunk_bytes` at a time; whatever the body, the reader holds about
    twice that, the chunk it hands out included. The headers of a part are at most `header_bytes`
    long.

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


class _Delimiter(NamedTuple):
    """From its CR LF to the end of its transport padding, as places in the window.

    One that is not certain may be data, depending on what comes. If nothing does, it is a closing
    delimiter, or none.
    """

    start: int
    end: int
    is_closing: bool
    is_certain: bool


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
        # With `cut` it is the end of the window that keeps it from being one of the others.
        padding = rb"[ \t]{0,%d}+" % MAX_TRANSPORT_PADDING_BYTES
        self._delimiter_line = re.compile(
            re.escape(self._delimiter)
            + rb"(?:(?P<open>%b(?=\r\n))|(?P<close>--%b(?=[\r\n\0]))|(?P<cut>(?:-|%b\r?)\Z))"
            % (padding, padding, padding)
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
        data = self._read_to_delimiter()
        if data is None:
            raise MalformedMultipart(
                f"the closing delimiter is missing: the body ended inside part {self.part_number}"
                if self.part_number
                else "no delimiter in the body: no line, ended by CR LF, is '--' and the "
                "boundary given in Content-Type"
            )
        return data

    def skip_epilogue(self) -> None:
        dropped = _Dropped("behind the closing delimiter")
        while data := self._read_to_delimiter():
            dropped.look_at(data)
        if data is not None:
            raise MalformedMultipart(
                "another delimiter stands behind the closing delimiter, which has '--' behind the "
                "boundary and may follow the last part only"
            )

    def _read_to_delimiter(self) -> bytes | None:
        """As `read_data`; None where the stream ends first."""
        while True:
            window, start = self._window, self._position
            # The CR LF that ends the headers may be the one that begins the delimiter.
            found = self._find_delimiter(max(start - 2, 0))
            data_end = found.start if found else len(window)
            if data_end > start:
                self._position = data_end
                return window[start:data_end]
            if found and found.is_certain:
                self._position, self.is_closed = found.end, found.is_closing
                return b""
            del window  # or the old window would live on beside the new one
            if not self._read_more(keep_from=data_end):
                if not found or not found.is_closing:
                    return None
                self._position, self.is_closed = found.end - data_end, True
                return b""

    def _find_delimiter(self, search_from: int) -> "_Delimiter | None":
        """The next one in the window, or what may turn out to be one."""
        window = self._window
        candidate = window.find(self._delimiter, search_from)
        # find is several times as fast, but called for each of many look-alikes it is not.
        line = self._delimiter_line.search(window, candidate) if candidate >= 0 else None
        if line and line["cut"] is None:
            return _Delimiter(*line.span(), is_closing=line["close"] is not None, is_certain=True)
        # Of several with text behind them only the last can be the closing one.
        closing = self._delimiter + b"--"
        start = window.rfind(closing, max(search_from, len(window) - MAX_TEXT_BEHIND_BYTES))
        if start >= 0:
            return _Delimiter(start, start + len(closing), is_closing=True, is_certain=False)
        if line:
            return _Delimiter(*line.span(), is_closing=False, is_certain=False)
        start = window.rfind(b"\r", max(search_from, len(window) - len(self._delimiter) + 1))
        if start >= 0 and self._delimiter.startswith(window[start:]):
            return _Delimiter(start, len(window), is_closing=False, is_certain=False)
        return None

    def _read_more(self, keep_from: int) -> bool:
        """Drop the window before `keep_from`, and add to it; False at the end of the stream."""
        self._window = self._window[keep_from:]
        self._position -= keep_from
        piece = self._stream.read(self._chunk_bytes)
        self._window += piece  # no copy when nothing was kept
        return bool(piece)
