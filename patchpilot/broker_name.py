"""What a broker is called in the durable record, where several may share one PostgreSQL.

The name is made of the address as whoever uses it knows it: no question to ask, so nothing that a failover or a flush
could take away, and the same before, during and after. It holds no secret. Two names of one broker (an alias in DNS, a
tunnel) are no harm, because everybody who publishes or consumes leaves the name that it uses in the broker itself, in a
set that whoever recovers reads. An id kept in the broker alone could be lost with it, and with it what is on record
under that id.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

NAMES = "patchpilot.names"
"""The key of the set in the broker: every name under which somebody uses it."""

PORT = 6379


def named(host: str | None, port: int | str | None, database: int | str | None, prefix: str = "") -> str:
    """``host:port/database``, and the prefix of its keys if it has one: they make one broker into several."""
    host = (host or "localhost").lower().rstrip(".")
    if host.startswith("127.") or host == "::1":
        host = "localhost"
    name = f"{host}:{port or PORT}/{str(database or '').strip('/') or 0}"
    return f"{name}#{prefix}" if prefix else name


def name_of_url(url: str, prefix: str = "") -> str | None:
    """The name of the broker at ``url``; of several, with semicolons between, the first. None if it is no Redis URL."""
    parts = urlsplit(url.split(";", maxsplit=1)[0])
    if parts.scheme not in ("redis", "rediss"):
        return None
    return named(parts.hostname, parts.port, unquote(parts.path), prefix)
