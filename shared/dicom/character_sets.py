"""Text in the character sets of Specific Character Set (PS3.3 C.12.1.1.2, PS3.5 6.1.2)."""

import re
from collections.abc import Sequence
from encodings.aliases import aliases

from pydicom.charset import CODES_TO_ENCODINGS, default_encoding, python_encoding

# PS3.5 6.1.2.3: Specific Character Set applies to these VRs. After each of these characters the
# first of several character sets is active again (PS3.5 6.1.2.5.3).
_RESETS = {
    **dict.fromkeys(("LT", "ST", "UT"), re.compile(rb"[\r\n\f\t]")),
    **dict.fromkeys(("LO", "SH", "UC"), re.compile(rb"[\r\n\f\t\\]")),
    "PN": re.compile(rb"[\r\n\f\t\\^=]"),
}
VRS_OF_ONE_VALUE = frozenset({"LT", "ST", "UR", "UT"})

DEFAULT_CODECS = (default_encoding,)

# East Asian character sets use the codec of the vendor's superset, which has characters of personal
# names that the standard lacks.
_SUPERSETS = {
    "gb2312": "gbk",
    "iso_ir_58": "gbk",
    "euc_kr": "cp949",
    "big5": "cp950",
    "shift_jis": "cp932",
}
_JIS_X_0201 = "cp932"
# JIS X 0201 as PS3.3 defines it, unlike Python's codec.
_YEN_AND_OVERLINE = str.maketrans({"\\": "\N{YEN SIGN}", "~": "\N{OVERLINE}"})
_OVERLINE = str.maketrans({"~": "\N{OVERLINE}"})

# Codec names that writers use instead of a Defined Term, with all of Python's aliases.
_NAMED_CODECS = {
    *("ascii", "utf_8", "gb2312", "gbk", "gb18030", "big5", "cp950", "koi8_r", "tis_620"),
    *("euc_jp", "euc_kr", "cp949", "shift_jis", "cp932", "latin_1"),
    *(f"iso8859_{n}" for n in range(1, 17) if n != 12),
    *(f"cp125{n}" for n in range(9)),
}
# Defined Terms that pydicom lacks, and terms for code extensions used without them.
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

# ISO 2022 escape sequences of PS3.3 Tables C.12-3 and C.12-4, and of JIS C 6226-1978, the
# predecessor of JIS X 0208.
_ESCAPES = {
    escape: _SUPERSETS.get(codec, codec)
    for escape, codec in {
        **CODES_TO_ENCODINGS,
        b"\x1b-b": "iso8859_15",
        b"\x1b$@": "iso2022_jp",
    }.items()
}

# These Python codecs read the escape sequence themselves. They have 7-bit characters only.
_CODECS_WITH_ESCAPES = frozenset({"iso2022_jp", "iso2022_jp_2"})
_SEVEN_BIT_CODECS = _CODECS_WITH_ESCAPES | {default_encoding, "ascii"}
_EIGHT_BIT_RUN = re.compile(rb"([\x80-\xff]+)")

_ESCAPED_RUN = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")


def codecs_of(value: bytes) -> tuple[str, ...]:
    """Return Python's codecs for the values of Specific Character Set (0008,0005).

    Common misspellings ("ISO IR 100") are accepted. Any other term gives the default codec.
    """
    terms = value.decode("latin-1").split("\\")
    return tuple(_CODECS.get(_normal_term(term.strip("\0 ")), default_encoding) for term in terms)


def texts(vr: str, value: bytes, codecs: Sequence[str]) -> list[str]:
    """Decode the values of a data element of that VR, without their padding.

    Bytes that are not valid in the character sets become U+FFFD.
    """
    # Padding goes before decoding: in a two-byte character set it would be half a character.
    value = value.rstrip(b"\0 ")
    if vr not in _RESETS:
        text = value.decode("latin-1")
    elif b"\x1b" in value:
        # PS3.5 6.1.2.5: an escape sequence begins a run in another character set.
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
    # An escape sequence applies even if its character set was not declared: nothing else identifies
    # the encoding of what follows.
    if codec in _CODECS_WITH_ESCAPES:
        return _seven_bit_run(run, escape, vr, codec, codecs)
    text = run[len(escape) :]
    end = match.start() if (match := _RESETS[vr].search(text)) else len(text)
    return _run(text[:end], vr, codec, codecs) + _run(text[end:], vr, codecs[0], codecs)


def _seven_bit_run(run: bytes, escape: bytes, vr: str, codec: str, codecs: Sequence[str]) -> str:
    """Decode 8-bit bytes in the run by the character set that was active before it."""
    if run.isascii() or _only_eight_bit_codec(codecs) is None:
        return run.decode(codec, "replace")
    pieces = _EIGHT_BIT_RUN.split(run[len(escape) :])
    return "".join(
        _run(piece, vr, codecs[0], codecs) if odd % 2 else (escape + piece).decode(codec, "replace")
        for odd, piece in enumerate(pieces)
    )


def _only_eight_bit_codec(codecs: Sequence[str]) -> str | None:
    eight_bit = set(codecs) - _SEVEN_BIT_CODECS
    return eight_bit.pop() if len(eight_bit) == 1 else None


def _run(data: bytes, vr: str, codec: str, codecs: Sequence[str]) -> str:
    if codec in _SEVEN_BIT_CODECS and not data.isascii():
        # The escape sequence is missing, and only one declared character set has 8-bit bytes.
        codec = _only_eight_bit_codec(codecs) or codec
    text = data.decode(default_encoding if codec == "ascii" else codec, "replace")
    if codec == _JIS_X_0201:
        # PS3.5 6.2: byte 5C separates values in this character set as well.
        return text.translate(_YEN_AND_OVERLINE if vr in VRS_OF_ONE_VALUE else _OVERLINE)
    return text
