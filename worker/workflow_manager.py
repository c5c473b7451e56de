"""The contract of the MONAI Deploy Workflow Manager: a WorkflowRequestEvent and its message.

The Workflow Manager drops or dead-letters an event that differs. So everything about the event is
in this module, and the message of a payload is the same, byte for byte, on every attempt.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from shared.instances import StoredInstance, workflow_request_json
from shared.ports import Message
from shared.records import IngestRecord
from shared.time import iso_utc
from worker.routing import Route

# By this application id the Workflow Manager recognises requests of an Informatics Gateway.
APP_ID = "16988a78-87b5-4168-a5c3-2cfc2bab8e54"

# Members of its enums DataService and ArtifactType, which are sent as integers.
_DICOM_WEB = 2
_ARTIFACT_TYPE_UNSET = 0


@dataclass(frozen=True)
class WorkflowManager:
    """The exchange and routing key of its requests, and the bucket that it shares with Stowgate."""

    exchange: str
    routing_key: str
    bucket: str

    def request(self, record: IngestRecord, route: Route) -> dict[str, Any]:
        """Return the body of the WorkflowRequestEvent without its last field, `payload`."""
        return {
            "payload_id": record.payload_id,
            "workflows": list(route.workflows),
            "file_count": record.file_count,
            "correlation_id": record.correlation_id,
            "bucket": self.bucket,
            "trigger": {
                "dataService": _DICOM_WEB,
                "source": record.source,
                "destination": record.destination,
                "artifactType": _ARTIFACT_TYPE_UNSET,
            },
            "data_origins": [],
            "timestamp": iso_utc(record.received_at),
            "workflow_instance_id": None,
            "task_id": None,
        }

    def message(
        self,
        record: IngestRecord,
        request: dict[str, Any],
        instances: Iterable[StoredInstance],
        number: int = 0,
    ) -> Message:
        """Return the message. `number` is 0 for the first request, and n for its nth replay."""
        body = BytesIO()
        body.writelines(workflow_request_json(request, instances))
        return Message(
            exchange=self.exchange,
            routing_key=self.routing_key,
            body=body.getvalue(),
            message_id=f"{record.payload_id}.{number}" if number else record.payload_id,
            correlation_id=record.correlation_id,
            type="WorkflowRequestEvent",
            app_id=APP_ID,
            timestamp=int(record.received_at.timestamp()),
        )


def number_of(message_id: str, payload_id: str) -> int:
    """Return the number of the message's request; 0 also for an id of another format."""
    found = re.fullmatch(rf"{re.escape(payload_id)}\.([1-9][0-9]{{0,5}})", message_id)
    return int(found[1]) if found else 0
