"""Characters that nobody can see, in settings: PostgreSQL and the file system refuse them, but only when a run comes to
write."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

_UNSEEN: Mapping[str, str] = {"celery.sep": "\x06\x16", "postgres.dsn": "\t\n\r"}
"""Control characters that belong where they are: Celery's own separator, and what is white space to libpq."""


def illegible(value: object, key: str = "") -> str:
    """The key of the first setting with a control character, or with bytes that are no text; empty if there is none."""
    if isinstance(value, str):
        allowed = _UNSEEN.get(key, "")
        return key if any(unicodedata.category(each) in {"Cc", "Cs"} for each in value if each not in allowed) else ""
    if isinstance(value, Mapping):
        found = (
            illegible(name, _below(key, name)) or illegible(each, _below(key, name)) for name, each in value.items()
        )
        return next(filter(None, found), "")
    if isinstance(value, (list, tuple)):
        return next(filter(None, (illegible(each, key) for each in value)), "")
    return ""


def _below(key: str, name: object) -> str:
    """The full name of a key, as it can be shown."""
    return ".".join(filter(None, (key, ascii(name)[1:-1])))
