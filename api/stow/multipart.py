"""A streaming reader of multipart/related bodies (RFC 2046 5.1, RFC 2387, PS3.18 8.6.1)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_BOUNDARY_CHARACTERS = 200
MAX_PREAMBLE_BYTES = 1 << 20
MAX_PART_HEADER_BYTES = 16 << 10
MAX_TRANSPORT_PADDING_BYTES = 256
MAX_TRAILING_TEXT_BYTES = 4 << 10

# An unquoted value ends at the next semicolon. So `type=application/dicom` is read completely,
# which senders use although it is not a token of RFC 2045 5.1.
_PARAMETER = re.compile(
    r""";\s*+ (?P<name>[^\s=;"]++) \s*+ = \s*+
        (?: "(?P<quoted>(?:[^"\\]|\\.)*+)" | (?P<plain>[^;]*+) )""",
    re.DOTALL | re.VERBOSE,
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
# PS3.10 7.1
_DICOM_PREFIX = b"DICM"

# A header block begins with the CR LF of the delimiter line, after which no folding is possible.
_FOLD = re.compile(rb"(?<=.)\r\n[ \t]+", re.DOTALL)


class MalformedMultipart(ValueError):
    """The body violates RFC 2046. The message names the error and the part."""


class ByteStream(Protocol):
    def read(self, size: int, /) -> bytes:
        """Return 1 to `size` bytes, or none at the end of the stream."""


@dataclass(frozen=True)
class MediaType:
    """A Content-Type, with type and parameter names in lower case and values unquoted."""

    type: str
    parameters: Mapping[str, str]


def parse_media_type(header: str) -> MediaType:
    """Parse the value of a Content-Type header (RFC 2045 5.1). Never raises.

    The type, which is not validated, ends at the first semicolon. Malformed parameters are
    skipped, the first of duplicate parameters counts, and RFC 2231 continuations are not joined.
    """
    parameters: dict[str, str] = {}
    for match in _PARAMETER.finditer(header):
        quoted = match["quoted"]
        value = match["plain"].strip() if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
        parameters.setdefault(match["name"].lower(), value)
    return MediaType(header.partition(";")[0].strip().lower(), parameters)


@dataclass(frozen=True, eq=False)
class Part:
    """One body part. Iterate it once to read its content.

    `number` counts from 1. `headers` has names in lower case and values that are not validated; the
    first of duplicate headers counts. Iterating raises `MalformedMultipart` if the body ends inside
    this part, and the errors of the stream.
    """

    number: int
    headers: Mapping[str, str]
    _chunks: Iterator[bytes]

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    @property
    def media_type(self) -> MediaType:
        """The Content-Type of the part; its type is empty if the part has none."""
        return parse_media_type(self.headers.get("content-type", ""))


def read_parts(
    stream: ByteStream,
    boundary: str,
    chunk_bytes: int = 1 << 20,
    header_bytes: int = MAX_PART_HEADER_BYTES,
) -> Iterator[Part]:
    """Yield the parts of a body as they arrive, then read the epilogue.

    Unread data of a part is skipped when the next part is requested. The body is complete only if
    the iteration ends without an error.

    A delimiter is a boundary after CR LF, or at the start of the body, followed on its line only by
    `--` and up to 256 bytes of transport padding. Anything else is data. The closing delimiter may
    end in CR, LF or NUL, and anything may follow except an instance or another delimiter. If other
    bytes follow directly, it counts only if the body ends within 4 KiB without another delimiter:
    a similar sequence inside an instance remains data.

    Args:
        stream: The body.
        boundary: The boundary parameter of the Content-Type.
        chunk_bytes: The size of each read; the reader needs about twice that in memory.
        header_bytes: The maximum size of the headers of one part.

    Raises:
        MalformedMultipart: The body violates RFC 2046. Errors of the stream are passed on.
    """
    body = _Body(stream, boundary, chunk_bytes, header_bytes)
    body.skip_preamble()
    while not body.is_closed:
        headers = body.read_headers()
        # Not a generator, which would end after an error: this raises again, so a caller that
        # continues with the next part cannot treat a broken body as complete.
        part = Part(body.part_number, headers, iter(body.read_data, b""))
        yield part
        for _ in part:
            pass
    body.skip_epilogue()


class _Discarded:
    """Checks discarded data for a DICOM instance.

    Preamble and epilogue are to be ignored (RFC 2046 5.1.1). But if a delimiter is malformed or
    missing, they contain instances, which would be lost while the response reports success.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._tail = b""

    def check(self, chunk: bytes) -> None:
        overlap = len(_DICOM_PREFIX) - 1
        if _DICOM_PREFIX in chunk or _DICOM_PREFIX in self._tail + chunk[:overlap]:
            raise MalformedMultipart(
                f"a DICOM instance {self._place}: a delimiter is missing or malformed. It must be "
                "'--' and the boundary given in Content-Type, between CR LF and CR LF"
            )
        self._tail = (self._tail + chunk[-overlap:])[-overlap:]


class _Delimiter(NamedTuple):
    """A delimiter, from its CR LF to the end of its transport padding, as window positions.

    One that is not certain may turn out to be data, depending on the bytes that follow. At the end
    of the body it counts only if it is closing.
    """

    start: int
    end: int
    is_closing: bool
    is_certain: bool


class _Body:
    """A window over the stream, and the position of the next byte to return."""

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
        # `cut` matches at the end of the window, where more data has to decide.
        padding = rb"[ \t]{0,%d}+" % MAX_TRANSPORT_PADDING_BYTES
        self._delimiter_line = re.compile(
            re.escape(self._delimiter)
            + rb"(?:(?P<open>%b(?=\r\n))|(?P<close>--%b(?=[\r\n\0]))|(?P<cut>(?:-|%b\r?)\Z))"
            % (padding, padding, padding)
        )
        # A delimiter may stand at the very beginning of the body, as after a CR LF.
        self._window = b"\r\n"
        self._position = 2

    def skip_preamble(self) -> None:
        if not self._read_more(keep_from=0):
            raise MalformedMultipart("the body is empty: the closing delimiter is missing")
        preamble_bytes = 0
        discarded = _Discarded("precedes the first delimiter")
        for chunk in iter(self.read_data, b""):
            discarded.check(chunk)
            preamble_bytes += len(chunk)
            if preamble_bytes > MAX_PREAMBLE_BYTES:
                raise MalformedMultipart(
                    f"no delimiter in the first {MAX_PREAMBLE_BYTES} bytes: it must be a line, "
                    "ended by CR LF, with '--' and the boundary given in Content-Type"
                )

    def read_headers(self) -> dict[str, str]:
        """Read the headers of the next part, from the CR LF of its delimiter line on."""
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
                    f"{self._header_bytes} bytes, or the blank line after them is missing"
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
                    f"header {header_number} of part {self.part_number} is not valid: it has no "
                    "colon, or the blank line after the headers is missing"
                )
            headers.setdefault(name.strip().lower(), value.strip())
        return headers

    def read_data(self) -> bytes:
        """Return the next data; none at a delimiter, which is skipped."""
        data = self._read_to_delimiter()
        if data is None:
            raise MalformedMultipart(
                f"the closing delimiter is missing: the body ended inside part {self.part_number}"
                if self.part_number
                else "no delimiter in the body: it must be a line, ended by CR LF, with '--' and "
                "the boundary given in Content-Type"
            )
        return data

    def skip_epilogue(self) -> None:
        discarded = _Discarded("follows the closing delimiter")
        while data := self._read_to_delimiter():
            discarded.check(data)
        if data is not None:
            raise MalformedMultipart(
                "a delimiter follows the closing delimiter, which has '--' after the boundary and "
                "may follow only the last part"
            )

    def _read_to_delimiter(self) -> bytes | None:
        """Do the work of `read_data`; None if the stream ends before a delimiter."""
        while True:
            window, start = self._window, self._position
            # The CR LF that ends the headers may also begin the delimiter.
            found = self._find_delimiter(max(start - 2, 0))
            data_end = found.start if found else len(window)
            if data_end > start:
                self._position = data_end
                return window[start:data_end]
            if found and found.is_certain:
                self._position, self.is_closed = found.end, found.is_closing
                return b""
            del window  # frees the old window before the new one is built
            if not self._read_more(keep_from=data_end):
                if not found or not found.is_closing:
                    return None
                self._position, self.is_closed = found.end - data_end, True
                return b""

    def _find_delimiter(self, search_from: int) -> "_Delimiter | None":
        """Find the next delimiter in the window, or a sequence that may become one."""
        window = self._window
        candidate = window.find(self._delimiter, search_from)
        # find is several times faster than a search, except for many similar sequences.
        line = self._delimiter_line.search(window, candidate) if candidate >= 0 else None
        if line and line["cut"] is None:
            return _Delimiter(*line.span(), is_closing=line["close"] is not None, is_certain=True)
        # With trailing text, only the last one can be the closing delimiter.
        closing = self._delimiter + b"--"
        start = window.rfind(closing, max(search_from, len(window) - MAX_TRAILING_TEXT_BYTES))
        if start >= 0:
            return _Delimiter(start, start + len(closing), is_closing=True, is_certain=False)
        if line:
            return _Delimiter(*line.span(), is_closing=False, is_certain=False)
        start = window.rfind(b"\r", max(search_from, len(window) - len(self._delimiter) + 1))
        if start >= 0 and self._delimiter.startswith(window[start:]):
            return _Delimiter(start, len(window), is_closing=False, is_certain=False)
        return None

    def _read_more(self, keep_from: int) -> bool:
        """Discard the window before `keep_from` and read more; False at the end of the stream."""
        self._window = self._window[keep_from:]
        self._position -= keep_from
        piece = self._stream.read(self._chunk_bytes)
        self._window += piece  # no copy when nothing was kept
        return bool(piece)
