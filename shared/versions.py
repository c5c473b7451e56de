"""The version of what is stored or sent: everything of ours names the version of its shape.

A reader keeps to one rule (docs/decisions/0008): it ignores fields that it does not know, and keeps
them when it writes the object again; an object of a newer version it neither reads nor changes.
"""

from typing import Any

import orjson


class WrittenByNewer(ValueError):
    """The object has a version that this Stowgate does not know."""


def loads(data: bytes, known: int) -> dict[str, Any]:
    """Parse a JSON object, and return its fields but for its version, which is 1 if it names none.

    Args:
        data: What was read.
        known: The newest version that the caller can read; all below it are read too.

    Raises:
        WrittenByNewer: The version is above `known`.
        ValueError: This is not a JSON object, or its version is not one.
    """
    row = orjson.loads(data)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    version = row.pop("version", 1)
    if type(version) is not int or version < 1:
        raise ValueError("not a version")
    if version > known:
        raise WrittenByNewer(
            f"was written by a newer Stowgate (version {version}, this one reads up to {known}); "
            "leave it there, and upgrade this service"
        )
    return row


def why_unreadable(error: Exception) -> str:
    """Say what is wrong with an object and what to do, to follow its key in a sentence."""
    if isinstance(error, WrittenByNewer):
        return str(error)
    return "is damaged or not written by Stowgate; inspect it and move it out of the bucket"
