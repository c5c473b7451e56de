"""Limits on the size of an instance, for the structure check and for the metadata sidecar.

An instance over a limit of the check is refused: it would cost more time or memory than any real
object is worth. An instance over a limit of the sidecar is stored, and described in part.
"""

from dataclasses import dataclass

MAX_NESTED_SEQUENCES = 64
"""Sequences within Sequences. Structured reports nest deepest in practice, and stay well below.
pydicom, which other readers of the file use, overflows Python's stack at about 200."""

MAX_CHECKED_ELEMENTS = 2_000_000
"""Data elements and Items, nested ones included. A segmentation of 12,000 frames has some 300,000,
which the check reads in about a second; the maximum takes five to ten seconds."""

MAX_RETRIED_ELEMENTS = MAX_CHECKED_ELEMENTS
"""Data elements, Items and fragments that are read a second time to detect their encoding."""

MAX_FRAGMENTS = 2_000_000
"""Fragments of encapsulated pixel data. Each frame has at least one (PS3.5 A.4), and whole slide
images have some hundreds of thousands of frames. The check reads the maximum in about a second."""

MAX_INFLATED_BYTES = 256 * 1024 * 1024
"""A deflated data set after inflation, and the file that contains it. Deflate compresses up to
1000:1, so a megabyte could otherwise fill a gigabyte of scratch space. Real objects in this
transfer syntax stay far below."""

MAX_FILE_META_BYTES = 16 * 1024 * 1024
"""The file meta information. The worker reads all of it; in practice it has some hundred bytes."""

MAX_ELEMENTS = 200_000
"""Data elements and Items in the sidecar. The worker may need 1 kB for each."""

MAX_METADATA_BYTES = 64 * 1024 * 1024
"""Bytes of the file that the sidecar describes. The worker builds the sidecar in memory. The
largest useful content in practice, the waveforms of a day, stays well below."""

MAX_VALUE_BYTES = 16 * 1024 * 1024
"""One value in the sidecar. Text takes up to four times its size in memory, and once more as
JSON."""

MAX_VALUES = 2_000_000
"""Values in the sidecar, all data elements together. As a Python object a value takes far more
memory than in the file, up to some 200 bytes for a name. A data element beyond the limit has a VR
and no value. The contours of a large structure set, the most in practice, have about this many."""

MAX_DESCRIBED_SEQUENCES = 20
"""Sequences within Sequences in the sidecar. The Workflow Manager's JSON reader refuses a payload
with more than 64 levels: a Sequence takes three of them, and a name within it four."""

MAX_LEFT_OUT = 1000
"""Byte ranges of a file that the worker skips. The sidecar describes nothing after the last one."""

MAX_WITHOUT_VALUE = 64
"""Top-level data elements that are too large to describe, and have a VR and no value. The ingest
record lists each of them."""

MAX_KEPT_VALUE_BYTES = 1024
"""Bytes that are kept of a UID's value: far more than a valid UID has, whatever its length field
says."""


@dataclass(frozen=True)
class StructureLimits:
    """Hold the limits that an operator sets.

    `max_nested_sequences` applies to the structure check, `max_elements` and `max_metadata_bytes`
    to the metadata sidecar.
    """

    max_nested_sequences: int = MAX_NESTED_SEQUENCES
    max_elements: int = MAX_ELEMENTS
    max_metadata_bytes: int = MAX_METADATA_BYTES


DEFAULT = StructureLimits()

HIGHEST = StructureLimits(
    max_nested_sequences=MAX_NESTED_SEQUENCES,
    max_elements=1_000_000,
    max_metadata_bytes=256 * 1024 * 1024,
)
"""The upper bounds of the settings. Workers build sidecars within these, so that each can describe
whatever an API with other settings accepted."""
