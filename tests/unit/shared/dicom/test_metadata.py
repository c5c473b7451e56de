import base64
import contextlib
import io
import json
import random
import struct
import warnings
from pathlib import Path
from typing import Any

import pydicom
import pytest
from encoded import without
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from shared.dicom.identity import identify
from shared.dicom.metadata import _seen_elements, metadata_json
from shared.dicom.refusal import InstanceRefused, NotUnderstood
from shared.dicom.structure import check_structure

DATA = Path(pydicom.__file__).parent / "data"
BULK_VRS = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}


def _is_accepted(data: bytes) -> bool:
    try:
        check_structure(data)
    except InstanceRefused:
        return False
    return True


READABLE_FILES = [
    path
    for path in sorted(DATA.rglob("*"))
    if path.is_file() and path.suffix in {".dcm", ""} and _is_accepted(path.read_bytes())
]
# pydicom gives nothing for these: it does not convert "1A" as an IS, nor an empty one of several.
BEYOND_PYDICOM = {
    "badVR.dcm": ["00280008", "300C0002"],
    "rtdose.dcm": ["300C0002"],
    "rtdose_1frame.dcm": ["300C0002"],
    "rtdose_expb.dcm": ["300C0002"],
    "rtdose_expb_1frame.dcm": ["300C0002"],
    "rtdose_rle.dcm": ["300C0002"],
    "rtdose_rle_1frame.dcm": ["300C0002"],
}


def part10(*elements: bytes, syntax: str = ExplicitVRLittleEndian) -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return b"\0" * 128 + b"DICM" + explicit(0x00020010, "UI", uid) + b"".join(elements)


def explicit(tag: int, vr: str, value: bytes = b"", order: str = "<") -> bytes:
    header = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in BULK_VRS | {"SQ", "SV", "UC", "UR", "UT", "UV"}:
        return header + struct.pack(order + "HL", 0, len(value)) + value
    return header + struct.pack(order + "H", len(value)) + value


def implicit(tag: int, value: bytes = b"", order: str = "<") -> bytes:
    return struct.pack(order + "HHL", tag >> 16, tag & 0xFFFF, len(value)) + value


def item(*elements: bytes, order: str = "<") -> bytes:
    return implicit(0xFFFEE000, b"".join(elements), order)


def described(data: bytes) -> dict[str, Any]:
    check_structure(data)
    result = json.loads(metadata_json(data))
    assert isinstance(result, dict)
    return result


def value_of(vr: str, value: bytes) -> Any:
    """What one element's value becomes; nested, so that none is left out."""
    nested = explicit(0x00081140, "SQ", item(explicit(0x00091001, vr, value)))
    element = described(part10(nested))["00081140"]["Value"][0]["00091001"]
    assert element.pop("vr") == vr
    return element.get("Value", element.get("InlineBinary"))


def decimal32(number: float) -> str:
    """The shortest decimal that gives the same 32-bit float."""

    def is_same(decimal: str) -> bool:
        with contextlib.suppress(OverflowError):  # of one rounded up beyond the largest
            return struct.pack("<f", float(decimal)) == struct.pack("<f", number)
        return False

    return next(d for d in (f"{number:.{n}g}" for n in range(1, 10)) if is_same(d))


def _like_ours(ds: dict[str, Any], *, is_top_level: bool) -> dict[str, Any]:
    """pydicom's JSON under the rules that differ on purpose, each of which has a test below."""
    result = {}
    for tag, element in ds.items():
        vr, values = element["vr"], element.get("Value")
        if tag.endswith("0000") or (is_top_level and vr in BULK_VRS):
            continue
        if vr == "SQ":
            values = [_like_ours(nested, is_top_level=False) for nested in values]
        elif vr == "PN" and values:
            values = [{k: v for k, v in (name or {}).items() if v} or None for name in values]
        elif vr == "FL" and values:
            values = [float(decimal32(v)) for v in values]
        elif values:
            values = [(v.rstrip(" ") or None) if isinstance(v, str) else v for v in values]
        result[tag] = {k: v for k, v in element.items() if k != "Value"}
        if values:
            result[tag]["Value"] = values
    return result


@pytest.mark.parametrize("path", READABLE_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_real_files_are_described_as_pydicom_does(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about odd files
        ds = pydicom.dcmread(path)
        expected = _like_ours(ds.to_json_dict(suppress_invalid_tags=True), is_top_level=True)
    result = described(path.read_bytes())

    beyond = BEYOND_PYDICOM.get(path.name, [])
    assert sorted(result.keys() - expected.keys()) == beyond
    assert {tag: element for tag, element in result.items() if tag not in beyond} == expected


@pytest.mark.parametrize("path", READABLE_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_a_file_without_its_bulk_ranges_is_described_alike(path: Path) -> None:
    whole = path.read_bytes()
    left_out = check_structure(whole).left_out
    cut = whole if left_out.is_inflated else without(whole, left_out.ranges)
    assert metadata_json(cut, left_out) == metadata_json(whole)


def _of_the_first_instance_ever(data: bytes) -> bytes:
    _seen_elements.cache_clear()
    return metadata_json(data)


@pytest.mark.parametrize("path", READABLE_FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_what_was_seen_in_other_instances_changes_nothing(path: Path) -> None:
    data = path.read_bytes()
    expected = _of_the_first_instance_ever(data)
    for other in SEEDS:
        metadata_json(other)
    assert metadata_json(data) == expected


# What is last in a data set is always looked at closely.
LAST = explicit(0x00400253, "SH")


def test_an_element_seen_in_one_byte_order_is_read_anew_in_another() -> None:
    empty = explicit(0x40080800, "LO")
    assert empty == explicit(0x08400008, "LO", order=">")
    little = described(part10(empty, LAST))
    last = explicit(0x40080253, "SH", order=">")
    big = described(part10(empty, last, syntax=ExplicitVRBigEndian))
    assert list(little) == ["00400253", "40080800"]
    assert list(big) == ["08400008", "40080253"]


def test_an_element_seen_in_one_character_set_is_read_anew_in_another() -> None:
    name = explicit(0x00100010, "PN", b"\xc4\xd6")
    for character_set, expected in ((b"ISO_IR 100", "ÄÖ"), (b"ISO_IR 144", "Фж")):
        file = part10(explicit(0x00080005, "CS", character_set), name, LAST)
        for _ in range(2):
            assert described(file)["00100010"]["Value"] == [{"Alphabetic": expected}]


def test_any_number_of_elements_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.dicom.metadata._MOST_SEEN_ELEMENTS", 2)
    numbers = [explicit(0x00200013, "IS", f"{number} ".encode()) for number in range(1, 9)]
    file = part10(*(explicit(0x00081140, "SQ", item(number)) for number in numbers))
    assert described(file)["00081140"]["Value"] == [{"00200013": {"vr": "IS", "Value": [8]}}]
    assert 0 < len(_seen_elements((True, "<"), ("iso8859",))) <= 2


def test_a_private_element_seen_with_one_owner_is_read_anew_with_another() -> None:
    suite = implicit(0x00091004, b"suite ")
    for creator, expected in ((b"GEMS_IDEN_01", {"vr": "SH", "Value": ["suite"]}), (b"Me", None)):
        file = part10(
            implicit(0x00090010, creator),
            suite,
            implicit(0x7FE10010),
            syntax=ImplicitVRLittleEndian,
        )
        assert described(file).get("00091004") == expected


def test_it_is_one_object_not_indented_with_elements_ascending() -> None:
    data = part10(
        explicit(0x00100020, "LO", b"42"),
        explicit(0x00081140, "SQ", item(explicit(0x00081155, "UI"), explicit(0x00081150, "UI"))),
        explicit(0x00080060, "CS", b"CT"),
    )
    assert metadata_json(data) == (
        b'{"00080060":{"vr":"CS","Value":["CT"]},'
        b'"00081140":{"vr":"SQ","Value":[{"00081150":{"vr":"UI"},"00081155":{"vr":"UI"}}]},'
        b'"00100020":{"vr":"LO","Value":["42"]}}'
    )


def test_file_meta_information_and_group_lengths_are_left_out_at_any_depth() -> None:
    length = explicit(0x00080000, "UL", b"\1\0\0\0")
    nested = explicit(0x00081140, "SQ", item(length, explicit(0x00080060, "CS", b"CT")))
    assert described(part10(length, nested)) == {
        "00081140": {"vr": "SQ", "Value": [{"00080060": {"vr": "CS", "Value": ["CT"]}}]}
    }


@pytest.mark.parametrize("vr", sorted(BULK_VRS))
def test_bulk_is_left_out_at_the_top_and_inline_below(vr: str) -> None:
    element = explicit(0x00091001, vr, b"\1\2\3\4\5\6\7\x08")
    result = described(part10(explicit(0x00081140, "SQ", item(element)), element))
    inline = base64.b64encode(b"\1\2\3\4\5\6\7\x08").decode()
    nested = {"00091001": {"vr": vr, "InlineBinary": inline}}
    assert result == {"00081140": {"vr": "SQ", "Value": [nested]}}


def test_inline_words_of_a_big_endian_file_are_turned_round() -> None:
    words = explicit(0x00281201, "OW", b"\1\2\3\4", ">")
    octets = explicit(0x00420011, "OB", b"\1\2\3\4", ">")
    nested = explicit(0x00081140, "SQ", item(words, octets, order=">"), ">")
    result = described(part10(nested, syntax=ExplicitVRBigEndian))["00081140"]["Value"][0]
    assert base64.b64decode(result["00281201"]["InlineBinary"]) == b"\2\1\4\3"
    assert base64.b64decode(result["00420011"]["InlineBinary"]) == b"\1\2\3\4"


def test_nested_encapsulated_pixel_data_is_inline_as_it_is_encoded() -> None:
    fragments = item() + item(b"abcd")
    pixels = struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + fragments
    nested = explicit(0x00880200, "SQ", item(pixels + implicit(0xFFFEE0DD)))
    element = described(part10(nested))["00880200"]["Value"][0]["7FE00010"]
    assert base64.b64decode(element["InlineBinary"]) == fragments


@pytest.mark.parametrize("vr", ["CS", "LO", "PN", "DS", "IS", "US", "FD", "AT", "UT", "OB", "UN"])
def test_an_empty_element_is_its_vr_alone(vr: str) -> None:
    assert value_of(vr, b"") is None


@pytest.mark.parametrize("vr", ["CS", "LO", "PN", "DS", "IS", "UT", "AE", "UI"])
def test_nothing_but_padding_is_an_empty_element(vr: str) -> None:
    assert value_of(vr, b"  ") is None


def test_an_empty_sequence_is_its_vr_alone_and_an_empty_item_an_empty_object() -> None:
    result = described(
        part10(explicit(0x00081110, "SQ"), explicit(0x00081140, "SQ", item() + item()))
    )
    assert result["00081110"] == {"vr": "SQ"}
    assert result["00081140"] == {"vr": "SQ", "Value": [{}, {}]}


@pytest.mark.parametrize(
    ("vr", "value", "expected"),
    [
        ("IS", b"12\\-7 \\ +5", [12, -7, 5]),
        ("IS", b"1A\\2", ["1A", 2]),
        ("IS", b"1.5", ["1.5"]),
        ("IS", b"1_000", ["1_000"]),
        ("IS", b"18446744073709551615\\-9223372036854775808", [2**64 - 1, -(2**63)]),
        ("IS", b"18446744073709551616", ["18446744073709551616"]),
        ("IS", b"9" * 5000, ["9" * 5000]),
        ("DS", b" 1.5\\-2E3 \\.5\\7.\\10", [1.5, -2000.0, 0.5, 7.0, 10]),
        ("DS", b"1,5\\nan\\inf\\1e999\\1_0", ["1,5", "nan", "inf", "1e999", "1_0"]),
        ("DS", b"1\\\\3", [1, None, 3]),
        ("SV", struct.pack("<qq", -(2**63), 2**63 - 1), [-(2**63), 2**63 - 1]),
        ("UV", struct.pack("<Q", 2**64 - 1), [2**64 - 1]),
        ("US", b"\1\0\xff\xff", [1, 65535]),
        ("SS", b"\xff\xff", [-1]),
        ("UL", b"\xff\xff\xff\xff", [2**32 - 1]),
        ("SL", b"\xff\xff\xff\xff", [-1]),
        ("FL", struct.pack("<f", 0.5), [0.5]),
        ("FD", struct.pack("<d", 0.1), [0.1]),
        (
            "FD",
            struct.pack("<4d", float("nan"), float("inf"), float("-inf"), 1.5),
            ["NaN", "Infinity", "-Infinity", 1.5],
        ),
        ("FL", struct.pack("<f", float("nan")), ["NaN"]),
        ("AT", b"\x10\x00\x20\x00\xe0\x7f\x10\x00", ["00100020", "7FE00010"]),
        ("CS", b"A\\\\B ", ["A", None, "B"]),
        ("LO", b"\\", [None, None]),
        ("AE", b" STORE \\B", ["STORE", "B"]),
        ("UI", b"1.2\0\\1.3\0", ["1.2", "1.3"]),
        ("LT", b" a\\b ", [" a\\b"]),
        ("ST", b"a\\b", ["a\\b"]),
        ("UT", b"a\\b", ["a\\b"]),
        ("UR", b"http://a\\b ", ["http://a\\b"]),
        ("UC", b"a\\b", ["a", "b"]),
        ("DA", b"19990101\\x", ["19990101", "x"]),
        ("TM", b"120000.5 ", ["120000.5"]),
        ("DT", b"1999", ["1999"]),
        ("AS", b"042Y", ["042Y"]),
        ("SH", b"a", ["a"]),
        ("PN", b"Doe^Jane", [{"Alphabetic": "Doe^Jane"}]),
        ("PN", b"A=I=P", [{"Alphabetic": "A", "Ideographic": "I", "Phonetic": "P"}]),
        ("PN", b"=I", [{"Ideographic": "I"}]),
        ("PN", b"A==P", [{"Alphabetic": "A", "Phonetic": "P"}]),
        ("PN", b"A\\\\=\\B", [{"Alphabetic": "A"}, None, None, {"Alphabetic": "B"}]),
    ],
)
def test_values_by_vr(vr: str, value: bytes, expected: list[Any]) -> None:
    result = value_of(vr, value)
    assert result == expected
    assert [type(found) for found in result] == [type(wanted) for wanted in expected]


@pytest.mark.parametrize(
    ("vr", "value"),
    [("US", b"\1"), ("FD", b"\1\2\3\4"), ("AT", b"\1\2"), ("AT", b"\1\2\3"), ("SV", b"12345")],
)
def test_bytes_that_do_not_fit_cost_that_element_alone(vr: str, value: bytes) -> None:
    result = described(part10(explicit(0x00100020, "LO", b"42"), explicit(0x00281101, vr, value)))
    assert result == {"00100020": {"vr": "LO", "Value": ["42"]}, "00281101": {"vr": vr}}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.1, b"0.1"),
        (1 / 3, b"0.33333334"),
        (16777216.0, b"16777216"),
        (1.5, b"1.5"),
        (3.0, b"3"),
        (-0.0, b"0"),
        (1.4e-45, b"1e-45"),
        (3.4028234663852886e38, b"3.4028235e+38"),
    ],
)
def test_a_32_bit_float_is_the_shortest_decimal_that_gives_it(number: float, text: bytes) -> None:
    """The Workflow Manager's conditions compare texts."""
    data = part10(explicit(0x00189073, "FL", struct.pack("<f", number)))
    assert metadata_json(data) == b'{"00189073":{"vr":"FL","Value":[' + text + b"]}}"


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_32_bit_float_is_changed(number: float) -> None:
    (found,) = value_of("FL", struct.pack("<f", number))
    assert struct.pack("<f", found) == struct.pack("<f", number + 0.0)
    assert len(f"{found!r}") <= len(f"{float(decimal32(number))!r}")


def test_a_64_bit_float_that_is_whole_has_no_fraction() -> None:
    data = part10(explicit(0x00189073, "FD", struct.pack("<2d", 3.0, 0.1)))
    assert metadata_json(data) == b'{"00189073":{"vr":"FD","Value":[3,0.1]}}'


def test_numbers_of_a_big_endian_file_are_read_as_such() -> None:
    rows = explicit(0x00280010, "US", b"\2\0", ">")
    assert described(part10(rows, syntax=ExplicitVRBigEndian))["00280010"]["Value"] == [512]


@pytest.mark.parametrize(("representation", "expected"), [(0, ("US", 65535)), (1, ("SS", -1))])
def test_us_or_ss_is_as_pixel_representation_says(
    representation: int, expected: tuple[str, int]
) -> None:
    smallest = implicit(0x00280106, b"\xff\xff")
    data = part10(
        implicit(0x00280103, struct.pack("<H", representation)),
        smallest,
        implicit(0x52009230, item(smallest)),
        syntax=ImplicitVRLittleEndian,
    )
    vr, number = expected
    element = {"vr": vr, "Value": [number]}
    result = described(data)
    assert result["00280106"] == element
    assert result["52009230"]["Value"] == [{"00280106": element}]


def test_private_elements_are_kept_and_their_owner_gives_the_vr() -> None:
    creator = implicit(0x00090010, b"GEMS_IDEN_01")
    known = implicit(0x00091004, b"suite ")
    unknown = implicit(0x000910FF, b"ab")
    unowned = implicit(0x00092004, b"ab")
    data = part10(creator, known, unknown, unowned, syntax=ImplicitVRLittleEndian)
    assert described(data) == {
        "00090010": {"vr": "LO", "Value": ["GEMS_IDEN_01"]},
        "00091004": {"vr": "SH", "Value": ["suite"]},
    }
    nested = implicit(0x00081140, item(creator, known, unknown, unowned))
    data = part10(nested, syntax=ImplicitVRLittleEndian)
    assert described(data)["00081140"]["Value"][0] == {
        "00090010": {"vr": "LO", "Value": ["GEMS_IDEN_01"]},
        "00091004": {"vr": "SH", "Value": ["suite"]},
        "000910FF": {"vr": "UN", "InlineBinary": "YWI="},
        "00092004": {"vr": "UN", "InlineBinary": "YWI="},
    }


def test_private_elements_with_a_vr_are_kept_with_it() -> None:
    result = described(part10(explicit(0x00091001, "DS", b"1.5")))
    assert result == {"00091001": {"vr": "DS", "Value": [1.5]}}


@pytest.mark.parametrize("size_bytes", [5000, 70_000])
def test_a_large_private_element_is_described_as_far_as_its_bytes_can_be_held_against_its_vr(
    size_bytes: int,
) -> None:
    creator = implicit(0x00090010, b"GEMS_IDEN_01")
    private = implicit(0x00091004, b"x" * size_bytes)
    whole = part10(creator, private, syntax=ImplicitVRLittleEndian)
    left_out = check_structure(whole).left_out
    assert ("00091004" in described(whole)) == (size_bytes == 5000) == (left_out.ranges == ())
    assert metadata_json(whole) == metadata_json(without(whole, left_out.ranges), left_out)


def test_un_of_a_known_element_is_read_by_the_data_dictionary() -> None:
    reference = item(implicit(0x00081155, b"1.2"))
    result = described(
        part10(
            explicit(0x00081140, "UN", reference),
            explicit(0x00100010, "UN", b"Doe^Jane"),
            explicit(0x00280010, "UN", b"\0\2"),
        )
    )
    assert result == {
        "00081140": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2"]}}]},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]},
        "00280010": {"vr": "US", "Value": [512]},
    }


@pytest.mark.parametrize(
    ("charset", "value", "expected"),
    [
        (b"", b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
        (b"ISO_IR 192", "王^小东".encode(), "王^小东"),
        (b"ISO_IR 144", "Юля".encode("iso8859_5"), "Юля"),
        (b"GB18030", "王^小东".encode("gb18030"), "王^小东"),
        (b"\\ISO 2022 IR 58", b"\x1b$)A" + "王".encode("gb2312") + b"^\x1b$)A\xd0\xa1", "王^小"),
        (b"ISO IR 192", "é".encode(), "é"),
        (b"iso-ir 192", "é".encode(), "é"),
        (b"ISO_IR 999", b"J\xe9r\xf4me", "Jérôme"),
        (b"\xff\xfe", b"J\xe9r\xf4me", "Jérôme"),
        (b"ISO_IR 192\\ISO 2022 IR 87", "é".encode(), "é"),
        (b"ISO_IR 192", b"J\xe9r", "J\ufffdr"),
        (b"\\ISO 2022 IR 87", b"A\x1bZB", "A\x1bZB"),
        (b"\\ISO 2022 IR 87", b"A\x1b$B\xff", "A\ufffd"),
        # PS3.5 6.1.2.5.3: behind a delimiter the first character set is in effect again.
        (b"ISO 2022 IR 100\\ISO 2022 IR 126", b"\x1b-F\xe8^\xe9", "θ^é"),
    ],
)
def test_text_is_decoded_by_specific_character_set(
    charset: bytes, value: bytes, expected: str
) -> None:
    result = described(
        part10(explicit(0x00080005, "CS", charset), explicit(0x00100010, "PN", value))
    )
    assert result["00100010"]["Value"] == [{"Alphabetic": expected}]


def test_an_item_inherits_the_character_set_and_may_have_its_own() -> None:
    cyrillic = explicit(0x00080005, "CS", b"ISO_IR 144")
    text = explicit(0x00100010, "PN", b"\xb0")
    result = described(
        part10(
            cyrillic,
            explicit(
                0x00081140,
                "SQ",
                item(text) + item(explicit(0x00080005, "CS", b"ISO_IR 100"), text) + item(text),
            ),
        )
    )
    names = [nested["00100010"]["Value"][0] for nested in result["00081140"]["Value"]]
    assert [name["Alphabetic"] for name in names] == ["А", "°", "А"]


def test_a_backslash_byte_within_a_multi_byte_character_is_no_delimiter() -> None:
    text = "体"
    encoded = "誠".encode("gb18030") + b"\x81\x5c" + text.encode("gb18030")
    result = described(
        part10(explicit(0x00080005, "CS", b"GB18030"), explicit(0x00081030, "LO", encoded))
    )
    assert len(result["00081030"]["Value"]) == 1


@pytest.mark.parametrize("vr", ["SQ", "UN"])
@pytest.mark.parametrize("depth", [20, 21, 64])
def test_below_the_20th_sequence_only_the_vr_of_a_sequence_is_given(vr: str, depth: int) -> None:
    content = name = explicit(0x00101001, "PN", b"A=I=P")
    for _ in range(depth):
        content = explicit(0x00081140, "SQ", item(content)) if vr == "SQ" else item_of_un(content)
    data = part10(content, explicit(0x00200011, "IS", b"7 "))

    result = described(data)
    assert result["00200011"] == {"vr": "IS", "Value": [7]}
    assert json_levels(metadata_json(data)) <= 64
    sequences = 0
    tag = "00081140" if vr == "SQ" else "00091001"
    while "Value" in (sequence := result.get(tag, {})):
        (result,) = sequence["Value"]
        sequences += 1
    assert sequences == 20
    assert result == (described(part10(name)) if depth == 20 else {tag: {"vr": "SQ"}})


def json_levels(document: bytes) -> int:
    level = deepest = 0
    for character in document:
        level += (character in b"[{") - (character in b"]}")
        deepest = max(deepest, level)
    return deepest


def item_of_un(content: bytes) -> bytes:
    header = struct.pack("<HH2sHL", 0x0009, 0x1001, b"UN", 0, 0xFFFFFFFF)
    return header + item(content) + implicit(0xFFFEE0DD)


@pytest.mark.parametrize(
    ("vr", "value"),
    [
        ("LO", b"a\\" * 9),
        ("UC", b"\\" * 9),
        ("US", b"\1\2" * 10),
        ("AT", b"\1\2\3\4" * 10),
        ("PN", b"a\\" * 9),
        ("UT", b"\x1b(Ba" * 9),
        ("DS", b"1\\" * 9),
    ],
)
def test_values_are_limited_over_all_elements_together(
    vr: str, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the memory of a sidecar is a hundred times the size of the file."""
    monkeypatch.setattr("shared.dicom.metadata.MAX_VALUES", 22)
    many = explicit(0x00091001, vr, value)
    one = explicit(0x00200011, "IS", b"7 ")
    result = described(
        part10(explicit(0x00081140, "SQ", item(many) + item(many) + item(many)), one)
    )
    assert described(part10(one))["00200011"]["Value"] == [7]  # as an element of one before
    first, second, third = (nested["00091001"] for nested in result["00081140"]["Value"])
    assert first == second
    assert first["Value"]
    assert third == {"vr": vr}
    assert result["00200011"] == {"vr": "IS", "Value": [7]}


def test_what_was_never_accepted_is_refused() -> None:
    with pytest.raises(NotUnderstood):
        metadata_json(part10(explicit(0x00100020, "LO", b"42"))[:-1])


def _deflated() -> bytes:
    ds = pydicom.dcmread(DATA / "test_files" / "rtplan.dcm")
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def test_a_deflated_file_is_described_inflated() -> None:
    result = described(_deflated())
    expected = pydicom.dcmread(DATA / "test_files" / "rtplan.dcm")
    assert result["00100020"]["Value"] == [expected.PatientID]
    assert len(result["300A00B0"]["Value"]) == len(expected.BeamSequence)


def _undefined_lengths() -> bytes:
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.3", "1.2.4"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.5", "1.2.6"
    inner = pydicom.Dataset()
    inner.PatientName = "Doe^Jane"
    inner.is_undefined_length_sequence_item = True
    ds.ReferencedImageSequence = [inner]
    ds["ReferencedImageSequence"].is_undefined_length = True
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


SEEDS = [
    (DATA / "test_files" / "reportsi.dcm").read_bytes(),
    (DATA / "test_files" / "rtplan.dcm").read_bytes(),
    (DATA / "test_files" / "SC_rgb_rle_2frame.dcm").read_bytes(),
    (DATA / "test_files" / "SC_rgb_small_odd_big_endian.dcm").read_bytes(),
    (DATA / "test_files" / "UN_sequence.dcm").read_bytes(),
    (DATA / "charset_files" / "chrH32.dcm").read_bytes(),
    _deflated(),
    _undefined_lengths(),
]


@settings(max_examples=600, deadline=None, database=None)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 12))
def test_damaged_files_are_refused_or_else_can_be_described(
    seed: bytes, choice: int, count: int
) -> None:
    chooser = random.Random(choice)
    damaged = bytearray(seed)
    for _ in range(count):
        position = chooser.randrange(128, len(damaged))
        kind = chooser.randrange(4)
        if kind == 0:
            damaged[position] = chooser.randrange(256)
        elif kind == 1:
            damaged[position] ^= 1 << chooser.randrange(8)
        elif kind == 2:
            del damaged[position : position + chooser.randrange(1, 9)]
        else:
            other = chooser.randrange(128, len(damaged))
            damaged[position:position] = damaged[other : other + chooser.randrange(1, 32)]
    try:
        structure = check_structure(bytes(damaged))
    except InstanceRefused:
        return
    sidecar = metadata_json(bytes(damaged))
    assert isinstance(json.loads(sidecar), dict)
    assert sidecar == _of_the_first_instance_ever(bytes(damaged))
    with contextlib.suppress(InstanceRefused):
        identify(structure)
