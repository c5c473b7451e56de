"""The VRs of private elements, by the dictionary of their owner (PS3.5 7.8.1)."""

import re
import struct
from contextlib import suppress
from functools import lru_cache

from pydicom._private_dict import private_dictionaries
from pydicom.datadict import private_dictionary_VR

from shared.dicom.header import NUMBERS

MAX_PROVEN_BYTES = 1 << 16
"""A larger value is not held against the dictionary, and its VR is not known."""

_MAX_CREATORS = 256

# What a text value cannot have: all control characters but those of PS3.5 6.1.3, and NUL between
# other characters.
_NO_TEXT = re.compile(rb"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f]|\0[^\0 ]")
_DIGITS = re.compile(rb"(?=.*[0-9])[0-9+.eE\\ -]+", re.DOTALL)
_FEWEST_DIGITS_BYTES = 4


def _names_in_any_case() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in private_dictionaries:
        names.setdefault(name.casefold(), []).append(name)
    return names


_NAMES = _names_in_any_case()
_CREATOR_MAX_BYTES = max(map(len, private_dictionaries))


class PrivateCreators:
    """The owners of the private blocks of one data set or item, as far as they are known."""

    def __init__(self) -> None:
        self._by_block: dict[int, str] = {}

    def note(self, tag: int, value: memoryview) -> None:
        """Note the value of a Private Creator, (gggg,00bb)."""
        # With room for padding.
        creator = bytes(value[: 2 * _CREATOR_MAX_BYTES]).decode("latin-1").strip(" \0")
        if creator.casefold() in _NAMES and len(self._by_block) < _MAX_CREATORS:
            self._by_block[tag >> 16 << 8 | tag & 0xFF] = creator

    def vr(self, tag: int) -> str:
        """The VR that the owner of a private element is known to give it, else UN."""
        creator = self._by_block.get(tag >> 8)
        return _private_vr(tag, creator) if creator else "UN"


@lru_cache(maxsize=8192)
def _private_vr(tag: int, creator: str) -> str:
    """Some devices write the creator in another case than the dictionary has it."""
    exact = (creator,) if creator in private_dictionaries else ()
    for name in (*exact, *_NAMES[creator.casefold()]):
        with suppress(KeyError):
            vr = private_dictionary_VR(tag, name)
            # No dictionary settles "US or SS".
            return vr if len(vr) == 2 else "UN"
    return "UN"


def is_disproved(vr: str, value: bytes) -> bool:
    """Whether the bytes show that a VR from a private dictionary is not that of this writer.

    Devices differ from what is known of their maker's dictionary. Four and more bytes of digits are
    a decimal that was written as text: as a binary number they are one that nothing measures, such
    as 1.4e-71. A 16-bit number of two digits may be either, so there the dictionary is followed.
    """
    if vr in NUMBERS:
        size_bytes = struct.calcsize("=" + NUMBERS[vr])
        return bool(len(value) % size_bytes) or (
            size_bytes >= _FEWEST_DIGITS_BYTES and _DIGITS.fullmatch(value) is not None
        )
    if vr == "AT":
        return len(value) % 4 != 0
    return vr not in ("OB", "OW", "OD", "OF", "OL", "OV") and _NO_TEXT.search(value) is not None
