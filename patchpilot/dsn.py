"""Addresses with secrets in them: whether a DSN is read as it was meant (libpq's own complaints quote what it could not
read, passwords included), and any of them without its secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from patchpilot.errors import Usage

MALFORMED = "is malformed: write postgresql://user:password@host/database, with special characters percent-encoded"

# user:password@ in any URL, up to the last @ of the word: a password that is not percent-encoded may hold an @ or a /.
_URL_CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)\S*@", re.IGNORECASE)

_VALUE = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&])[^\s&]*"""
# password=..., ssl_password=..., PGPASSWORD=... in a libpq string, a query, JSON or a person's words. What else may be
# secret is a common word, and counts only before an equals sign. A name that is percent-encoded may be any of them.
_SECRETS = re.compile(
    r"(?P<key>[\w.-]*(?:pass(?:word|wd|phrase)|pwd|secret|auth_token)\w*(?:\\?[\"'])?\s*[=:]\s*"
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


_NUMBERS = (
    "connect_timeout", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "tcp_user_timeout",
)  # fmt: skip
"""What libpq reads only when it has reached a server, if at all: psycopg waits in its place."""


def _is_number(text: str, *, whole: bool) -> bool:
    return re.fullmatch(r"\s*[+-]?\d+\s*" if whole else r"\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*", text) is not None


def refusal(dsn: str) -> str:
    """Why libpq would not even try ``dsn``, which is readable; empty if it would. Nobody is connected to.

    libpq looks at most values only when it connects: let it begin, to a place that does not exist.
    """
    from psycopg import pq
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    parts = conninfo_to_dict(dsn)
    for name in _NUMBERS:
        if parts.get(name) not in (None, "") and not _is_number(str(parts[name]), whole=name != "connect_timeout"):
            return f"{name} must be a number"
    if not all(0 < int(port) < 65536 for port in str(parts.get("port") or "").split(",") if port):
        return "port must be between 1 and 65535"
    # With a password, so that no file of passwords is looked at, and complained of.
    nowhere = make_conninfo(dsn, host="/nonexistent", hostaddr="", port="1", password="-")  # noqa: S106
    connection = pq.PGconn.connect_start(nowhere.encode())
    said = connection.error_message.decode(errors="replace").strip()
    connection.finish()
    tried = not said or said.startswith(("connection to server", "could not connect to server"))
    return "" if tried else " ".join(re.sub(r'"[^"]*"', "...", said).split())


def readable_dsn(dsn: str) -> str:
    """``dsn``, if libpq can read it. Its own complaint would quote the password.

    :raises Usage: it cannot, or would not try it.
    """
    name = "the PostgreSQL DSN (postgres.dsn, PATCHPILOT_POSTGRES)"
    if not is_readable(dsn):
        raise Usage(f"{name} {MALFORMED}")
    if why := refusal(dsn):
        raise Usage(f"{name} has a value that libpq does not take: {why}")
    return dsn


def readable_endpoint(url: str, name: str, *, somewhere: bool = True) -> str:
    """``url``, if it is one of a Valkey database. A complaint must not quote it: it may hold the AUTH token.

    :param somewhere: whether it must name a host; Celery's URLs need not.
    :raises Usage: if it is none.
    """
    try:
        parts = urlsplit(url)
        database = parts.path.strip("/")
        good = parts.scheme in ("redis", "rediss") and (parts.hostname or not somewhere) and parts.port != 0
        good = good and not set(parts.hostname or "") & set(" \t%<>{}|^`\\")
        good = good and (not database or database.isdecimal())
    except ValueError:
        good = False
    if not good:
        raise Usage(
            f"{name} is malformed: write redis://host:6379/0 or rediss://host:6379/0, "
            "and percent-encode special characters of the password"
        )
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if not _is_taken(parts.scheme, key, value):
            raise Usage(f"{name}: {parts.scheme}:// does not take the parameter {key}, or not with this value")
    return url


_NO_TEXT = {
    "connection_class", "connection_pool", "credential_provider", "encoder_class", "event_dispatcher", "parser_class",
    "redis_connect_func", "retry", "retry_on_error", "socket_keepalive_options", "host", "port", "path",
}  # fmt: skip
"""What redis-py takes as an object only; and what an address has in its place."""


def _is_taken(scheme: str, key: str, value: str) -> bool:
    """Whether redis-py takes a parameter of an URL: it says so when it makes a connection, before it connects."""
    import redis

    try:
        pool = redis.ConnectionPool.from_url(f"{scheme}://h/0?{urlencode({key: value})}")
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.RedisError):
        return False
    return key not in _NO_TEXT


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
