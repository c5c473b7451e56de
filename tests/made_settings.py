"""Settings of the API for tests that run no process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from api.settings import ApiSettings
from shared.settings.loader import load


def api_settings(data: Path, **changes: Any) -> ApiSettings:
    """The defaults, on the folder `data`, whose spool is made."""
    settings = replace(load(ApiSettings), data=data, **changes)
    settings.spool.mkdir(parents=True, exist_ok=True)
    return settings
