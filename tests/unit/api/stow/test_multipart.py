import email
import io
import itertools
import random
import re
import string
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from api.stow.multipart import MalformedMultipart, MediaType, Part, parse_media_type, read_parts

KIB, MIB = 1 << 10, 1 << 20


class UnevenStream:
    """Returns at most the n-th of `sizes` bytes for the n-th read, cyclically."""

    def __init__(self, body: bytes, sizes: Iterable[int]) -> None:
        self._body = io.BytesIO(body)
        self._sizes = itertools.cycle(sizes)

    def read(self, size: int) -> bytes:
        return self._body.read(min(size, next(self._sizes)))


class EndlessStream:
    """Generates the head, `filler` repeated up to `size_bytes`, and the tail."""

    def __init__(self, head: bytes, filler: bytes, size_bytes: int, tail: bytes = b"") -> None:
        self._ends = [head, tail]
        self._filler = filler
        self._left_bytes = size_bytes

    def read(self, size: int) -> bytes:
        if len(self._ends) == 2:
            return self._ends.pop(0)
        if self._left_bytes > 0:
            piece = self._filler * (size // len(self._filler))
            self._left_bytes -= len(piece)
            return piece
        return self._ends.pop() if self._ends else b""


def read_all(
    body: bytes,
    boundary: str = "b",
    sizes: Iterable[int] = (MIB,),
    chunk_bytes: int = MIB,
) -> list[tuple[dict[str, str], bytes]]:
    parts = read_parts(UnevenStream(body, sizes), boundary, chunk_bytes)
    return [(dict(part.headers), b"".join(part)) for part in parts]


def bodies(body: bytes, boundary: str = "b") -> list[bytes]:
    at_once = [data for _, data in read_all(body, boundary)]
    assert at_once == [data for _, data in read_all(body, boundary, sizes=[1])]
    return at_once


def error_of(body: bytes, boundary: str = "b") -> str:
    with pytest.raises(MalformedMultipart) as at_once:
        read_all(body, boundary)
    with pytest.raises(MalformedMultipart) as by_bytes:
        read_all(body, boundary, sizes=[1])
    assert str(at_once.value) == str(by_bytes.value)
    return str(at_once.value)


# Content-Type


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ('multipart/related; type="application/dicom"; boundary="0f3c-9d2e"', "0f3c-9d2e"),
        ('multipart/related; type="application/dicom"; boundary=0f3c-9d2e', "0f3c-9d2e"),
        ("multipart/related; type=application/dicom; boundary=-----0f3c", "-----0f3c"),
        ("multipart/related; boundary=0f3c; type=application/dicom", "0f3c"),
        ('multipart/related;type="application/dicom";boundary=0f3c', "0f3c"),
        (
            "multipart/related; type=application/dicom; boundary=---DICOM-INSTASNCE---",
            "---DICOM-INSTASNCE---",
        ),
        ("MULTIPART/Related ; TYPE = application/dicom ; Boundary = aB ", "aB"),
        (
            "multipart/related; type=application/dicom; transfer-syntax=1.2.840.10008.1.2.1; "
            "boundary=0f3c",
            "0f3c",
        ),
    ],
)
def test_content_types_of_real_senders_are_understood(header: str, boundary: str) -> None:
    media_type = parse_media_type(header)

    assert media_type.type == "multipart/related"
    assert media_type.parameters["type"] == "application/dicom"
    assert media_type.parameters["boundary"] == boundary


def test_a_content_type_may_have_a_boundary_without_a_type() -> None:
    assert parse_media_type("multipart/related; boundary=0f3c") == MediaType(
        "multipart/related", {"boundary": "0f3c"}
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", MediaType("", {})),
        ("Application/DICOM", MediaType("application/dicom", {})),
        ("a/b; transfer-syntax=*", MediaType("a/b", {"transfer-syntax": "*"})),
        ('a/b; x="1; y=2"; z=3', MediaType("a/b", {"x": "1; y=2", "z": "3"})),
        (r'a/b; x="say \"a\\b\""', MediaType("a/b", {"x": r'say "a\b"'})),
        ('a/b; x=""; y=', MediaType("a/b", {"x": "", "y": ""})),
        ("a/b; x=1; x=2", MediaType("a/b", {"x": "1"})),
        ("a/b; ; junk; x=1;", MediaType("a/b", {"x": "1"})),
        ('a/b; x="never closed; y=2', MediaType("a/b", {"x": '"never closed', "y": "2"})),
        ("a/b; x*0=1; x*1=2", MediaType("a/b", {"x*0": "1", "x*1": "2"})),
        ("not a media type", MediaType("not a media type", {})),
    ],
)
def test_a_malformed_content_type_keeps_its_valid_parameters(
    header: str, expected: MediaType
) -> None:
    assert parse_media_type(header) == expected


@pytest.mark.parametrize(
    "hostile",
    [
        ";" * 10_000,
        ';x="' * 2_500,
        '; x="' + "\\" * 9_999,
        ";" + " " * 10_000,
        ";=\x00\r\n\x7f" * 99,
        "; x*0*=utf-8''%zz; x*9999999999999999999999*=y; boundary*=\udcff",
    ],
)
def test_a_hostile_content_type_keeps_the_boundary_before_it(hostile: str) -> None:
    assert parse_media_type("a/b; boundary=0f3c" + hostile).parameters["boundary"] == "0f3c"


@settings(deadline=None)
@given(st.text())
def test_no_content_type_raises(header: str) -> None:
    assert parse_media_type(header).type == header.partition(";")[0].strip().lower()


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=255)))
def test_a_quoted_parameter_is_unquoted(value: str) -> None:
    quoted = re.sub(r'(["\\])', r"\\\1", value)

    assert parse_media_type(f'a/b; x="{quoted}"; y=1').parameters == {"x": value, "y": "1"}


# Bodies of real senders

DICOM = b"\x00" * 128 + b"DICM\x02\x00\r\n--\xff\r\n \n"


@pytest.mark.parametrize(
    ("boundary", "body", "headers"),
    [
        pytest.param(
            "0f3c",
            b"\r\n--0f3c\r\nContent-Type: application/dicom\r\n\r\n" + DICOM + b"\r\n--0f3c--",
            {"content-type": "application/dicom"},
            id="dicomweb-client: CR LF first, none at the end",
        ),
        pytest.param(
            "4e5f-a1b2",
            b"--4e5f-a1b2\r\nContent-Type: application/dicom\r\nContent-Length: 142\r\n\r\n"
            + DICOM
            + b"\r\n--4e5f-a1b2--\r\n",
            {"content-type": "application/dicom", "content-length": "142"},
            id="Orthanc: Content-Length",
        ),
        pytest.param(
            "myboundary",
            b"\r\n--myboundary\r\nContent-Type: application/dicom\r\n\r\n"
            + DICOM
            + b"\r\n--myboundary--\r\n",
            {"content-type": "application/dicom"},
            id="dcm4che stowrs: CR LF first and last",
        ),
        pytest.param(
            "9a8b7c",
            b"--9a8b7c\r\nContent-Disposition: form-data; name=dicomfile; filename=x.dcm\r\n"
            b"Content-Type: application/dicom\r\n\r\n" + DICOM + b"\r\n--9a8b7c--\r\n",
            {
                "content-disposition": "form-data; name=dicomfile; filename=x.dcm",
                "content-type": "application/dicom",
            },
            id="Microsoft tutorial and Weasis: Content-Disposition",
        ),
        pytest.param(
            "------------------------d74496d66958873e",
            b"--------------------------d74496d66958873e\r\nContent-Type: application/dicom\r\n\r\n"
            + DICOM
            + b"\r\n--------------------------d74496d66958873e--\r\n",
            {"content-type": "application/dicom"},
            id="curl: boundary of leading dashes",
        ),
        pytest.param(
            "---DICOM-INSTASNCE---",
            b"-----DICOM-INSTASNCE---\r\nContent-Type: application/dicom\r\n\r\n"
            + DICOM
            + b"\r\n-----DICOM-INSTASNCE-----",
            {"content-type": "application/dicom"},
            id="MONAI: boundary that ends in dashes too",
        ),
        pytest.param(
            "0f3c",
            b"--0f3c\r\nContent-Type: application/dicom\r\nContent-Encoding: gzip, identity\r\n\r\n"
            + DICOM
            + b"\r\n--0f3c--",
            {"content-type": "application/dicom", "content-encoding": "gzip, identity"},
            id="Karnak: Content-Encoding that is not true",
        ),
        pytest.param(
            "-RSNA",
            b"---RSNA\r\nContent-Type: application/dicom\r\n\r\n" + DICOM + b"\r\n---RSNA--\r\n",
            {"content-type": "application/dicom"},
            id="RSNA CTP: boundary of one leading dash",
        ),
        pytest.param(
            "0f3c",
            b"--0f3c\r\nContent-Type: application/dicom\r\n"
            b"Content-Transfer-Encoding: binary\r\n\r\n" + DICOM + b"\r\n--0f3c--\r\n",
            {"content-type": "application/dicom", "content-transfer-encoding": "binary"},
            id="Google adapter: Content-Transfer-Encoding",
        ),
    ],
)
@pytest.mark.parametrize("sizes", [[MIB], [1], [7, 1, 3]])
def test_the_framing_of_real_senders_is_read(
    boundary: str, body: bytes, headers: dict[str, str], sizes: list[int]
) -> None:
    assert read_all(body, boundary, sizes) == [(headers, DICOM)]


# Begin and end of the body


def test_preamble_and_epilogue_text_is_ignored() -> None:
    body = b"This is\r\na preamble --b\r\n--b\r\n\r\ndata\r\n--b--\r\nan epilogue --b\n--b--\r\nx"

    assert bodies(body) == [b"data"]


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\n", id="LF"),
        pytest.param(b"\r", id="CR"),
        pytest.param(b"\0", id="NUL"),
        pytest.param(b"\0" * 10_000, id="NULs, as of npm dicomweb-client"),
        pytest.param(b" \t\0\r\n", id="padding and NUL"),
        pytest.param(b"\r\r\n\n", id="line ends"),
        pytest.param(b"\n" + b"text " * 10_000, id="LF and text"),
        pytest.param(b"\r\n--bb\r\n--b", id="what only resembles a delimiter"),
        pytest.param(b"text", id="text"),
        pytest.param(b"-", id="dash"),
        pytest.param(b" " * 300, id="padding that is too long"),
        pytest.param(b"x" * 4000, id="4 kB of text"),
        pytest.param(b"text\r\n--b", id="text and half a delimiter"),
    ],
)
@pytest.mark.parametrize("sizes", [[1], [7], [4096], [MIB]])
def test_any_data_but_an_instance_or_delimiter_may_follow_the_closing_delimiter(
    tail: bytes, sizes: list[int]
) -> None:
    body = b"--b\r\n\r\n1\r\n--b\r\n\r\n2\r\n--b--" + tail

    assert [data for _, data in read_all(body, sizes=sizes)] == [b"1", b"2"]


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n\r\n", b"\r\r\n", b"\0\0\r\n", b"\r\ntext\r\n"])
@pytest.mark.parametrize("delimiter", [b"--b--", b"--b--\r\n", b"--b\r\n\r\n3\r\n--b--", b"--b--x"])
def test_a_delimiter_after_the_closing_one_is_malformed(line_end: bytes, delimiter: bytes) -> None:
    """The data between them may be the rest of a part, and the first one only similar data."""
    error = error_of(b"--b\r\n\r\n1\r\n--b--" + line_end + delimiter)

    assert error.startswith("a delimiter follows the closing delimiter")


def test_a_closing_delimiter_directly_followed_by_long_text_is_data() -> None:
    body = b"--b\r\n\r\n1\r\n--b--" + b"x" * 4097

    assert "the closing delimiter is missing" in error_of(body)
    assert bodies(body + b"\r\n--b--") == [b"1\r\n--b--" + b"x" * 4097]


def test_the_last_possible_closing_delimiter_counts() -> None:
    assert bodies(b"--b\r\n\r\n1\r\n--b--x\r\n--b--y\r\n--b--z") == [b"1\r\n--b--x\r\n--b--y"]


@pytest.mark.parametrize(
    "body", [b"--b--", b"\r\n--b--\r\n", b"preamble\r\n--b-- \t\r\n", b"--b-- "]
)
def test_a_closing_delimiter_alone_is_a_body_without_parts(body: bytes) -> None:
    assert bodies(body) == []


def test_an_empty_body_is_malformed() -> None:
    assert error_of(b"") == "the body is empty: the closing delimiter is missing"


@pytest.mark.parametrize("body", [b"x", b"\r\n", b"--b", b"--b-", b"--other\r\n\r\nx\r\n--other--"])
def test_a_body_without_a_delimiter_is_malformed(body: bytes) -> None:
    assert error_of(body).startswith("no delimiter in the body")


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"--b\r\n", "inside the headers of part 1"),
        (b"--b\r\nContent-Type: a/b\r\n", "inside the headers of part 1"),
        (b"--b\r\n\r\n", "inside part 1"),
        (b"--b\r\n\r\n1\r\n--b\r\n\r\n2\r\n--b\r\n\r\n3", "inside part 3"),
        (b"--b\r\n\r\n1\r\n--b", "inside part 1"),
        (b"--b\r\n\r\n1\r\n--b-", "inside part 1"),
        (b"--b\r\n\r\n1\r\n--b  ", "inside part 1"),
        (b"--b\r\n\r\n1\n--b--", "inside part 1"),
    ],
)
def test_a_truncated_body_is_malformed_with_the_place(body: bytes, where: str) -> None:
    assert error_of(body) == f"the closing delimiter is missing: the body ended {where}"


def test_every_truncation_of_a_valid_body_is_malformed() -> None:
    body = b"--b\r\nContent-Type: a/b\r\n\r\ndata\r\n--b\r\n\r\n\r\n--b--"

    for length in range(len(body)):
        error_of(body[:length])


def test_a_preamble_has_at_most_one_mebibyte() -> None:
    body = b"x" * MIB + b"\r\n--b\r\n\r\ndata\r\n--b--"

    assert [data for _, data in read_all(body, sizes=[100_000])] == [b"data"]
    for sizes in ([100_000], [MIB]):
        with pytest.raises(MalformedMultipart, match="no delimiter in the first 1048576 bytes"):
            read_all(b"x" + body, sizes=sizes)


def test_an_endless_preamble_is_rejected_early() -> None:
    stream = EndlessStream(b"x", b"x", size_bytes=100 * MIB)

    with pytest.raises(MalformedMultipart):
        list(read_parts(stream, "b", 64 * KIB))

    assert len(stream.read(64 * KIB)) == 64 * KIB


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 4096])
@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"\n--b\r\n\r\n..DICM..\r\n--b--\r\n", "precedes the first delimiter"),
        (b"--b\n\n..DICM..\r\n--b\r\n\r\nx\r\n--b--", "precedes the first delimiter"),
        (b"--other\r\n\r\n..DICM..\r\n--b--", "precedes the first delimiter"),
        (b"--b\r\n\r\nx\r\n--b--\r\n..DICM", "follows the closing delimiter"),
        (b"--b\r\n\r\nx\r\n--b--..DICM", "follows the closing delimiter"),
        (b"--b--DICM\r\n\r\n--b--", "precedes the first delimiter"),
    ],
)
def test_an_instance_outside_the_parts_is_malformed(
    body: bytes, place: str, chunk_bytes: int
) -> None:
    with pytest.raises(
        MalformedMultipart, match=f"a DICOM instance {place}: a delimiter is missing"
    ):
        list(read_parts(io.BytesIO(body), "b", chunk_bytes))


def test_the_epilogue_is_read_to_the_end() -> None:
    stream = io.BytesIO(b"--b\r\n\r\n\r\n--b--\r\n" + b"x" * 1000)

    assert len(list(read_parts(stream, "b", 10))) == 1

    assert stream.read() == b""


def test_a_stream_error_after_the_last_part_reaches_the_caller() -> None:
    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            if not data:
                raise ConnectionResetError
            return data

    parts = read_parts(Cut(b"--b\r\n\r\ndata\r\n--b--\r\nepilogue"), "b", 10)

    assert b"".join(next(parts)) == b"data"
    with pytest.raises(ConnectionResetError):
        next(parts)


# Delimiters and data


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n--abcdef",
        b"\r\n--abc--x",
        b"\r\n--abc-\r\n",
        b"\r\n--abc---\r\n",
        b"\r\n--abc \t-- \r\n",
        b"\r\n--abc\r",
        b"\r\n--abc\n",
        b"\n--abc\r\n",
        b"\n--abc--\r\n",
        b"\r--abc\r\n",
        b"x--abc\r\n",
        b"\r\n--ABC\r\n",
        b"\r\n-abc\r\n",
        b"\r\n--ab",
        b"\r\n\r\n--ab\r\n--abd--\r\n--",
        b"\r\n--abc\x0b\r\n",
        b"\r\n--abc" + b" " * 257 + b"\r\n",
        b"\r\n--abc--" + b"\t" * 257 + b"\r\n",
        b" \n",
        b"data \n",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"",
    ],
)
def test_a_sequence_similar_to_a_delimiter_is_data(data: bytes) -> None:
    body = b"--abc\r\n\r\n" + data + b"\r\n--abc\r\n\r\n" + data + b"\r\n--abc--"

    assert bodies(body, "abc") == [data, data]


@pytest.mark.parametrize("padding", [b" ", b"\t", b" \t \t", b" " * 256])
def test_spaces_and_tabs_after_a_delimiter_are_padding(padding: bytes) -> None:
    delimiter = b"--b" + padding + b"\r\n"
    body = delimiter + b"\r\n1\r\n" + delimiter + b"\r\n2\r\n--b--" + padding

    assert bodies(body) == [b"1", b"2"]
    assert bodies(body + b"\r\nepilogue") == [b"1", b"2"]


def test_a_similar_sequence_directly_before_a_delimiter_does_not_hide_it() -> None:
    assert bodies(b"--b\r\n\r\n\r\n--bb\r\n--b\r\n\r\n2\r\n--b--") == [b"\r\n--bb", b"2"]


@pytest.mark.parametrize(
    "boundary", ["a+b.c?(d)'e,f/g:h=i_j", "[a]*", "a b", "-", "b" * 200, "\xe9"]
)
def test_a_boundary_is_matched_literally(boundary: str) -> None:
    name = boundary.encode("latin-1")
    look_alike = b"\r\n--" + name + b"x"
    body = b"--%b\r\nX: y\r\n\r\n%b\r\n--%b--" % (name, look_alike, name)

    assert read_all(body, boundary) == [({"x": "y"}, look_alike)]


@pytest.mark.parametrize("boundary", ["", "b" * 201, "a\rb", "a\nb", "a\x00b", "\u20ac", "\udcff"])
def test_an_invalid_boundary_is_malformed(boundary: str) -> None:
    with pytest.raises(MalformedMultipart, match="the boundary in Content-Type must be"):
        read_all(b"--b--", boundary)


# Part headers


def test_header_names_are_lower_case_and_values_stripped() -> None:
    body = b"--b\r\nCONTENT-Type:application/dicom\r\nX-A :  b: c \t\r\nX-Empty:\r\n\r\n\r\n--b--"

    assert read_all(body) == [
        ({"content-type": "application/dicom", "x-a": "b: c", "x-empty": ""}, b"")
    ]


def test_folded_header_lines_are_joined() -> None:
    body = b"--b\r\nContent-Type: a/b;\r\n\t x=1;\r\n y=2\r\nX: z\r\n\r\n\r\n--b--"

    assert read_all(body) == [({"content-type": "a/b; x=1; y=2", "x": "z"}, b"")]


def test_the_first_of_duplicate_headers_counts() -> None:
    assert read_all(b"--b\r\nX: 1\r\nx: 2\r\n\r\n\r\n--b--") == [({"x": "1"}, b"")]


def test_a_part_may_have_no_headers() -> None:
    assert read_all(b"--b\r\n\r\nX: 1\r\n\r\ndata\r\n--b--") == [({}, b"X: 1\r\n\r\ndata")]


@pytest.mark.parametrize("headers", [b"", b"X: 1\r\n"])
def test_the_blank_line_after_the_headers_may_begin_the_delimiter(headers: bytes) -> None:
    assert bodies(b"--b\r\n" + headers + b"\r\n--b\r\n" + headers + b"\r\n--b--") == [b"", b""]


def test_a_part_knows_its_number_and_media_type() -> None:
    body = b"--b\r\nContent-Type: Application/DICOM; x=1\r\n\r\n\r\n--b\r\n\r\n\r\n--b--"

    assert [(part.number, part.media_type) for part in read_parts(io.BytesIO(body), "b")] == [
        (1, MediaType("application/dicom", {"x": "1"})),
        (2, MediaType("", {})),
    ]


@pytest.mark.parametrize(
    ("headers", "number"), [(b"junk", 1), (b"X: 1\r\njunk", 2), (b" junk", 1), (b"X: 1\r\n--b", 2)]
)
def test_a_header_without_colon_is_malformed(headers: bytes, number: int) -> None:
    body = b"--b\r\n\r\n1\r\n--b\r\n" + headers + b"\r\n\r\ndata\r\n--b--"

    assert error_of(body).startswith(f"header {number} of part 2 is not valid")


def test_a_delimiter_among_the_headers_is_malformed_even_if_it_has_a_colon() -> None:
    body = b"--b:c\r\nX: 1\r\n--b:c\r\nX: 2\r\n\r\ndata\r\n--b:c--"

    assert error_of(body, "b:c").startswith("header 2 of part 1 is not valid")


def test_an_error_does_not_repeat_the_body() -> None:
    for body in (b"--b\r\nPatient^Name\r\n\r\n", b"Patient^Name", b"--b\r\n\r\nPatient^Name"):
        assert "Patient" not in error_of(body)


def test_headers_have_at_most_sixteen_kibibytes() -> None:
    line = b"X: " + b"y" * (16 * KIB - 5)
    body = b"\r\n\r\ndata\r\n--b--"

    assert bodies(b"--b\r\n" + line + body) == [b"data"]
    assert error_of(b"--b\r\n" + line + b"y" + body).startswith(
        "the headers of part 1 are longer than 16384 bytes"
    )


# Use by a caller


@pytest.mark.parametrize("chunk_bytes", [1, 5, 100, MIB])
def test_unread_data_of_a_part_is_skipped(chunk_bytes: int) -> None:
    body = b"--b\r\n\r\n" + b"1" * 99 + b"\r\n--b\r\n\r\n" + b"2" * 99 + b"\r\n--b--"

    untouched = [part.number for part in read_parts(io.BytesIO(body), "b", chunk_bytes)]
    begun = [next(iter(part))[:1] for part in read_parts(io.BytesIO(body), "b", chunk_bytes)]

    assert untouched == [1, 2]
    assert begun == [b"1", b"2"]


def test_a_part_can_be_read_until_the_next_one_is_requested() -> None:
    body = b"--b\r\n\r\n" + b"12345678" + b"\r\n--b\r\n\r\nsecond\r\n--b--"
    parts = read_parts(UnevenStream(body, [12, MIB]), "b")
    first = next(parts)

    for chunk in first:
        assert chunk == b"12345"
        break
    assert b"".join(first) == b"678"
    second = next(parts)

    assert list(first) == []
    assert b"".join(second) == b"second"


def test_an_ignored_error_of_a_part_is_raised_again() -> None:
    parts = read_parts(io.BytesIO(b"--b\r\n\r\ntruncated"), "b")
    part = next(parts)

    with pytest.raises(MalformedMultipart):
        list(part)
    with pytest.raises(MalformedMultipart):
        next(parts)


def test_parts_are_yielded_before_the_rest_of_the_body_arrives() -> None:
    sent = [b"--b\r\n\r\nfirst\r\n--b\r\n", b"\r\nsecond", b"\r\n--b--"]

    class Sender:
        def read(self, size: int) -> bytes:  # noqa: ARG002
            return sent.pop(0) if sent else b""

    parts = read_parts(Sender(), "b")

    assert b"".join(next(parts)) == b"first"
    assert len(sent) == 2
    assert next(iter(next(parts))) == b"second"
    assert len(sent) == 1


def test_reads_have_the_chunk_size_and_large_pieces_are_not_split() -> None:
    asked = []

    class Recording(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    body = b"--b\r\n\r\n" + bytes(64 * KIB) + b"\r\n--b--"
    (part,) = [list(part) for part in read_parts(Recording(body), "b", 16 * KIB)]

    assert set(asked) == {16 * KIB}
    assert len(part) == 5


# Memory and time


@pytest.mark.parametrize(
    ("head", "filler"),
    [
        pytest.param(b"", random.Random(1).randbytes(4 * KIB), id="random"),
        pytest.param(b"", b"\r\n--bx", id="look-alikes"),
        pytest.param(b"", b"\r\n--b" + b" " * 250 + b"x", id="padded look-alikes"),
        pytest.param(b"", b"\r\n--b--x", id="look-alikes of the closing one"),
        pytest.param(b"\r\n--b", b" ", id="endless padding"),
        pytest.param(b"", b"\r\n", id="line ends"),
        pytest.param(b"\r\n", b"-", id="dashes"),
    ],
)
def test_memory_depends_on_the_chunk_size_and_not_on_the_body(head: bytes, filler: bytes) -> None:
    chunk_bytes = 256 * KIB
    stream = EndlessStream(b"--b\r\n\r\n" + head, filler, 16 * MIB, b"\r\n--b--")
    size_bytes = 0

    tracemalloc.start()
    try:
        for part in read_parts(stream, "b", chunk_bytes):
            for chunk in part:
                size_bytes += len(chunk)
                del chunk
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert size_bytes >= 16 * MIB
    assert peak_bytes < 2 * chunk_bytes + 64 * KIB


@pytest.mark.parametrize("look_alike", [b"\r\n--bx", b"\r\n--b--x", b"\r\n--b \t-", b"\r\n--\r\n-"])
@pytest.mark.parametrize("sizes", [[MIB], [1], [3, 1, 4, 1, 5]])
def test_a_body_full_of_similar_sequences_is_read_in_linear_time(
    look_alike: bytes, sizes: list[int]
) -> None:
    """Quadratic time would exceed the timeout of the test at these sizes."""
    data = look_alike * (2_000_000 if sizes == [MIB] else 20_000)

    ((_, read),) = read_all(b"--b\r\n\r\n" + data + b"\r\n--b--", sizes=sizes)

    assert read == data


# Properties

boundaries = st.text(
    string.ascii_letters + string.digits + "'()+_,-./:=?", min_size=1, max_size=70
) | st.sampled_from(["b", "-", "--", "-b", "b--"])
feeds = st.lists(st.integers(1, 9) | st.integers(1, 400), min_size=1, max_size=8)
chunk_sizes = st.integers(1, 20) | st.integers(1, 1000)


def look_alikes(boundary: str) -> st.SearchStrategy[bytes]:
    name = boundary.encode()
    line = b"\r\n--" + name
    pieces = [line, line + b"--", line + b" " * 257, line[:-1], line[1:], line[2:], line + b"-"]
    pieces += [b"\r", b"\n", b"\r\n", b"-", b"--", b" ", b"\t", name, b"x", b"\r\n--"]
    return st.lists(st.sampled_from(pieces) | st.binary(max_size=40), max_size=9).map(b"".join)


def has_delimiter(data: bytes, boundary: str) -> bool:
    """Check for a delimiter in `data`, which lies between two line ends."""
    padding = rb"[ \t]{0,256}"
    line = rb"\r\n--%b(?:%b\r\n|--%b[\r\n\0])" % (re.escape(boundary.encode()), padding, padding)
    return re.search(line, b"\r\n" + data + b"\r\n") is not None


@st.composite
def framed(draw: Callable[..., object]) -> tuple[str, list[tuple[dict[str, str], bytes]], bytes]:
    """Generate a boundary, parts with data similar to delimiters, and their body."""
    boundary = draw(boundaries)
    assert isinstance(boundary, str)
    data = look_alikes(boundary).filter(lambda data: not has_delimiter(data, boundary))
    names = st.sampled_from(["content-type", "content-length", "x"])
    values = st.text(string.ascii_letters + string.digits + '/;=:-"', max_size=30)
    parts = draw(st.lists(st.tuples(st.dictionaries(names, values), data), max_size=4))
    assert isinstance(parts, list)
    padding = draw(st.text(" \t", max_size=5) | st.just(" " * 256))
    assert isinstance(padding, str)
    preamble = draw(st.just(b"") | data.map(lambda data: data + b"\r\n"))
    epilogue = draw(
        st.just(b"")
        | st.sampled_from([b"\r", b"\n", b"\0", b"x", b"-"]).flatmap(
            lambda first: look_alikes(boundary).map(lambda data: first + data)
        )
    )
    assert isinstance(preamble, bytes)
    assert isinstance(epilogue, bytes)
    assume(b"DICM" not in preamble and b"DICM" not in epilogue)
    assume(not has_delimiter(b"--" + epilogue, boundary))
    # The body would end there.
    assume(b"\r\n--" + boundary.encode() + b"--" not in epilogue)
    body = preamble
    for headers, content in parts:
        body += f"--{boundary}{padding}\r\n".encode()
        body += b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
        body += b"\r\n" + content + b"\r\n"
    return boundary, parts, body + f"--{boundary}--{padding}".encode() + epilogue


@settings(deadline=None, max_examples=200)
@given(framed(), feeds, chunk_sizes)
def test_binary_parts_are_unchanged_for_every_read_size(
    sent: tuple[str, list[tuple[dict[str, str], bytes]], bytes], sizes: list[int], chunk_bytes: int
) -> None:
    boundary, parts, body = sent

    assert read_all(body, boundary, sizes, chunk_bytes) == parts


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(["b", "-", "b:c", "---x"]), feeds, chunk_sizes)
def test_any_body_has_the_same_result_for_every_read_size(
    data: st.DataObject, boundary: str, sizes: list[int], chunk_bytes: int
) -> None:
    body = data.draw(look_alikes(boundary))

    def outcome(parts: Iterator[Part]) -> list[object]:
        seen: list[object] = []
        try:
            for part in parts:
                seen.append(part.headers)
                seen.append(b"".join(part))
        except MalformedMultipart as error:
            seen.append(str(error))
        return seen

    assert outcome(read_parts(UnevenStream(body, sizes), boundary, chunk_bytes)) == outcome(
        read_parts(io.BytesIO(body), boundary)
    )


# These texts have CR LF only, as email also ends a line at a bare CR or LF. It also accepts padding
# of any length, and treats headers beyond ASCII differently.
email_texts = st.lists(
    st.sampled_from([b"\r\n", b"\r\n--b", b"--b", b"--", b"b", b"-", b" ", b"\t", b"x", b"X: y"])
    | st.text(string.ascii_letters + string.digits + string.punctuation, max_size=20).map(
        str.encode
    ),
    max_size=12,
).map(b"".join)


@settings(deadline=None, max_examples=200)
@given(st.lists(email_texts, max_size=4), email_texts, email_texts, feeds, chunk_sizes)
@example([b"\r\n--b\r\n\r\n"], b"preamble\r\n", b"\r\n--b\r\n\r\nx", [1], 1)
def test_the_email_package_reads_the_same_parts(
    texts: list[bytes], preamble: bytes, epilogue: bytes, sizes: list[int], chunk_bytes: int
) -> None:
    body = preamble + b"\r\n--b\r\nX: y\r\n\r\n"
    body += b"\r\n--b\r\nX: y\r\n\r\n".join(texts) + b"\r\n--b--\r\n" + epilogue
    message = email.message_from_bytes(b"Content-Type: multipart/x; boundary=b\r\n\r\n" + body)
    try:
        ours = read_all(body, "b", sizes, chunk_bytes)
    except MalformedMultipart as error:
        # email silently accepts some malformed headers, and ignores all data outside the parts.
        stricter = ("header", "a DICOM instance", "a delimiter follows")
        is_stricter = any(words in str(error) for words in stricter)
        assert message.defects or is_stricter
        return

    theirs = [part for part in message.walk() if part is not message]
    assert [data for _, data in ours] == [part.get_payload(decode=True) for part in theirs]
    assert [headers for headers, _ in ours] == [
        {name.lower(): part[name].strip() for name in part} for part in theirs
    ]
