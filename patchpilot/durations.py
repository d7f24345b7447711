"""Durations as people write and read them."""

from __future__ import annotations

import re
from datetime import timedelta

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

LONGEST = timedelta(days=3650)

HEARTBEAT = timedelta(seconds=2)
"""How often a worker gives a sign of life."""

LEAST_SILENCE = 2 * HEARTBEAT
"""A living worker may be silent for so long, if a single sign of life is late."""


def parse_duration(text: str) -> timedelta:
    """A duration such as ``300ms``, ``0s``, ``5m``, ``1h30m``, ``24h`` or ``7d``.

    :raises ValueError: for anything else, a bare number included: its unit would be a guess.
    """
    compact = text.strip()
    if not compact or _DURATION.sub("", compact):
        raise ValueError(f"{text!r} is not a duration; write it like 300ms, 45s, 5m, 1h30m or 24h")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(compact))
    if seconds > LONGEST.total_seconds():
        raise ValueError(f"{text!r} is longer than ten years")
    return timedelta(seconds=seconds)


def as_duration(value: object) -> timedelta:
    """A duration as somebody wrote it in a file, or as one is already.

    :raises ValueError: it is none, and none is written so.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        return parse_duration(value)
    raise ValueError(f"{value!r} is not a duration; write it like 300ms, 45s, 5m, 1h30m or 24h")


def ago(span: timedelta) -> str:
    """A span for a person: ``45s``, ``12m``, ``3h 5m``, ``2d 4h``."""
    seconds = int(span.total_seconds())
    if seconds < 60:
        return f"{seconds}s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 60:
        return f"{minutes}m {seconds % 60}s" if minutes < 10 else f"{minutes}m"
    return f"{hours}h {minutes % 60}m" if hours < 24 else f"{days}d {hours % 24}h"


def long_enough_to_be_dead(silence: timedelta) -> timedelta:
    """``silence``, if a worker that gave no sign of life for so long may be taken for dead.

    :raises ValueError: a living one may be silent for so long, if a single sign of life is late.
    """
    if silence < LEAST_SILENCE:
        raise ValueError(
            f"it must be {ago(LEAST_SILENCE)} or more: a living worker gives a sign of life every {ago(HEARTBEAT)}"
        )
    return silence
