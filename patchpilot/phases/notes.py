"""How facts are written into the journal, and read out of it again."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta
from typing import Any


def noted(fact: Any) -> Any:
    """``fact`` as JSON can express it: dataclasses as objects, moments in ISO 8601, lengths of time in seconds."""
    if is_dataclass(fact):
        return {field.name: noted(getattr(fact, field.name)) for field in fields(fact)}
    if isinstance(fact, datetime):
        return fact.isoformat()
    if isinstance(fact, timedelta):
        return fact.total_seconds()
    if isinstance(fact, dict):
        return {str(key): noted(value) for key, value in fact.items()}
    if isinstance(fact, (tuple, list)):
        return [noted(value) for value in fact]
    return fact


def moment(note: str) -> datetime:
    """The moment that :func:`noted` wrote down."""
    return datetime.fromisoformat(note)


def clock_time(at: datetime) -> str:
    """A moment as people read it: always UTC, and says so."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def length(time: timedelta) -> str:
    """A length of time as people read it: ``4m05s``, ``2h03m``."""
    seconds = max(round(time.total_seconds()), 0)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
