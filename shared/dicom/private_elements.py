"""VRs of private data elements, from the dictionary of their private creator (PS3.5 7.8.1)."""

import re
import struct
from contextlib import suppress
from functools import lru_cache

from pydicom._private_dict import private_dictionaries
from pydicom.datadict import private_dictionary_VR

from shared.dicom.header import NUMBER_FORMATS

MAX_VERIFIED_BYTES = 1 << 16
"""A larger value is not compared with the dictionary, and its VR stays unknown."""

_MAX_CREATORS = 256

# Bytes that a text value cannot contain: control characters other than those of PS3.5 6.1.3, and
# NUL between other characters.
_NOT_TEXT = re.compile(rb"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f]|\0[^\0 ]")
_DIGITS = re.compile(rb"(?=.*[0-9])[0-9+.eE\\ -]+", re.DOTALL)
_MIN_DIGITS_BYTES = 4


def _names_in_any_case() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in private_dictionaries:
        names.setdefault(name.casefold(), []).append(name)
    return names


_NAMES = _names_in_any_case()
_MAX_CREATOR_BYTES = max(map(len, private_dictionaries))


class PrivateCreators:
    """Map the private blocks of one data set or Item to their creators, if those are known."""

    def __init__(self) -> None:
        self._by_block: dict[int, str] = {}

    def add(self, tag: int, value: memoryview) -> None:
        """Add the value of the private creator element (gggg,00bb)."""
        # Twice the maximum leaves room for padding.
        creator = bytes(value[: 2 * _MAX_CREATOR_BYTES]).decode("latin-1").strip(" \0")
        if creator.casefold() in _NAMES and len(self._by_block) < _MAX_CREATORS:
            self._by_block[tag >> 16 << 8 | tag & 0xFF] = creator

    def vr(self, tag: int) -> str:
        """Return the VR of a private data element in its creator's dictionary, else UN."""
        creator = self._by_block.get(tag >> 8)
        return _private_vr(tag, creator) if creator else "UN"


@lru_cache(maxsize=8192)
def _private_vr(tag: int, creator: str) -> str:
    """Ignore the case of the creator's name if it must: some devices write another one."""
    exact = (creator,) if creator in private_dictionaries else ()
    for name in (*exact, *_NAMES[creator.casefold()]):
        with suppress(KeyError):
            vr = private_dictionary_VR(tag, name)
            # The VR is ambiguous if the dictionary has "US or SS".
            return vr if len(vr) == 2 else "UN"
    return "UN"


def contradicts_vr(vr: str, value: bytes) -> bool:
    """Return whether `value` shows that the writer used another VR than a private dictionary has.

    Some devices deviate from the known dictionary of their vendor. Four or more bytes of digits are
    a decimal written as text: read as a binary number they give an implausible value such as
    1.4e-71. Two digits may also be a 16-bit number, so the dictionary applies.
    """
    if vr in NUMBER_FORMATS:
        size_bytes = struct.calcsize("=" + NUMBER_FORMATS[vr])
        return bool(len(value) % size_bytes) or (
            size_bytes >= _MIN_DIGITS_BYTES and _DIGITS.fullmatch(value) is not None
        )
    if vr == "AT":
        return len(value) % 4 != 0
    return vr not in ("OB", "OW", "OD", "OF", "OL", "OV") and _NOT_TEXT.search(value) is not None
