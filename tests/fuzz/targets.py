"""Targets of the fuzzer, and what must hold for every input.

A target makes an input (`make`), passes it to the tested code (`run`), and compares an accepted
result with an independent one (`verify`). Time and memory are measured in `run` only.
"""

import base64
import binascii
import io
import itertools
import json
import os.path
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import mutations
import pydicom
from encoded import without
from mutations import damage_bytes

from api.stow.multipart import MalformedMultipart, parse_media_type, read_parts
from shared import events, records
from shared.dicom.header import looks_like_vr
from shared.dicom.identity import Identity, identify
from shared.dicom.left_out import LeftOut
from shared.dicom.limits import DEFAULT
from shared.dicom.metadata import _element_cache, metadata_json
from shared.dicom.part10 import open_dataset
from shared.dicom.refusal import InstanceRefused
from shared.dicom.structure import check_structure, first_structure
from shared.dicom.uids import SERIES_INSTANCE_UID, is_uid
from shared.dicom.walk import StepKind, Walk
from shared.errors import MalformedEvent
from shared.ids import is_ae_title, is_guid, is_workflow_id
from shared.instances import StoredInstance
from shared.ports import check_key


class Finding(AssertionError):
    """An accepted result is wrong. Any other exception from a target is a finding too."""


class Target(Protocol):
    name: str
    share: int
    """Percentage of all cases."""

    def make(self, rng: random.Random) -> bytes: ...

    def run(self, data: bytes) -> Any:
        """Return the result of the tested code; None if it refuses with an error of its own."""

    def verify(self, data: bytes, result: Any) -> None:
        """Raise `Finding` if the result is wrong or the input should have been refused."""


class _Instance(NamedTuple):
    identity: Identity
    sidecar: bytes


class Instances:
    """Test the structure check, the identity, and the metadata sidecar, with files from `make`."""

    def __init__(self, name: str, share: int, make: Callable[[random.Random], bytes]) -> None:
        self.name = name
        self.share = share
        self.make = make

    def run(self, data: bytes) -> _Instance | None:
        first = first_structure(data, SERIES_INSTANCE_UID)
        try:
            structure = check_structure(data)
        except InstanceRefused:
            return None
        # Every file that the check accepts can be described, even without an identity.
        sidecar = described(data, structure.left_out)
        try:
            identity = identify(structure)
        except InstanceRefused:
            return None
        # The rest of the file may have more of the wanted values if its tags do not ascend.
        if first is not None and not first.values.items() <= structure.values.items():
            raise Finding("the beginning and the complete file give different values")
        return _Instance(identity, sidecar)

    def verify(self, data: bytes, result: _Instance) -> None:
        ours, theirs = (
            _uids(result.identity),
            uids_by_pydicom(data, result.identity.transfer_syntax_uid),
        )
        if theirs is not None and ours != theirs:
            raise Finding(f"Stowgate reads {ours}, pydicom reads {theirs}")
        elements = json.loads(result.sidecar)
        check_dicom_json(elements)
        if tuple(_only_value(elements, tag) for tag in _IDENTITY) != ours:
            raise Finding("the sidecar and the identity have different UIDs")
        if metadata_json(data) != result.sidecar:
            raise Finding("the left-out ranges change the sidecar")
        _element_cache.cache_clear()
        if metadata_json(data) != result.sidecar:
            raise Finding("elements cached from other files change the sidecar")
        stored = StoredInstance(*ours, size_bytes=len(data), sha256="")
        check_key(f"{'x' * 36}/{stored.metadata_path}")


_IDENTITY = ("00080016", "00080018", "0020000D", "0020000E")


def _uids(identity: Identity) -> tuple[str, str, str, str]:
    return (
        identity.sop_class_uid,
        identity.sop_instance_uid,
        identity.study_uid,
        identity.series_uid,
    )


def _only_value(elements: dict[str, Any], tag: str) -> Any:
    values = elements.get(tag, {}).get("Value", [])
    return values[0] if len(values) == 1 else None


def described(data: bytes, left_out: LeftOut) -> bytes:
    """Describe a file as a worker does, which does not read the left-out ranges."""
    return metadata_json(data if left_out.is_inflated else without(data, left_out.ranges), left_out)


# Known deviations of pydicom from the standard.
_DEFLATED_UNKNOWN_TO_PYDICOM = ("1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205")
_UN_SEQUENCE = re.compile(rb"UN\0\0\xff\xff\xff\xff")


def uids_by_pydicom(data: bytes, syntax: str) -> tuple[str, ...] | None:
    """Return SOP Class, SOP Instance, Study and Series Instance UID as pydicom reads them.

    Returns None if pydicom is known to be wrong. It reads a Sequence of VR UN in the byte order of
    the file, but PS3.5 6.2.2 requires little endian. It also decides between explicit and implicit
    VR by two bytes, without looking at what follows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if syntax == mutations.BIG_ENDIAN and _UN_SEQUENCE.search(data):
            return None
        if _is_guessed_by_pydicom(data):
            return None
        if syntax in _DEFLATED_UNKNOWN_TO_PYDICOM:  # pydicom inflates that of PS3.5 A.5 only
            data = mutations.with_transfer_syntax(data, mutations.DEFLATED)
        ds = pydicom.dcmread(io.BytesIO(data))
        return tuple(str(ds[tag].value) for tag in _IDENTITY)


def _is_guessed_by_pydicom(data: bytes) -> bool:
    """Return whether pydicom would guess an encoding: an implicit data set or Item begins with what
    looks like a VR, an implicit Sequence has an explicit Item, a data element has a blank VR, or a
    big endian data set begins with a delimitation Item in little endian."""
    with open_dataset(data, {}, tempfile.TemporaryFile) as dataset:
        view, walk = dataset.view, Walk(dataset, DEFAULT)
        if bytes(view[dataset.start : dataset.start + 2]) == b"\xfe\xff":
            return True
        sequences: list[bool] = []
        begin, is_explicit = dataset.start, walk.encoding[0]
        while True:
            if not is_explicit and looks_like_vr(bytes(view[begin + 4 : begin + 6])):
                return True
            step = walk.step()
            if step is None:
                return False
            if step.kind is StepKind.SEQUENCE:
                sequences.append(walk.encoding[0])
            elif step.kind is StepKind.END_OF_SEQUENCE:
                sequences.pop()
            elif step.kind is StepKind.ITEM:
                begin, is_explicit = walk.position, walk.encoding[0]
                if is_explicit and not sequences[-1]:
                    return True
            elif (
                step.kind is StepKind.ELEMENT
                and walk.encoding[0]
                and bytes(view[step.start + 4 : step.start + 6]) in (b"  ", b"\0\0", b" \0", b"??")
            ):
                return True


_TEXT_VRS = {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
_NUMBER_VRS = {"DS", "IS", "FL", "FD", "SL", "SS", "SV", "UL", "US", "UV"}
_BINARY_VRS = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
_TAG = re.compile(r"[0-9A-F]{8}")


def check_dicom_json(elements: Any) -> None:
    """Raise `Finding` if this is not a data set in the DICOM JSON Model (PS3.18 F.2)."""
    if not isinstance(elements, dict) or list(elements) != sorted(elements):
        raise Finding("F.2.2: a data set is an object, ascending by tag")
    for tag, element in elements.items():
        if not _TAG.fullmatch(tag):
            raise Finding(f"F.2.2: {tag} is not a valid tag")
        if element.keys() - {"vr", "Value", "InlineBinary"} or len(element) > 2:
            raise Finding(f"F.2.2: {tag} has {sorted(element)}")
        vr = element["vr"]
        if "InlineBinary" in element:
            try:
                base64.b64decode(element["InlineBinary"], validate=True)
            except binascii.Error as error:
                raise Finding(f"F.2.7: {tag} is not valid base64") from error
            if vr not in _BINARY_VRS:
                raise Finding(f"F.2.7: {tag} of VR {vr} has InlineBinary")
        elif "Value" in element:
            _check_values(tag, vr, element["Value"])
        elif vr not in _TEXT_VRS | _NUMBER_VRS | _BINARY_VRS | {"AT", "PN", "SQ"}:
            raise Finding(f"F.2.3: {tag} has VR {vr}")


def _check_values(tag: str, vr: str, values: Any) -> None:
    if not isinstance(values, list) or not values or values == [None]:
        raise Finding(f"F.2.5: {tag} has an empty Value")
    for value in values:
        if vr == "SQ":
            check_dicom_json(value)
        elif not (value is None or _is_value(vr, value)):
            raise Finding(f"Table F.2.3-1: {tag} {vr} has a {type(value).__name__}")


def _is_value(vr: str, value: Any) -> bool:
    if vr == "PN":
        names = {"Alphabetic", "Ideographic", "Phonetic"}
        return (
            isinstance(value, dict)
            and bool(value)
            and value.keys() <= names
            and all(isinstance(name, str) and name for name in value.values())
        )
    if vr == "AT":
        return isinstance(value, str) and _TAG.fullmatch(value) is not None
    if vr in _NUMBER_VRS:
        if isinstance(value, str):
            # A number that is not valid in JSON or in the file stays a string.
            return vr in ("DS", "IS") or value in ("NaN", "Infinity", "-Infinity")
        return type(value) is int or (type(value) is float and vr in ("DS", "FL", "FD"))
    return vr in _TEXT_VRS and isinstance(value, str) and value != ""


class _UnevenStream:
    def __init__(self, body: bytes, sizes: list[int]) -> None:
        self._body = io.BytesIO(body)
        self._sizes = itertools.cycle(sizes)

    def read(self, size: int) -> bytes:
        return self._body.read(min(size, next(self._sizes)))


class Multipart:
    """Test the multipart reader. The first line of an input is the boundary, and the length of the
    input determines the sizes of the pieces in which the body arrives."""

    name = "multipart"
    share = 15

    def make(self, rng: random.Random) -> bytes:
        boundary = rng.choice([b"b", b"-", b"b:c", b"---x", b"a b", b"\xe9", b"b" * 200])
        line = b"\r\n--" + boundary
        pieces = [
            *(
                line,
                line + b"\r\n\r\n",
                line + b"\r\nX: y\r\n\r\n",
                line + b"--",
                line + b"--\0",
                line + b" \t\r\n",
            ),
            *(b"\r\n", b"\r", b"\n", b"--", b"\r\n\r\n", b" ", b":", line[:-1], line + b" " * 257),
            *(b"Content-Type: application/dicom\r\n", b"\r\n folded", b"\0" * 40, rng.randbytes(9)),
        ]
        content = b"".join(rng.choice(pieces) for _ in range(rng.randrange(20)))
        first = line[2:] if rng.random() < 0.7 else line
        body = bytearray(first + b"\r\n\r\n" + content + line + b"--\r\n")
        if rng.random() < 0.4:
            damage_bytes(rng, body)
        if rng.random() < 0.01:
            boundary = rng.randbytes(rng.randrange(300)).replace(b"\n", b"")
        return boundary + b"\n" + bytes(body)

    def run(self, data: bytes) -> list[Any] | None:
        boundary, body = _boundary_and_body(data)
        sizes = [1 + len(data) % 7, 1 + len(data) % 31, 1 + len(data) % 3]
        return _parts(_UnevenStream(body, sizes), boundary, 1 + len(data) % 97)

    def verify(self, data: bytes, result: list[Any]) -> None:
        boundary, body = _boundary_and_body(data)
        if _parts(io.BytesIO(body), boundary, 1 << 20) != result:
            raise Finding("the body gives different parts if it arrives in one piece")
        position = 0
        for headers, content in result:
            position = body.find(content, position)
            if position < 0:
                raise Finding("a part that is not in the body")
            position += len(content)
            if any(line in content for line in _delimiter_lines(boundary)):
                raise Finding("a part that contains a delimiter")
            if any(name != name.lower() for name in headers):
                raise Finding("a header name that is not in lower case")


def _boundary_and_body(data: bytes) -> tuple[str, bytes]:
    boundary, _, body = data.partition(b"\n")
    return boundary.decode("latin-1"), body


def _delimiter_lines(boundary: str) -> list[bytes]:
    line = b"\r\n--" + boundary.encode("latin-1")
    return [line + b"\r\n", *(line + b"--" + end for end in (b"\r", b"\n", b"\0"))]


def _parts(stream: Any, boundary: str, chunk_bytes: int) -> list[Any] | None:
    try:
        parts = read_parts(stream, boundary, chunk_bytes)
        return [(dict(part.headers), b"".join(part)) for part in parts]
    except MalformedMultipart:
        return None


class MediaTypes:
    """Test the parser of Content-Type headers. It never refuses, so a round trip must agree."""

    name = "media type"
    share = 10

    def make(self, rng: random.Random) -> bytes:
        pieces = [
            *("multipart/related", "application/dicom", ";", "; ", "type=", "boundary=", '"', "\\"),
            *(
                "=",
                " ",
                "\t",
                "\r\n",
                "\0",
                "a",
                "---",
                "é",
                "*0*=",
                "utf-8''%zz",
                ";" * 50,
                "x" * 99,
            ),
        ]
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(25))).encode()

    def run(self, data: bytes) -> Any:
        return parse_media_type(data.decode("latin-1"))

    def verify(self, data: bytes, result: Any) -> None:  # noqa: ARG002
        quoted = (
            '; {}="{}"'.format(name, re.sub(r'(["\\])', r"\\\1", value))
            for name, value in result.parameters.items()
        )
        again = parse_media_type(result.type + "".join(quoted))
        if again != result:
            raise Finding(f"the round trip gives {again} instead of {result}")


class Grammars:
    """Test the grammars of values in a key, a URL or a log line."""

    name = "grammars"
    share = 15
    _LEGAL = (
        *(
            "1.2.840.10008.5.1.4.1.1.2",
            "9" * 64,
            "0",
            "liver-seg_v1.2~3",
            "vae",
            "MONAI-1",
            "x" * 128,
        ),
        *("0190b2f4-7c1e-7abc-8def-0123456789ab", "dcm/1.2/3.4/5.6.dcm", "é/" + "n" * 255, "a/b/c"),
    )
    _PIECES = (
        "/",
        ".",
        "..",
        "\\",
        "\0",
        "\n",
        "\x7f",
        "\x85",
        "\u2028",
        "%2e",
        " ",
        "-",
        "\u0661",
        "\u0130",
    )

    def make(self, rng: random.Random) -> bytes:
        text = rng.choice(self._LEGAL)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text) + 1)
            piece = rng.choice((*self._PIECES, chr(rng.randrange(0x20, 0x2FF)), text[:at]))
            text = text[:at] + piece + text[at + rng.randrange(2) :]
        return text.encode()

    def run(self, data: bytes) -> set[str] | None:
        text = data.decode("utf-8", "surrogateescape")
        grammars = (is_uid, is_guid, is_workflow_id, is_ae_title)
        accepted = {grammar.__name__ for grammar in grammars if grammar(text)}
        try:
            check_key(text)
            accepted.add("check_key")
        except ValueError:
            pass
        return accepted or None

    def verify(self, data: bytes, result: set[str]) -> None:
        text = data.decode()
        if not text.isprintable() and any(
            ord(character) < 0xA0 for character in text if (not character.isprintable())
        ):
            raise Finding(f"a control character, in {result}")
        if result - {"check_key"} and not re.fullmatch("[A-Za-z0-9._~-]+", text):
            raise Finding(f"a character outside the grammar, in {result}")
        if os.path.normpath(f"/store/{text}") != f"/store/{text}":
            raise Finding(f"a path that is not normalized, in {result}")
        components = text.split(".")
        if "is_uid" in result and (len(text) > 64 or not all(map(str.isdigit, components))):
            raise Finding("not a valid UID")
        if "is_workflow_id" in result and text in ("vae", ".", ".."):
            raise Finding("not a valid workflow id")
        if "check_key" in result and len(data) > 1024:
            raise Finding("a key that S3 does not accept")


_MOMENT = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
_EVENT = {"payload_id": "0190b2f4-7c1e-7abc-8def-0123456789ab"} | {
    "correlation_id": "5f0c6f1e-6f0e-4d3c-9d64-1f2d3c4b5a69"
}
_JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**63, 10**30, 1.5, 1e308, "", "x", "\ud7ff", "9" * 5000, [], {}),
    *([[]], [None], {"": None}, [1, "a"], "2026-01-02T03:04:05Z", "0001-01-01T00:00:00+23:59"),
    *("9999-12-31T23:59:59-23:59", "2026-01-02", "2026-W01", "pending", "opened", "é", "Infinity"),
)


def _changed_json(rng: random.Random, legal: Any) -> bytes:
    """Return valid JSON with changed values, extra or missing fields, or damaged bytes."""
    row = json.loads(json.dumps(legal))
    for _ in range(rng.randrange(3)):
        at, key = rng.choice(list(_slots(row)))
        change = rng.random()
        if change < 0.7:
            at[key] = deepcopy(rng.choice(_JSON_VALUES))
        elif change < 0.85:
            del at[key]
        elif isinstance(at, dict):
            at[rng.choice(["", "extra", "__class__", "self"])] = deepcopy(rng.choice(_JSON_VALUES))
        if not row:
            break
    data = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace"))
    kind = rng.random()
    if kind < 0.2:
        damage_bytes(rng, data)
    elif kind < 0.22:
        at_byte = rng.randrange(len(data))
        data[at_byte:at_byte] = rng.choice([b"[", b'{"a":']) * rng.choice([100, 2000, 100_000])
    elif kind < 0.24:
        data[:] = rng.choice([b"", b"null", b"[]", b"NaN", b"\xff", b"1" * 5000, b"1e999", b'"x"'])
    return bytes(data)


def _slots(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list):
            yield from _slots(value)


class Events:
    """Test the decoder of events in the queue."""

    name = "events"
    share = 10

    def make(self, rng: random.Random) -> bytes:
        return _changed_json(rng, _EVENT)

    def run(self, data: bytes) -> Any:
        try:
            return events.decode(data)
        except (MalformedEvent, events.NewerEvent):
            return None

    def verify(self, data: bytes, result: Any) -> None:
        if not (is_guid(result.payload_id) and is_guid(result.correlation_id)):
            raise Finding("an id that is not a valid GUID")
        body = json.loads(data)
        if {name: body.get(name) for name in asdict(result)} != asdict(result):
            raise Finding("an event that differs from its body")


def _legal_record() -> Any:
    record = records.IngestRecord(
        payload_id=_EVENT["payload_id"],
        correlation_id=_EVENT["correlation_id"],
        received_at=_MOMENT,
        source="10.0.0.1",
        destination="MONAI",
        workflow=None,
        vae_workflows=("liver", "lung"),
        file_count=1,
        instances=(
            StoredInstance(
                *("1.2.3", "1.2.4", "1.2.5", "1.2.6", 7, "ab" * 32),
                LeftOut(((1, 2), (3, 4)), (("52009230", "SQ"),), is_explicit=True),
            ),
        ),
        due_at=_MOMENT,
        lease=records.Lease("worker-1", _MOMENT),
        workflow_request={"body": {"a": [1]}},
        first_answer=records.FirstAnswer("f", 200, "application/dicom+json", "{}"),
    )
    return json.loads(records.encode(record))


class Records:
    """Test the decoder of ingest records in the state bucket."""

    name = "records"
    share = 10

    def __init__(self) -> None:
        self._legal = _legal_record()

    def make(self, rng: random.Random) -> bytes:
        return _changed_json(rng, self._legal)

    def run(self, data: bytes) -> Any:
        try:
            return records.decode(data)
        except records.RecordUnreadable:
            return None

    def verify(self, data: bytes, result: Any) -> None:  # noqa: ARG002
        if records.decode(records.encode(result)) != result:
            raise Finding("a record that changes in a round trip")
        for instance in result.instances or ():
            if not (isinstance(instance.path, str) and isinstance(instance.size_bytes, int)):
                raise Finding("an instance with a value of another type")
            records.newest_first(result.payload_id)


def all_targets() -> list[Target]:
    return [
        Instances("damaged files", 18, mutations.damaged_file),
        Instances("made-up files", 17, mutations.made_up_file),
        Instances("deflated files", 5, mutations.deflated_file),
        Multipart(),
        MediaTypes(),
        Grammars(),
        Events(),
        Records(),
    ]
