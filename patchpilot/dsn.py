"""Addresses with secrets in them: whether a DSN is read as it was meant (libpq's own complaints quote what it could not
read, passwords included), and any of them without its secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MALFORMED = "is malformed: write postgresql://user:password@host/database, with special characters percent-encoded"

# user:password@ in any URL, up to the last @ of the word: a password that is not percent-encoded may hold an @ or a /.
_URL_CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)\S*@", re.IGNORECASE)

_VALUE = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&]+)"""
# password=..., ssl_password=..., PGPASSWORD=... in a libpq string, a query or a person's words. What else may be secret
# is a common word, and counts only before an equals sign. A name that is percent-encoded may be any of them.
_SECRETS = re.compile(
    r"(?P<key>[\w.-]*(?:pass(?:word|wd|phrase)|pwd|secret|auth_token)\w*\s*[=:]\s*"
    r"|[\w.-]*(?:token|credentials?|signature|(?:api|access|client|server|account|private)_?key)\s*=\s*"
    r"|[?&][^=&\s]*%[^=&\s]*=)" + _VALUE,
    re.IGNORECASE,
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


def refusal(dsn: str) -> str:
    """Why libpq would not even try ``dsn``, which is readable; empty if it would. Nobody is connected to.

    libpq looks at most values only when it connects: let it begin, to a place that does not exist.
    """
    from psycopg import pq
    from psycopg.conninfo import make_conninfo

    # With a password, so that no file of passwords is looked at, and complained of.
    nowhere = make_conninfo(dsn, host="/nonexistent", hostaddr="", port="1", password="-")  # noqa: S106
    connection = pq.PGconn.connect_start(nowhere.encode())
    said = connection.error_message.decode(errors="replace").strip()
    connection.finish()
    tried = not said or said.startswith(("connection to server", "could not connect to server"))
    return "" if tried else " ".join(re.sub(r'"[^"]*"', "...", said).split())


def mask(text: str) -> str:
    """``text`` with the credentials of every URL and libpq string in it replaced by ``***``."""
    text = _URL_CREDENTIALS.sub(r"\g<scheme>***@", text)
    return _SECRETS.sub(r"\g<key>***", text)


def masked(data: Any) -> Any:
    """``data`` with every text in it masked, keys included."""
    if isinstance(data, str):
        return mask(data)
    if isinstance(data, Mapping):
        return {mask(str(key)): masked(each) for key, each in data.items()}
    if isinstance(data, (list, tuple)):
        return [masked(each) for each in data]
    return data
