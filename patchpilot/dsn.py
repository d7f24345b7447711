"""Whether a DSN is read as it was meant. libpq's own complaints quote what it could not read, passwords included."""

from __future__ import annotations

MALFORMED = "is malformed: write postgresql://user:password@host/database, with special characters percent-encoded"


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
