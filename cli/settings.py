"""The settings of the operator's commands."""

from dataclasses import dataclass
from pathlib import Path

from api.settings import ApiSettings, UrlSettings
from shared.settings.loader import setting
from shared.settings.parsers import absolute_path, plain_text
from worker.settings import WorkerSettings


@dataclass(frozen=True)
class ClientSettings(UrlSettings):
    """The settings of the commands that are clients of a running API."""

    client_user: str | None = setting(
        None, plain_text, "user name of the client commands, such as `stowgate send`"
    )
    client_password: str | None = setting(None, plain_text, "password of that user", secret=True)
    client_token: str | None = setting(
        None, plain_text, "token of the client commands, instead of user and password", secret=True
    )
    client_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the certificate authorities that the client commands trust; default: those of "
        "the system",
    )


ALL_SETTINGS = (ApiSettings, WorkerSettings, ClientSettings)
