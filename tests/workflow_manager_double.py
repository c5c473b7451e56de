"""A strict double of the MONAI Deploy Workflow Manager's front: it takes workflow requests as the
real one does, and says of each what the real one would have held against it, and more.

`violations` and `violations_in_store` are for tests. As a program it declares the real one's
exchange and queues, consumes, and prints a line for each request:

    accepted {payload_id} workflows=[...] files=N source=... destination=...
    duplicate {payload_id} workflows=[...]
    REJECTED {payload_id}: violation; violation
    REQUEUED {payload_id}: no workflow matches; or the predicate of a workflow is false

What is requeued comes back after some seconds, and is dead-lettered when it has come back three
times. It is configured by WORKFLOW_MANAGER_BROKER (an AMQP URL), WORKFLOW_MANAGER_EXCHANGE,
WORKFLOW_MANAGER_ROUTING_KEY, WORKFLOW_MANAGER_REQUEUE_SECONDS and WORKFLOW_MANAGER_WORKFLOWS: a
file with a JSON list of workflows, `{"id": ..., "ae_title": ..., "data_origins": [...],
"predicate": true}`, which is read again for each request. Without that file any workflow is known,
and one that matches is always there. With WORKFLOW_MANAGER_OBJECT_STORE (`http(s)://host:port`)
and its ..._ACCESS_KEY and ..._SECRET_KEY it also looks at the objects that a request names.
"""

import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import pika
import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

APP_ID = "16988a78-87b5-4168-a5c3-2cfc2bab8e54"

GetObject = Callable[[str], bytes | None]

_PROPERTIES = (
    "message_id",
    "app_id",
    "content_type",
    "correlation_id",
    "type",
    "timestamp",
    "delivery_mode",
)
_FIELDS = (
    "payload_id",
    "workflows",
    "file_count",
    "correlation_id",
    "bucket",
    "trigger",
    "data_origins",
    "timestamp",
    "workflow_instance_id",
    "task_id",
    "payload",
)
_TRIGGER_FIELDS = ("dataService", "source", "destination", "artifactType")
_PAYLOAD_FIELDS = ("path", "metadata")

_DICOM_WEB = 2
_ARTIFACT_TYPE_UNSET = 0
_MAX_ENDPOINT_CHARACTERS = 15

# From 2020 to 2100: milliseconds, and a clock that was never set, lie outside.
_PLAUSIBLE_SECONDS = range(1_577_836_800, 4_102_444_800)

_PAYLOAD_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_EMPTY_GUID = "00000000-0000-0000-0000-000000000000"
_HYPHENED = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_GUID = re.compile(rf"{_HYPHENED}|\{{{_HYPHENED}\}}|\({_HYPHENED}\)|[0-9a-fA-F]{{32}}")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,7})?Z", re.ASCII)
_PATH = re.compile(r"dcm/([0-9.]+)/([0-9.]+)/([0-9.]+)\.dcm")
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_MAX_UID_CHARACTERS = 64

_TAG = re.compile(r"[0-9A-F]{8}")
_VR = re.compile(r"[A-Z]{2}")
_LEFT_OUT_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_NUMBER_VRS = frozenset(
    {"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"},
)
# PS3.5 Table 6.2-1: a DS or an IS that is a number; the longest is a DS of 16 characters.
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([Ee][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MAX_DECIMAL_CHARACTERS = 16
_NAME_GROUPS = frozenset({"Alphabetic", "Ideographic", "Phonetic"})

# What the Workflow Manager reads of a sidecar, and as which VR it expects it.
_READ_TAGS = {
    "00100010": "PN",
    "00100020": "LO",
    "00100021": "LO",
    "00100030": "DA",
    "00100040": "CS",
    "00101010": "AS",
    "0020000E": "UI",
    "00080050": "SH",
}

_DELIVERY_LIMIT = 3
DEAD_LETTER_EXCHANGE = "monaideploy-dead-letter"
_REQUEUE_SECONDS = 3.0
# Those that wait to be requeued must not keep others out.
_PREFETCH_COUNT = 100
_AGAIN_SECONDS = 1.0
_SILENCE_SECONDS = 5.0


class _Malformed(ValueError):
    """JSON that parsers read in different ways."""


def violations(properties: Mapping[str, Any], body: bytes) -> list[str]:
    """What is wrong with a message on the Workflow Manager's queue; empty when nothing is.

    `properties` are the AMQP basic properties by their names in pika, absent or None where the
    message has none. Further properties, such as headers, are nobody's business.
    """
    try:
        request = _parse(body)
    except ValueError as error:
        return [*_property_violations(properties, {}), f"the body is not JSON: {error}"]
    if not isinstance(request, dict):
        return [*_property_violations(properties, {}), "the body is not a JSON object"]
    return [*_property_violations(properties, request), *_request_violations(request)]


def _parse(body: bytes) -> Any:
    return json.loads(
        body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_such_number
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Malformed("an object has the same name twice")
    return found


def _no_such_number(name: str) -> Any:
    raise _Malformed(f"{name} is not JSON")


def _property_violations(
    properties: Mapping[str, Any], request: Mapping[str, Any]
) -> Iterator[str]:
    given = {name: properties.get(name) for name in _PROPERTIES}
    for name, value in given.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            yield f"property {name} is missing"
    wanted = {
        "app_id": APP_ID,
        "content_type": "application/json",
        "type": "WorkflowRequestEvent",
        "delivery_mode": 2,
        "correlation_id": request.get("correlation_id", given["correlation_id"]),
    }
    for name, value in wanted.items():
        if given[name] is not None and given[name] != value:
            yield f"property {name} is {given[name]!r}, not {value!r}"
    timestamp = given["timestamp"]
    if timestamp is not None and not (_is_integer(timestamp) and timestamp in _PLAUSIBLE_SECONDS):
        yield f"property timestamp is {timestamp!r}: not seconds of this century"


def _request_violations(request: Mapping[str, Any]) -> Iterator[str]:
    yield from _field_violations("the body", request, _FIELDS)
    for name, check in _CHECKS.items():
        if name in request:
            yield from check(request[name])
    count, payload = request.get("file_count"), request.get("payload")
    if isinstance(payload, list) and _is_integer(count) and count != len(payload):
        yield f"file_count is {count}, but payload has {len(payload)} entries"


def _field_violations(where: str, value: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name not in value:
            yield f"{where} has no {name}"
    for name in value:
        if name not in names:
            yield f"{where} has an unknown field {name}"
    known = [name for name in value if name in names]
    if known != [name for name in names if name in value]:
        yield f"the fields of {where} are out of order"


def _check_payload_id(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and _PAYLOAD_ID.fullmatch(value)):
        yield f"payload_id is {value!r}, no GUID in lower case with hyphens"
    elif value == _EMPTY_GUID:
        yield "payload_id is the empty GUID"


def _check_workflows(value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"workflows is {value!r}, no list"
    elif not all(isinstance(workflow, str) and workflow.strip() for workflow in value):
        yield f"workflows has an entry that is not an id: {value!r}"


def _check_file_count(value: Any) -> Iterator[str]:
    if not (_is_integer(value) and value >= 1):
        yield f"file_count is {value!r}, no count of instances"


def _check_correlation_id(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and _GUID.fullmatch(value)):
        yield f"correlation_id is {value!r}, no GUID"


def _check_bucket(value: Any) -> Iterator[str]:
    if not (isinstance(value, str) and 3 <= len(value) <= 63):
        yield f"bucket is {value!r}, not a text of 3 to 63 characters"


def _check_trigger(value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"trigger is {value!r}, no object"
        return
    yield from _field_violations("trigger", value, _TRIGGER_FIELDS)
    for name, member in (("dataService", _DICOM_WEB), ("artifactType", _ARTIFACT_TYPE_UNSET)):
        if name in value and not (_is_integer(value[name]) and value[name] == member):
            yield f"trigger.{name} is {value[name]!r}, not the integer {member}"
    for name in ("source", "destination"):
        if name in value and not _is_end(value[name]):
            yield (
                f"trigger.{name} is {value[name]!r}, not a text of 1 to "
                f"{_MAX_ENDPOINT_CHARACTERS} characters that is not blank"
            )


def _is_end(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= _MAX_ENDPOINT_CHARACTERS


def _check_data_origins(value: Any) -> Iterator[str]:
    if value != []:
        yield f"data_origins is {value!r}, not the empty list"


def _check_timestamp(value: Any) -> Iterator[str]:
    try:
        seconds = _timestamp_seconds(value)
    except (TypeError, ValueError):
        yield f"timestamp is {value!r}, no point in time as ISO 8601 in UTC with Z"
        return
    if seconds not in _PLAUSIBLE_SECONDS:
        yield f"timestamp is {value!r}: not in this century"


def _timestamp_seconds(value: Any) -> int:
    if not _TIMESTAMP.fullmatch(value):
        raise ValueError
    return int(datetime.fromisoformat(value).timestamp())


def _check_null(name: str) -> Callable[[Any], Iterator[str]]:
    def check(value: Any) -> Iterator[str]:
        if value is not None:
            yield f"{name} is {value!r}, not null"

    return check


def _check_payload(value: Any) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        yield f"payload is {value!r}, not a list of one entry or more"
        return
    seen = set()
    for index, entry in enumerate(value):
        where = f"payload[{index}]"
        if not isinstance(entry, dict):
            yield f"{where} is {entry!r}, no object"
            continue
        yield from _field_violations(where, entry, _PAYLOAD_FIELDS)
        path, metadata = entry.get("path"), entry.get("metadata")
        if "path" in entry and uids_of_path(path) is None:
            yield (
                f"{where}.path is {path!r}, not dcm/(study UID)/(series UID)/(SOP Instance UID).dcm"
            )
        if "metadata" in entry and metadata != f"{path}.json":
            yield f"{where}.metadata is {metadata!r}, not its path with .json behind it"
        if repr(path) in seen:
            yield f"{where}.path is there twice"
        seen.add(repr(path))


_CHECKS: dict[str, Callable[[Any], Iterator[str]]] = {
    "payload_id": _check_payload_id,
    "workflows": _check_workflows,
    "file_count": _check_file_count,
    "correlation_id": _check_correlation_id,
    "bucket": _check_bucket,
    "trigger": _check_trigger,
    "data_origins": _check_data_origins,
    "timestamp": _check_timestamp,
    "workflow_instance_id": _check_null("workflow_instance_id"),
    "task_id": _check_null("task_id"),
    "payload": _check_payload,
}


def uids_of_path(path: Any) -> tuple[str, str, str] | None:
    """Study, series and SOP Instance UID of an instance's path, or None for any other value."""
    found = _PATH.fullmatch(path) if isinstance(path, str) else None
    if not found or not all(
        _UID.fullmatch(uid) and len(uid) <= _MAX_UID_CHARACTERS for uid in found.groups()
    ):
        return None
    study, series, sop_instance = found.groups()
    return study, series, sop_instance


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def violations_in_store(get_object: GetObject, body: bytes) -> list[str]:
    """What is wrong with the objects that a request names; `body` is one without `violations`.

    `get_object` returns what is under a key of the request's bucket, None where nothing is; of an
    instance the first 132 bytes will do.
    """
    request = _parse(body)
    found: list[str] = []
    for entry in request["payload"]:
        instance = get_object(f"{request['payload_id']}/{entry['path']}")
        if instance is None:
            found.append(f"there is no object {entry['path']}")
        elif instance[128:132] != b"DICM":
            found.append(f"{entry['path']} is not a DICOM file (PS3.10 7.1)")
        sidecar = get_object(f"{request['payload_id']}/{entry['metadata']}")
        if sidecar is None:
            found.append(f"there is no object {entry['metadata']}")
        else:
            uids = uids_of_path(entry["path"])
            found += (f"{entry['metadata']}: {v}" for v in _sidecar_violations(sidecar, uids))
    return found


def _sidecar_violations(sidecar: bytes, uids: tuple[str, str, str] | None) -> Iterator[str]:
    try:
        dataset = _parse(sidecar)
    except ValueError:
        yield "no JSON"
        return
    if not isinstance(dataset, dict):
        yield "no JSON object"
        return
    if b"\n" in sidecar:
        yield "indented"
    for tag, element in dataset.items():
        if tag[:4] == "0002" or tag[4:] == "0000":
            yield f"{tag} is of the file's meta information, or a group length"
        if isinstance(element, dict) and element.get("vr") in _LEFT_OUT_VRS:
            yield f"{tag} is {element['vr']} and not left out"
    yield from _dataset_violations(dataset)
    for tag, vr in _READ_TAGS.items():
        element = dataset.get(tag)
        if isinstance(element, dict) and element.get("vr") != vr:
            yield f"{tag} is not a valid {vr}"
    for tag, uid in zip(("0020000D", "0020000E", "00080018"), uids or (), strict=False):
        if dataset.get(tag) != {"vr": "UI", "Value": [uid]}:
            yield f"{tag} is not the UID in the path"


def _dataset_violations(dataset: Mapping[str, Any]) -> Iterator[str]:
    """Against the DICOM JSON model (PS3.18 F.2); no value is repeated."""
    for tag, element in dataset.items():
        if not _TAG.fullmatch(tag):
            yield f"{tag!r} is not a tag of eight upper-case hexadecimal digits"
        if not isinstance(element, dict) or not _VR.fullmatch(str(element.get("vr"))):
            yield f"{tag} is not an element with a VR"
            continue
        if len(element) > 2 or not set(element) <= {"vr", "Value", "InlineBinary", "BulkDataURI"}:
            yield f"{tag} has other fields than vr and one for its value"
        if "Value" not in element:
            continue
        values = element["Value"]
        if not isinstance(values, list) or not values:
            yield f"{tag} has a Value that is not a list, or an empty one"
            continue
        if element["vr"] == "SQ":
            for item in values:
                if isinstance(item, dict):
                    yield from _dataset_violations(item)
                else:
                    yield f"{tag} has an item that is not an object"
        elif not all(_is_value_of(element["vr"], value) for value in values):
            yield f"{tag} has a value that is not a valid {element['vr']}"


def _is_value_of(vr: str, value: Any) -> bool:
    if value is None:
        return True
    if vr == "PN":
        return (
            isinstance(value, dict)
            and set(value) <= _NAME_GROUPS
            and all(isinstance(group, str) for group in value.values())
        )
    if vr not in _NUMBER_VRS:
        return isinstance(value, str)
    if isinstance(value, str):
        return not _parses(vr, value.strip(" "))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parses(vr: str, text: str) -> bool:
    if len(text) > _MAX_DECIMAL_CHARACTERS:
        return False
    if vr == "DS":
        return bool(_DECIMAL.fullmatch(text)) and math.isfinite(float(text))
    return bool(_INTEGER.fullmatch(text))


class Verdict(Enum):
    """What is done with a message."""

    ACKNOWLEDGE = "acknowledge"
    REJECT = "reject"
    REQUEUE = "requeue"


@dataclass(frozen=True)
class Workflow:
    """What the Workflow Manager goes by when it chooses. `predicate` is whether its condition is
    true; without `data_origins` it takes any source."""

    id: str
    ae_title: str
    data_origins: tuple[str, ...] = ()
    predicate: bool = True

    def matches(self, source: str, destination: str) -> bool:
        return self.ae_title == destination and (
            not self.data_origins or source in self.data_origins
        )


class Intake:
    """What the Workflow Manager does with each message: refuse it, or remember its workflows."""

    def __init__(
        self,
        store_of: Callable[[str], GetObject] | None = None,
        workflows: Callable[[], Sequence[Workflow] | None] = lambda: None,
    ) -> None:
        """`store_of` gives access to the bucket of a name. `workflows` are those that there are
        now; None where every workflow is."""
        self._store_of = store_of
        self._workflows = workflows
        # Looked up before it is added to, as the real one does, which has no unique index.
        self._opened: set[tuple[str, str]] = set()

    def take(self, properties: Mapping[str, Any], body: bytes) -> tuple[Verdict, str]:
        """What is to be done with the message, and the line to print."""
        found = violations(properties, body)
        if not found and self._store_of is not None:
            found = violations_in_store(self._store_of(_parse(body)["bucket"]), body)
        if found:
            return Verdict.REJECT, f"REJECTED {_payload_id(body)}: {'; '.join(found)}"
        request = _parse(body)
        payload_id, workflows = request["payload_id"], request["workflows"]
        known = self._workflows()
        why = None if known is None else _why_none_starts(request, known)
        if why is not None:
            return Verdict.REQUEUE, f"REQUEUED {payload_id}: {why}"
        asked = {(payload_id, workflow) for workflow in workflows or [""]}
        if asked <= self._opened:
            return Verdict.ACKNOWLEDGE, f"duplicate {payload_id} workflows={workflows}"
        self._opened |= asked
        trigger = request["trigger"]
        return Verdict.ACKNOWLEDGE, (
            f"accepted {payload_id} workflows={workflows} files={request['file_count']} "
            f"source={trigger['source']} destination={trigger['destination']}"
        )


def _why_none_starts(request: Mapping[str, Any], known: Sequence[Workflow]) -> str | None:
    """None where all that match are started. An id that is not known is passed over in silence,
    and one false predicate keeps all from starting."""
    asked, trigger = request["workflows"], request["trigger"]
    matching = [
        workflow
        for workflow in known
        if (
            workflow.id in asked
            if asked
            else workflow.matches(trigger["source"], trigger["destination"])
        )
    ]
    if not matching:
        return "no workflow matches"
    false = [workflow.id for workflow in matching if not workflow.predicate]
    return f"the predicate of {', '.join(false)} is false" if false else None


def workflows_in(text: str) -> list[Workflow]:
    return [
        Workflow(**{**row, "data_origins": tuple(row.get("data_origins", ()))})
        for row in json.loads(text)
    ]


def _payload_id(body: bytes) -> str:
    found = re.search(rb'"payload_id":\s*"([0-9a-fA-F-]{1,36})"', body)
    return found[1].decode() if found else "(no payload id)"


def declare(
    channel: BlockingChannel,
    exchange: str,
    routing_key: str,
    queue: str | None = None,
    dead_letter_exchange: str = DEAD_LETTER_EXCHANGE,
) -> None:
    """The real one's exchanges and queues; without `queue` it is named as its routing key."""
    queue = queue or routing_key
    channel.exchange_declare(exchange, "topic", durable=True)
    channel.exchange_declare(dead_letter_exchange, "topic", durable=True)
    channel.queue_declare(
        queue,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": _DELIVERY_LIMIT,
            "x-dead-letter-exchange": dead_letter_exchange,
        },
    )
    channel.queue_declare(f"{queue}-dead-letter", durable=True)
    channel.queue_bind(queue, exchange, routing_key)
    channel.queue_bind(f"{queue}-dead-letter", dead_letter_exchange, routing_key)


def consume(
    connection: pika.BlockingConnection,
    queue: str,
    take: Callable[[Mapping[str, Any], bytes], tuple[Verdict, str]],
    say: Callable[[str], None],
    requeue_seconds: float = _REQUEUE_SECONDS,
    is_stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Do with what comes what `take` says, as `Intake.take` does, until told to stop."""
    channel = connection.channel()
    channel.basic_qos(prefetch_count=_PREFETCH_COUNT)
    for method, properties, body in channel.consume(queue, inactivity_timeout=0.2):
        if is_stopping():
            return
        if method is None:
            continue
        verdict, line = take(vars(properties), body)
        say(line)
        if verdict is Verdict.ACKNOWLEDGE:
            channel.basic_ack(method.delivery_tag)
        elif verdict is Verdict.REJECT:
            channel.basic_reject(method.delivery_tag, requeue=False)
        else:
            again = partial(channel.basic_reject, method.delivery_tag, requeue=True)
            connection.call_later(requeue_seconds, again)


def _consume(environ: Mapping[str, str], intake: Intake) -> None:
    exchange = environ.get("WORKFLOW_MANAGER_EXCHANGE", "monaideploy")
    routing_key = environ.get("WORKFLOW_MANAGER_ROUTING_KEY", "md.workflow.request")
    seconds = float(environ.get("WORKFLOW_MANAGER_REQUEUE_SECONDS", _REQUEUE_SECONDS))
    parameters = pika.URLParameters(environ["WORKFLOW_MANAGER_BROKER"])
    with pika.BlockingConnection(parameters) as connection:
        declare(connection.channel(), exchange, routing_key)
        print(f"waiting for {routing_key}", flush=True)
        consume(connection, routing_key, intake.take, partial(print, flush=True), seconds)


def _workflows(environ: Mapping[str, str]) -> Callable[[], Sequence[Workflow] | None]:
    file = environ.get("WORKFLOW_MANAGER_WORKFLOWS")
    return lambda: workflows_in(Path(file).read_text()) if file else None


def _object_store(environ: Mapping[str, str]) -> Callable[[str], GetObject] | None:
    prefix = "WORKFLOW_MANAGER_OBJECT_STORE"
    if not environ.get(prefix):
        return None
    url = urlsplit(environ[prefix])
    client = Minio(
        endpoint=url.netloc,
        access_key=environ[f"{prefix}_ACCESS_KEY"],
        secret_key=environ[f"{prefix}_SECRET_KEY"],
        secure=url.scheme == "https",
        region="us-east-1",
        http_client=urllib3.PoolManager(timeout=_SILENCE_SECONDS, retries=False),
    )

    def of(bucket: str) -> GetObject:
        def get(key: str) -> bytes | None:
            try:
                answer = client.get_object(
                    bucket_name=bucket, object_name=key, length=132 if key.endswith(".dcm") else 0
                )
            except S3Error as error:
                if error.code in ("NoSuchKey", "NoSuchBucket"):
                    return None
                raise
            try:
                return answer.read()
            finally:
                answer.release_conn()

        return get

    return of


def main(environ: Mapping[str, str]) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        sys.exit()

    signal.signal(signal.SIGTERM, stop)
    # What it says at length is told below in a line.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    intake = Intake(_object_store(environ), _workflows(environ))
    while True:
        try:
            _consume(environ, intake)
        except (
            AMQPError,
            AMQPConnectorException,
            OSError,
            MinioException,
            urllib3.exceptions.HTTPError,
        ) as error:
            # What was in hand goes back to the queue with the connection.
            print(f"an engine is away, trying again: {error!r}", flush=True)
            time.sleep(_AGAIN_SECONDS)


if __name__ == "__main__":
    main(os.environ)
