"""The identifiers that Stowgate mints or accepts, and their grammars."""

import hashlib
import os
import re
from datetime import UTC, datetime
from uuid import UUID

# To be matched with `fullmatch`; the syntax is also valid in JSON Schema.
WORKFLOW_ID = "(?!vae$)[A-Za-z0-9][A-Za-z0-9._~-]{0,127}"
AE_TITLE = "[A-Za-z0-9_-]{1,15}"
SOURCE = "[A-Za-z0-9._-](?:[A-Za-z0-9._ -]{0,13}[A-Za-z0-9._-])?"
_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

WORKFLOW_ID_RULE = (
    "a workflow id is 1 to 128 of A-Z a-z 0-9 . _ ~ -, begins with a letter or digit, "
    "and is not 'vae'"
)
AE_TITLE_RULE = "an AE title is 1 to 15 of A-Z a-z 0-9 _ -"
SOURCE_RULE = "a source is 1 to 15 of A-Z a-z 0-9 . _ - and spaces, which neither begin nor end it"

_CHECK_BYTES = 4

_YEAR_10000 = "e677d21f-dc00"


class PayloadIds:
    """Payload ids of one Stowgate: UUID version 7 (RFC 9562 5.7), which sort by time.

    The last 32 random bits are a checksum over the rest and `realm`, the name of the state bucket.
    By it the sweeper distinguishes its payloads from those of other producers in a shared bucket.
    """

    def __init__(self, realm: str) -> None:
        self.realm = realm

    def mint(self, moment: datetime) -> str:
        head = int(moment.timestamp() * 1000).to_bytes(6, "big") + os.urandom(6)
        head = head[:6] + bytes([0x70 | head[6] & 0x0F, head[7], 0x80 | head[8] & 0x3F]) + head[9:]
        return str(UUID(bytes=head + self._check(head)))

    def minted(self, payload_id: str) -> bool:
        """Whether the id was minted in this realm; 1 in 4 billion foreign ids matches by chance."""
        if not is_guid(payload_id):
            return False
        value = UUID(payload_id).bytes
        return value[-_CHECK_BYTES:] == self._check(value[:-_CHECK_BYTES])

    def _check(self, head: bytes) -> bytes:
        return hashlib.sha256(self.realm.encode() + b"\0" + head).digest()[:_CHECK_BYTES]


def minted_before(moment: datetime) -> str:
    """Return a prefix: payload ids minted before that moment sort below it, later ones above."""
    milliseconds = f"{int(moment.timestamp() * 1000):012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}"


def has_moment(payload_id: str) -> bool:
    """Whether `minted_at` can represent the time: a UUIDv7 reaches the year 10889, `datetime` only
    9999."""
    return payload_id < _YEAR_10000


def minted_at(payload_id: str) -> datetime:
    """Return when a UUIDv7 was minted, to the millisecond."""
    return datetime.fromtimestamp((UUID(payload_id).int >> 80) / 1000, UTC)


def is_guid(text: str) -> bool:
    return _GUID.fullmatch(text) is not None


def is_workflow_id(text: str) -> bool:
    return re.fullmatch(WORKFLOW_ID, text) is not None


def is_source(text: str) -> bool:
    """Whether the Workflow Manager accepts the text as the name of a sender."""
    return re.fullmatch(SOURCE, text) is not None


def is_ae_title(text: str) -> bool:
    return re.fullmatch(AE_TITLE, text) is not None
