"""How much of anything an instance may have: what is checked, and what the sidecar describes of it.

What is over a limit of the check is not stored, as it would cost more time or memory than any real
object is worth. What is over a limit of the description is stored, and described in part.
"""

from dataclasses import dataclass

MAX_NESTED_SEQUENCES = 64
"""Sequences within sequences. Structured reports, the deepest in practice, stay well below; others
will read the file with pydicom, which overflows Python's stack at about 200."""

MAX_CHECKED_ELEMENTS = 2_000_000
"""Data elements and sequence items, nested ones included. A segmentation of 12,000 frames has some
300,000, which are walked in about a second; this many in some five to ten."""

MAX_RETRIED_ELEMENTS = MAX_CHECKED_ELEMENTS
"""Elements, items and fragments that are walked once more, to find out how they are encoded."""

MAX_FRAGMENTS = 2_000_000
"""Fragments of encapsulated pixel data. Each frame has at least one (PS3.5 A.4), and whole slides
have some hundreds of thousands of frames; this many are walked in about a second."""

MAX_INFLATED_BYTES = 256 * 1024 * 1024
"""A deflated data set, inflated, and the file that it comes in. Deflate shrinks up to 1000:1, so a
megabyte could otherwise become a gigabyte of scratch space; real objects in this transfer syntax
stay far below."""

MAX_FILE_META_BYTES = 16 * 1024 * 1024
"""The file meta information. The worker reads all of it; in practice it has some hundred bytes."""

MAX_ELEMENTS = 200_000
"""Data elements and sequence items that are described. The worker may need 1 kB for each."""

MAX_METADATA_BYTES = 64 * 1024 * 1024
"""Bytes of the file that are described. The sidecar is made of them in memory; the waveforms of a
day, the largest that is of use in practice, are well below."""

MAX_VALUE_BYTES = 16 * 1024 * 1024
"""One value that is described. Text takes up to four times as much in memory, and once more as
JSON."""

MAX_VALUES = 2_000_000
"""Values in the metadata sidecar, all elements together. As Python objects each takes far more
memory than its bytes in the file, up to some 200 bytes for a name; the elements that would have
more are given by their VR alone. The contours of a large structure set, the most in practice, have
about this many."""

MAX_DESCRIBED_SEQUENCES = 20
"""Sequences within sequences that are described. The Workflow Manager's JSON reader refuses more
than 64 levels, and so the whole payload: a sequence makes three, and a name in it four."""

MAX_LEFT_OUT = 1000
"""Ranges of a file that the worker does not read. What is behind the last is not described."""

MAX_WITHOUT_VALUE = 64
"""Top-level elements that are given by their VR alone, as they are too large to be described. Each
is in the ingest record."""

KEPT_VALUE_BYTES = 1024
"""How much is kept of a value that holds a UID: far more than a UID has, whatever its length field
says."""


@dataclass(frozen=True)
class StructureLimits:
    """Those limits that an operator sets: `nested_sequences` of what is stored, and `elements` and
    `metadata_bytes` of what is described."""

    nested_sequences: int = MAX_NESTED_SEQUENCES
    elements: int = MAX_ELEMENTS
    metadata_bytes: int = MAX_METADATA_BYTES


DEFAULT = StructureLimits()

HIGHEST = StructureLimits(
    nested_sequences=MAX_NESTED_SEQUENCES,
    elements=1_000_000,
    metadata_bytes=256 * 1024 * 1024,
)
"""As far as they can be set. Sidecars are made within these, so that a worker can describe whatever
an API of other settings accepted."""
