"""Versions of stored objects and events: each names the version of its shape.

The rule for readers (docs/decisions/0008): ignore unknown fields, and keep them when writing the
object again; neither read nor change an object of a newer version.
"""

from typing import Any

import orjson


class WrittenByNewer(ValueError):
    """The object has a version that is newer than this Stowgate."""


def loads(data: bytes, known: int) -> dict[str, Any]:
    """Parse a JSON object, and return its fields without its version, which defaults to 1.

    Args:
        data: The encoded object.
        known: The newest version that the caller can read; it can read all earlier ones too.

    Raises:
        WrittenByNewer: The version is above `known`.
        ValueError: The data is not a JSON object, or its version is not valid.
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
    """Return cause and remedy, as the rest of a sentence that begins with the object's key."""
    if isinstance(error, WrittenByNewer):
        return str(error)
    return "is damaged or not written by Stowgate; inspect it and move it out of the bucket"
