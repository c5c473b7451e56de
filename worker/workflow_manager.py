"""The contract of the MONAI Deploy Workflow Manager: a WorkflowRequestEvent and its message.

An event that differs is dropped or dead-lettered over there without a word to us, so everything
about it stands here, and a payload's message is the same, byte for byte, on every attempt.
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

# The Workflow Manager knows what an Informatics Gateway sends by this application id.
APP_ID = "16988a78-87b5-4168-a5c3-2cfc2bab8e54"

# Members of its enums DataService and ArtifactType, which travel as integers.
_DICOM_WEB = 2
_ARTIFACT_TYPE_UNSET = 0


@dataclass(frozen=True)
class WorkflowManager:
    """Where its requests go, and the bucket that it shares with us."""

    exchange: str
    routing_key: str
    bucket: str

    def request(self, record: IngestRecord, route: Route) -> dict[str, Any]:
        """The body of the WorkflowRequestEvent, but for its last field, `payload`."""
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
        """`number` is 0 for the first request, and n for its nth replay; the body is the same."""
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
    """Which request of the payload the message was; 0 too where its id is not one of ours."""
    found = re.fullmatch(rf"{re.escape(payload_id)}\.([1-9][0-9]{{0,5}})", message_id)
    return int(found[1]) if found else 0
