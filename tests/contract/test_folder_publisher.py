"""Messages as files in a folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from brokers import message_for, publish, random_queue

from shared.adapters.folder.publisher import FolderEventPublisher
from shared.errors import BrokerUnavailable
from shared.ports import Message


def test_a_message_file_shows_properties_and_body(tmp_path: Path) -> None:
    folder = tmp_path / "workflow-requests"
    publisher = FolderEventPublisher(folder)
    message = replace(
        message_for(random_queue(), '{"payload_id": "ü", "workflows": []}'.encode()),
        headers={"traceparent": "00-1"},
    )
    publisher.ping()
    publish(publisher, message)
    publish(publisher, message)
    (file,) = folder.iterdir()
    assert file.name == f"{message.message_id}.json"
    text = file.read_text(encoding="utf-8")
    assert '\n  "body": {\n    "payload_id": "ü",' in text
    assert json.loads(text) == {
        "properties": {
            "content_type": "application/json",
            "delivery_mode": 2,
            "message_id": message.message_id,
            "app_id": message.app_id,
            "correlation_id": message.correlation_id,
            "type": message.type,
            "timestamp": message.timestamp,
            "exchange": message.exchange,
            "routing_key": message.routing_key,
            "headers": {"traceparent": "00-1"},
        },
        "body": {"payload_id": "ü", "workflows": []},
    }


def test_an_unwritable_folder_is_an_unavailable_broker(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    publisher = FolderEventPublisher(in_the_way / "workflow-requests")
    with pytest.raises(BrokerUnavailable, match=r"cannot write to .*workflow-requests"):
        publish(publisher, message_for(random_queue()))
    with pytest.raises(BrokerUnavailable, match=r"cannot write to .*workflow-requests"):
        publisher.ping()


def test_a_message_file_that_cannot_be_renamed_leaves_nothing_behind(tmp_path: Path) -> None:
    message = message_for(random_queue())
    (tmp_path / f"{message.message_id}.json").mkdir()
    with pytest.raises(BrokerUnavailable):
        publish(FolderEventPublisher(tmp_path), message)
    assert [path.name for path in tmp_path.iterdir()] == [f"{message.message_id}.json"]


@pytest.mark.parametrize("message_id", ["../escape", "", ".hidden", "a/b"])
def test_a_message_id_that_is_not_a_file_name_is_rejected(tmp_path: Path, message_id: str) -> None:
    folder = tmp_path / "folder"
    properties = vars(message_for(random_queue())) | {"message_id": message_id}
    with pytest.raises(ValueError, match="file name"):
        publish(FolderEventPublisher(folder), Message(**properties))
    assert list(tmp_path.iterdir()) == []
