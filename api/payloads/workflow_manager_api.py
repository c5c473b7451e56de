"""A client of the Workflow Manager's API for the progress of a payload, on demand, without polling.

Its answers may contain patient data (`input_metadata`, results) and free text. So only the fields
listed here are returned, and only values of the expected form.
"""

import base64
import re
import time
from collections.abc import Mapping
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from uuid import uuid4

import orjson
import urllib3

from api.settings import ApiSettings
from shared.errors import Transient

_DEADLINE_SECONDS = 2.0
_MAX_BYTES = 8 << 20
_PIECE_BYTES = 1 << 16
_MAX_INSTANCES = 100
_MAX_TASKS = 1000

# Each call blocks a thread, which other requests need.
_MAX_CALLS = 2
_TURN_SECONDS = 0.25

_WORD = re.compile(r"[A-Za-z0-9_.~-]{1,128}")
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,200}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{5,18}(?:Z|[+-][0-9:]{4,6})?")

_INSTANCE_FIELDS: Mapping[str, re.Pattern[str]] = {
    "id": _WORD,
    "workflow_id": _WORD,
    "workflow_name": _NAME,
    "status": _WORD,
    "start_time": _TIME,
}
_TASK_FIELDS: Mapping[str, re.Pattern[str]] = {
    "task_id": _WORD,
    "task_type": _WORD,
    "status": _WORD,
    "reason": _WORD,
}


class WorkflowManagerSilent(Transient):
    """The API of the Workflow Manager gave no usable answer."""


class WorkflowManagerApi:
    def __init__(self, url: str, headers: Mapping[str, str], ca: Path | None) -> None:
        """`headers` hold the credentials; `ca` is a PEM file of trusted authorities."""
        self._url = f"{url}/workflowinstances"
        self._headers = {"Accept": "application/json", **headers}
        self._pool = urllib3.PoolManager(
            retries=False,
            maxsize=_MAX_CALLS,
            ca_certs=None if ca is None else str(ca),
        )
        self._turns = BoundedSemaphore(_MAX_CALLS)

    @classmethod
    def from_settings(cls, settings: ApiSettings) -> "WorkflowManagerApi | None":
        """Return a client, or None if no URL is set."""
        if settings.workflow_manager_url is None:
            return None
        return cls(
            settings.workflow_manager_url,
            _credentials(
                settings.workflow_manager_user,
                settings.workflow_manager_password,
                settings.workflow_manager_token,
            ),
            settings.workflow_manager_ca,
        )

    def workflow_instances(self, payload_id: str) -> list[dict[str, Any]]:
        """Return the workflow instances of a payload with their tasks, within about 2 s.

        Raises `WorkflowManagerSilent`.
        """
        if not self._turns.acquire(timeout=_TURN_SECONDS):
            raise WorkflowManagerSilent(
                "too many concurrent queries to the Workflow Manager; try again"
            )
        try:
            return _instances(self._ask(payload_id), payload_id)
        finally:
            self._turns.release()

    def ping(self) -> None:
        """Check that the API answers. Raises `WorkflowManagerSilent`."""
        self.workflow_instances(str(uuid4()))

    def _ask(self, payload_id: str) -> list[Any]:
        deadline = time.monotonic() + _DEADLINE_SECONDS
        try:
            answer = self._pool.request(
                "GET",
                self._url,
                fields={"payloadId": payload_id, "disablePagination": "true"},
                headers=self._headers,
                timeout=urllib3.Timeout(total=_DEADLINE_SECONDS),
                preload_content=False,
                redirect=False,
            )
            try:
                body = self._body(answer, deadline)
            finally:
                # Do not wait for the rest of the body.
                answer.close()
        except urllib3.exceptions.HTTPError as error:
            raise self._silent(f"cannot be reached ({type(error).__name__})") from error
        if answer.status != 200:
            raise self._silent(f"answered {answer.status}")
        try:
            found = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise self._silent("gave an answer that is not JSON") from error
        if not isinstance(found, list):
            raise self._silent("gave an answer that is not a list")
        return found

    def _body(self, answer: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        body = bytearray()
        for piece in answer.stream(_PIECE_BYTES):
            body += piece
            if len(body) > _MAX_BYTES:
                raise self._silent(f"answered with more than {_MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise self._silent(f"took longer than {_DEADLINE_SECONDS:g} s")
        return bytes(body)

    def _silent(self, what: str) -> WorkflowManagerSilent:
        return WorkflowManagerSilent(
            f"the Workflow Manager at {self._url} {what}: check that it is running, and check "
            "STOWGATE_WORKFLOW_MANAGER_URL and its credentials"
        )


def _credentials(user: str | None, password: str | None, token: str | None) -> dict[str, str]:
    """A token takes precedence over a user, as in the client commands."""
    if token:
        return {"Authorization": f"Bearer {token}"}
    if user:
        given = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
        return {"Authorization": f"Basic {given}"}
    return {}


def _instances(found: list[Any], payload_id: str) -> list[dict[str, Any]]:
    # A server that ignores the filter would return other payloads.
    of_payload = (
        row
        for row in found
        if isinstance(row, dict) and row.get("payload_id", payload_id) == payload_id
    )
    return [
        {**_allowed(row, _INSTANCE_FIELDS), "tasks": _tasks(row.get("tasks"))}
        for row, _ in zip(of_payload, range(_MAX_INSTANCES), strict=False)
    ]


def _tasks(found: Any) -> list[dict[str, str | None]]:
    rows = found if isinstance(found, list) else []
    return [_allowed(row, _TASK_FIELDS) for row in rows[:_MAX_TASKS] if isinstance(row, dict)]


def _allowed(
    row: Mapping[str, Any], allowed: Mapping[str, re.Pattern[str]]
) -> dict[str, str | None]:
    """Return the allowed fields; a value of another form becomes None."""
    return {
        name: value if isinstance(value := row.get(name), str) and form.fullmatch(value) else None
        for name, form in allowed.items()
    }
