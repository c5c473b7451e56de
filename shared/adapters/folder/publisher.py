"""Messages as files, for the embedded run, where people can read the workflow requests."""

import errno
import os
import re
import tempfile
from pathlib import Path

import orjson

from shared.adapters.queues import Published
from shared.errors import BrokerUnavailable
from shared.ports import Message
from shared.runtime.disk import sync_folder

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class FolderEventPublisher:
    """Writes each message to `{folder}/{message_id}.json`, over an earlier one with the same id.

    The file holds `{"properties": {...}, "body": {...}}`, indented UTF-8 JSON, and is written
    atomically. Raises ValueError for a message id that is not a plain file name, or a body that is
    not JSON.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self) -> None:
        """Does nothing."""

    def begin(self, message: Message) -> Published:
        if not _FILE_NAME.fullmatch(message.message_id):
            raise ValueError("the message id cannot be a file name: only letters, digits and ._-")
        content = orjson.dumps(
            {
                "properties": {
                    "content_type": message.content_type,
                    "delivery_mode": message.delivery_mode,
                    "message_id": message.message_id,
                    "app_id": message.app_id,
                    "correlation_id": message.correlation_id,
                    "type": message.type,
                    "timestamp": message.timestamp,
                    "exchange": message.exchange,
                    "routing_key": message.routing_key,
                    "headers": dict(message.headers),
                },
                "body": orjson.loads(message.body),
            },
            option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
        )
        try:
            self._make_folder()
            self._write(f"{message.message_id}.json", content)
        except OSError as error:
            raise self._unavailable(error) from error
        return Published()

    def ping(self) -> None:
        try:
            self._make_folder()
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".ping-"):
                pass
        except OSError as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Does nothing: no file stays open between two messages."""

    def _make_folder(self) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.parent)

    def _write(self, name: str, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".tmp")
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / name)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(self._folder)

    def _unavailable(self, error: OSError) -> BrokerUnavailable:
        advice = {
            errno.ENOSPC: "free some space on that disk",
            errno.EDQUOT: "raise the quota or free some space",
            errno.EACCES: "give this process's user write permission",
            errno.EPERM: "give this process's user write permission",
            errno.EROFS: "mount it writable, or choose another folder",
        }.get(error.errno or 0, "check that the folder is writable")
        return BrokerUnavailable(
            f"cannot write to {self._folder}: {error.strerror or error}; {advice}"
        )
