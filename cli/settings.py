"""The settings of the operator's commands."""

from dataclasses import dataclass
from pathlib import Path

from api.settings import ApiSettings, UrlSettings
from shared.settings.loader import setting
from shared.settings.parsers import absolute_path, plain_text
from worker.settings import WorkerSettings


@dataclass(frozen=True)
class ClientSettings(UrlSettings):
    """What the commands read that are clients of a running API."""

    client_user: str | None = setting(
        None, plain_text, "user name that `stowgate send` and the like give the API"
    )
    client_password: str | None = setting(None, plain_text, "password of that user", secret=True)
    client_token: str | None = setting(
        None, plain_text, "token that they give it instead", secret=True
    )
    client_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the authorities that the API's certificate may come from; by default those "
        "that the system trusts",
    )


ALL_SETTINGS = (ApiSettings, WorkerSettings, ClientSettings)
