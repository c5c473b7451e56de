"""Text as writers encode it, by the book and not (PS3.3 C.12.1.1.2, PS3.5 6.1.2)."""

import pytest

from shared.dicom.character_sets import codecs_of, texts

KANJI = "\N{CJK UNIFIED IDEOGRAPH-5C71}"  # 3B 33 in JIS X 0208


def text(character_set: bytes, value: bytes, vr: str = "LO") -> list[str]:
    return texts(vr, value, codecs_of(character_set))


@pytest.mark.parametrize(
    ("term", "encoding", "letters"),
    [
        (b"ISO_IR 203", "iso8859_15", "\N{EURO SIGN}"),
        (b"GB2312", "gb2312", "王小"),
        (b"GBK", "gbk", "王小东"),
        (b"ISO_IR 58", "gb2312", "王小"),
        (b"ISO_IR 149", "euc_kr", "홍길동"),
        (b"EUC-KR", "euc_kr", "홍길동"),
        (b"Big5", "big5", "王小東"),
        (b"Shift_JIS", "shift_jis", "山田"),
        (b"UTF-8", "utf_8", "é王"),
        (b"ISO-8859-2", "iso8859_2", "Łódź"),
        (b"iso8859-5", "iso8859_5", "Юля"),
        (b"WINDOWS-1252", "cp1252", "\N{EURO SIGN}"),
        (b"koi8-r", "koi8_r", "Юля"),
        (b"CP1251", "cp1251", "Юля"),
        (b"SJIS", "cp932", "髙﨑彅"),
        (b"MS932", "cp932", "髙﨑彅"),
        (b"ISO_IR 13", "cp932", "髙﨑彅"),
        (b"GB2312", "gbk", "朱镕基"),
        (b"\\ISO 2022 IR 58", "gbk", "朱镕基"),
        (b"ISO_IR 149", "cp949", "똠방"),
    ],
)
def test_the_name_of_a_codec_is_taken_for_the_term(
    term: bytes, encoding: str, letters: str
) -> None:
    assert text(term, letters.encode(encoding)) == [letters]


def test_behind_an_escape_sequence_of_7_bits_those_of_8_are_what_they_were() -> None:
    declared = b"ISO 2022 IR 13\\ISO 2022 IR 87"
    value = bytes.fromhex("1B 24 42 3B 33 D4 CF 3B 33 1B 28 4A")
    assert text(declared, value) == [f"{KANJI}ﾔﾏ{KANJI}"]


@pytest.mark.parametrize("term", [b"rot13", b"base64", b"utf-16", b"utf-7", b"zlib", b"idna"])
def test_no_other_codec_can_be_named(term: bytes) -> None:
    assert text(term, b"Ab+AGE-") == ["Ab+AGE-"]


@pytest.mark.parametrize("padding", [b"", b" ", b"\0", b"   "])
def test_padding_is_no_half_of_a_character(padding: bytes) -> None:
    value = bytes.fromhex("1B 24 42 40 62") + padding
    (found,) = text(b"\\ISO 2022 IR 87", value)
    assert found == b"\x1b$B\x40\x62".decode("iso2022_jp")
    assert len(found) == 1


@pytest.mark.parametrize("character_set", [b"", b"ISO_IR 100", b"\\ISO 2022 IR 100"])
def test_an_escape_sequence_that_was_not_declared_says_what_follows_it(
    character_set: bytes,
) -> None:
    assert text(character_set, b"\x1b$B" + b"\x3b\x33" + b"\x1b(B") == [KANJI]
    assert text(character_set, b"\x1b$@" + b"\x3b\x33" + b"\x1b(B") == [KANJI]
    assert text(character_set, b"\x1b$)C" + "홍".encode("euc_kr")) == ["홍"]
    assert text(character_set, b"\x1b-L" + "Ю".encode("iso8859_5")) == ["Ю"]
    assert text(character_set, b"\x1b-b\xa4") == ["\N{EURO SIGN}"]


@pytest.mark.parametrize(
    ("character_set", "letters", "encoding"),
    [
        (b"\\ISO 2022 IR 149", "홍길동", "euc_kr"),
        (b"ISO 2022 IR 6\\ISO 2022 IR 58", "王小", "gb2312"),
        (b"\\ISO 2022 IR 144\\ISO 2022 IR 87", "Юля", "iso8859_5"),
        (b"\\ISO 2022 IR 13\\ISO 2022 IR 87", "ﾔﾏﾀﾞ", "shift_jis"),
    ],
)
def test_bytes_above_7f_are_in_the_only_declared_set_that_has_them(
    character_set: bytes, letters: str, encoding: str
) -> None:
    assert text(character_set, letters.encode(encoding)) == [letters]
    assert text(character_set, b"\x1b(B" + letters.encode(encoding)) == [letters]


def test_where_several_declared_sets_have_them_bytes_above_7f_are_latin_1() -> None:
    declared = b"\\ISO 2022 IR 144\\ISO 2022 IR 126"
    assert text(declared, b"J\xe9r") == ["Jér"]


@pytest.mark.parametrize("character_set", [b"ISO_IR 13", b"ISO 2022 IR 13\\ISO 2022 IR 87"])
def test_byte_5c_of_jis_x_0201_is_a_yen_sign_and_still_separates_values(
    character_set: bytes,
) -> None:
    for vr in ("LT", "ST", "UT"):
        assert text(character_set, b"\xb1\\100~", vr) == ["ｱ¥100\N{OVERLINE}"]
        assert text(character_set, b"\x1b(J\\100", vr) == ["¥100"]
    for vr in ("LO", "SH", "UC"):
        assert text(character_set, b"\xb1\\100", vr) == ["ｱ", "100"]
    assert text(character_set, b"\xd4\xcf\\\xc0", "PN") == ["ﾔﾏ", "ﾀ"]


def test_a_byte_5c_within_a_character_separates_nothing() -> None:
    assert text(b"ISO_IR 13", "十".encode("shift_jis")) == ["十"]
    assert text(b"GB18030", b"\x81\x5c") == [b"\x81\x5c".decode("gb18030")]
