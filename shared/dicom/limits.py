"""How much of anything an instance may have, so that no file costs more than its size is worth."""

from dataclasses import dataclass

MAX_NESTED_SEQUENCES = 64
"""Sequences within sequences. Structured reports, the deepest in practice, stay well below; others
will read the file with pydicom, which overflows Python's stack at about 200."""

MAX_ELEMENTS = 200_000
"""Data elements and sequence items, nested ones included. Enhanced multi-frame objects of thousands
of frames have some tens of thousands; this many are walked in a fraction of a second."""

MAX_FRAGMENTS = 2_000_000
"""Fragments of encapsulated pixel data. Each frame has at least one (PS3.5 A.4), and whole slides
have some hundreds of thousands of frames; this many are walked in about a second."""

MAX_INFLATED_BYTES = 256 * 1024 * 1024
"""A deflated data set, inflated, and the file that it comes in. Deflate shrinks up to 1000:1, so a
megabyte could otherwise become a gigabyte of scratch space; real objects in this transfer syntax
stay far below."""

MAX_DESCRIBED_BYTES = 64 * 1024 * 1024
"""What a file has beside its bulk values. All of it goes into the metadata sidecar, which is
made in memory; the waveforms of a day, the largest in practice, are well below."""

MAX_VALUES = 2_000_000
"""Values in the metadata sidecar, all elements together. As Python objects each takes far more
memory than its bytes in the file, up to some 200 bytes for a name; the elements that would have
more are given by their VR alone. The contours of a large structure set, the most in practice, have
about this many."""

KEPT_VALUE_BYTES = 1024
"""How much is kept of a value that holds a UID: far more than a UID has, whatever its length field
says."""


@dataclass(frozen=True)
class StructureLimits:
    """Those limits that an operator sets."""

    nested_sequences: int = MAX_NESTED_SEQUENCES
    elements: int = MAX_ELEMENTS
    described_bytes: int = MAX_DESCRIBED_BYTES


DEFAULT = StructureLimits()

MOST = StructureLimits(
    nested_sequences=MAX_NESTED_SEQUENCES, elements=1_000_000, described_bytes=256 * 1024 * 1024
)
"""As far as they can be set. Sidecars are made within these, so that a worker can describe whatever
an API of other settings accepted."""
