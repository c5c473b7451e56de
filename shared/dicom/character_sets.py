"""Text in the character sets of Specific Character Set (PS3.3 C.12.1.1.2, PS3.5 6.1.2)."""

import re
from collections.abc import Sequence
from encodings.aliases import aliases

from pydicom.charset import CODES_TO_ENCODINGS, default_encoding, python_encoding

# PS3.5 6.1.2.3: Specific Character Set applies to these VRs. Each has the characters behind which
# the first of several character sets is in effect again (PS3.5 6.1.2.5.3).
_RESETS = {
    **dict.fromkeys(("LT", "ST", "UT"), re.compile(rb"[\r\n\f\t]")),
    **dict.fromkeys(("LO", "SH", "UC"), re.compile(rb"[\r\n\f\t\\]")),
    "PN": re.compile(rb"[\r\n\f\t\\^=]"),
}
VRS_OF_ONE_VALUE = frozenset({"LT", "ST", "UR", "UT"})

DEFAULT_CODECS = (default_encoding,)

# Of East Asian sets the codec of the vendor's superset, which has the letters of names that the
# standard lacks.
_SUPERSETS = {
    "gb2312": "gbk",
    "iso_ir_58": "gbk",
    "euc_kr": "cp949",
    "big5": "cp950",
    "shift_jis": "cp932",
}
_JIS_X_0201 = "cp932"
# JIS X 0201 as PS3.3 has it, unlike Python's codec.
_YEN_AND_OVERLINE = str.maketrans({"\\": "\N{YEN SIGN}", "~": "\N{OVERLINE}"})
_OVERLINE = str.maketrans({"~": "\N{OVERLINE}"})

# Names of codecs that writers put in the place of a term, with all that Python calls them.
_NAMED_CODECS = {
    *("ascii", "utf_8", "gb2312", "gbk", "gb18030", "big5", "cp950", "koi8_r", "tis_620"),
    *("euc_jp", "euc_kr", "cp949", "shift_jis", "cp932", "latin_1"),
    *(f"iso8859_{n}" for n in range(1, 17) if n != 12),
    *(f"cp125{n}" for n in range(9)),
}
# Terms of newer editions than pydicom's, and terms for code extensions in the place of others.
_MORE_TERMS = {
    "ISO_IR 203": "iso8859_15",
    "ISO 2022 IR 203": "iso8859_15",
    "ISO_IR 58": "gb2312",
    "ISO_IR 87": "iso2022_jp",
    "ISO_IR 149": "euc_kr",
    "ISO_IR 159": "iso2022_jp_2",
}


def _normal_term(term: str) -> str:
    return re.sub("[ _-]", " ", term.upper())


_CODECS = {
    _normal_term(term): _SUPERSETS.get(codec, codec)
    for term, codec in {
        **{alias: codec for alias, codec in aliases.items() if codec in _NAMED_CODECS},
        **{codec: codec for codec in _NAMED_CODECS},
        **python_encoding,
        **_MORE_TERMS,
    }.items()
}

# ISO 2022 escape sequences of PS3.3 Table C.12-3 and C.12-4, and that of JIS C 6226-1978, which
# JIS X 0208 came from.
_ESCAPES = {
    escape: _SUPERSETS.get(codec, codec)
    for escape, codec in {
        **CODES_TO_ENCODINGS,
        b"\x1b-b": "iso8859_15",
        b"\x1b$@": "iso2022_jp",
    }.items()
}

# Python's codecs of these read the escape sequence themselves. They have 7-bit characters only.
_CODECS_WITH_ESCAPES = frozenset({"iso2022_jp", "iso2022_jp_2"})
_CODECS_OF_7_BITS = _CODECS_WITH_ESCAPES | {default_encoding, "ascii"}
_OF_8_BITS = re.compile(rb"([\x80-\xff]+)")

_ESCAPED_RUN = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")


def codecs_of(value: bytes) -> tuple[str, ...]:
    """Python's codecs for the values of Specific Character Set.

    Terms that are misspelt as often seen ("ISO IR 100") are known; for any other, the default.
    """
    terms = value.decode("latin-1").split("\\")
    return tuple(_CODECS.get(_normal_term(term.strip("\0 ")), default_encoding) for term in terms)


def texts(vr: str, value: bytes, codecs: Sequence[str]) -> list[str]:
    """The values of an element of that VR, without their padding.

    Bytes that are in none of its character sets become U+FFFD.
    """
    # Before decoding: within a two-byte character set a byte of padding is half a character.
    value = value.rstrip(b"\0 ")
    if vr not in _RESETS:
        text = value.decode("latin-1")
    elif b"\x1b" in value:
        # PS3.5 6.1.2.5: an escape sequence begins a run in another one of the character sets.
        runs = _ESCAPED_RUN.findall(value)
        text = "".join(_escaped_run(run, vr, codecs) for run in runs)
    else:
        text = _run(value, vr, codecs[0], codecs)
    if vr in VRS_OF_ONE_VALUE:
        return [text.rstrip("\0 ")]
    return [part.rstrip("\0 ") for part in text.split("\\")]


def _escaped_run(run: bytes, vr: str, codecs: Sequence[str]) -> str:
    escape = run[: 4 if run.startswith((b"\x1b$(", b"\x1b$)")) else 3]
    codec = _ESCAPES.get(escape)
    if codec is None:
        return _run(run, vr, codecs[0], codecs)
    # Also where the character set was not declared: nothing else says what follows.
    if codec in _CODECS_WITH_ESCAPES:
        return _escaped_7_bits(run, escape, vr, codec, codecs)
    text = run[len(escape) :]
    end = match.start() if (match := _RESETS[vr].search(text)) else len(text)
    return _run(text[:end], vr, codec, codecs) + _run(text[end:], vr, codecs[0], codecs)


def _escaped_7_bits(run: bytes, escape: bytes, vr: str, codec: str, codecs: Sequence[str]) -> str:
    """Bytes of 8 bits in the run are in the set that was in effect for these before it."""
    if run.isascii() or _only_set_of_8_bits(codecs) is None:
        return run.decode(codec, "replace")
    pieces = _OF_8_BITS.split(run[len(escape) :])
    return "".join(
        _run(piece, vr, codecs[0], codecs) if odd % 2 else (escape + piece).decode(codec, "replace")
        for odd, piece in enumerate(pieces)
    )


def _only_set_of_8_bits(codecs: Sequence[str]) -> str | None:
    of_8_bits = set(codecs) - _CODECS_OF_7_BITS
    return of_8_bits.pop() if len(of_8_bits) == 1 else None


def _run(data: bytes, vr: str, codec: str, codecs: Sequence[str]) -> str:
    if codec in _CODECS_OF_7_BITS and not data.isascii():
        # A writer that left the escape sequence out can only have meant the one set that fits.
        codec = _only_set_of_8_bits(codecs) or codec
    text = data.decode(default_encoding if codec == "ascii" else codec, "replace")
    if codec == _JIS_X_0201:
        # PS3.5 6.2: where it separates values, the byte does so in this set as well.
        return text.translate(_YEN_AND_OVERLINE if vr in VRS_OF_ONE_VALUE else _OVERLINE)
    return text
