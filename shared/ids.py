"""The identifiers that Stowgate mints or takes from outside, and their grammars."""

import os
import re
import time
from uuid import UUID

_WORKFLOW_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}")
_AE_TITLE = re.compile(r"[A-Za-z0-9_-]{1,15}")
_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

WORKFLOW_ID_RULE = (
    "a workflow id is 1 to 128 of A-Z a-z 0-9 . _ ~ -, begins with a letter or digit, "
    "and is not 'vae'"
)
AE_TITLE_RULE = "an AE title is 1 to 15 of A-Z a-z 0-9 _ -"


def new_payload_id() -> str:
    """A UUID version 7 (RFC 9562 5.7): sorts by the millisecond it was minted in."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


def is_guid(text: str) -> bool:
    return _GUID.fullmatch(text) is not None


def is_workflow_id(text: str) -> bool:
    return text != "vae" and _WORKFLOW_ID.fullmatch(text) is not None


def is_ae_title(text: str) -> bool:
    return _AE_TITLE.fullmatch(text) is not None
