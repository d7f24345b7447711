"""Characters that nobody can see. In settings, PostgreSQL and the file system refuse them, but only when a run comes to
write; in what is shown, they move the cursor, end a line or turn its direction round."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

_UNSEEN: Mapping[str, str] = {"celery.sep": "\x06\x16", "postgres.dsn": "\t\n\r"}
"""Control characters that belong where they are: Celery's own separator, and what is white space to libpq."""

_UNPRINTED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def legible(text: str, keep: str = "") -> str:
    """``text`` with an escape (``\\x1b``, ``\\u202e``) in place of each character that is not printed, but acted upon.

    :param keep: those that stay, nevertheless.
    """
    return text if text.isprintable() else "".join(each if each in keep else _escaped(each) for each in text)


def encodable(text: str, stream: object) -> str:
    """``text`` with an escape for each character that the encoding of ``stream`` does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(each: str) -> str:
    return each.encode("unicode_escape").decode() if unicodedata.category(each) in _UNPRINTED else each


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
