"""Points in time as Stowgate writes them: ISO 8601, UTC, `Z`."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from marshmallow import ValidationError, fields

Clock = Callable[[], datetime]

MAX_AHEAD = timedelta(hours=2)
"""Twice the maximum lease. A stored time further in the future comes from a wrong clock."""


def utc_now() -> datetime:
    return datetime.now(UTC)


def has_ended(until: datetime, now: datetime) -> bool:
    """Whether `until` has passed, or is further ahead than `MAX_AHEAD` and therefore invalid."""
    return not now < until <= now + MAX_AHEAD


def iso_utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class UtcDateTime(fields.Field[datetime]):
    """An aware `datetime` here, `iso_utc` on the wire."""

    def _serialize(self, value: datetime | None, *_: Any, **__: Any) -> str | None:
        return None if value is None else iso_utc(value)

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
        except (TypeError, ValueError) as error:
            raise ValidationError("is not an ISO 8601 date and time") from error
        if moment.tzinfo is None:
            raise ValidationError("has no time zone")
        try:
            return moment.astimezone(UTC)
        except OverflowError as error:
            raise ValidationError("is outside the years 1 to 9999 in UTC") from error
