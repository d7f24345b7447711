"""Addresses with secrets in them: whether a DSN is read as it was meant (libpq's own complaints quote what it could not
read, passwords included), and any of them without its secret."""

from __future__ import annotations

import re

MALFORMED = "is malformed: write postgresql://user:password@host/database, with special characters percent-encoded"

# user:password@ in any URL, and password=... in a libpq string or a query.
_URL_CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<who>[^/\s]*)@", re.IGNORECASE)
_KEYWORD_PASSWORD = re.compile(
    r"(?P<key>\b(?:password|auth_token|secret)\s*[=:]\s*)(?P<value>'[^']*'|[^\s&,;]+)", re.IGNORECASE
)


def is_readable(dsn: str) -> bool:
    """Whether libpq takes ``dsn`` apart as whoever wrote it meant: without parts of a password in other places."""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        parts = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value is not None}
    except ProgrammingError:
        return False
    astray = "@" in parts.get("host", "") + parts.get("dbname", "")
    return not astray and all(port.isdigit() for port in parts.get("port", "0").split(",") if port)


def mask(text: str) -> str:
    """``text`` with the credentials of every URL and libpq string in it replaced by ``***``."""
    text = _URL_CREDENTIALS.sub(r"\g<scheme>***@", text)
    return _KEYWORD_PASSWORD.sub(r"\g<key>***", text)
