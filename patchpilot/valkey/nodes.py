"""The nodes of a replication group as they report themselves: ``INFO`` of replication and memory, asked anew each time.

Every question opens a connection of its own, so that each one follows the endpoint's DNS name to where it leads now.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from patchpilot.errors import NeedsOperator, Refused, Transient, Usage

PORT = 6379
"""Where a URL names none."""

TIMEOUT = 3.0
"""Seconds to connect, and seconds to wait for an answer."""


@dataclass(frozen=True)
class Replica:
    """A replica as its primary sees it."""

    address: str
    state: str
    """``online`` once it follows; ``wait_bgsave`` and ``send_bulk`` while it is being synchronised."""
    offset: int
    silence: int
    """Seconds since it last acknowledged anything."""


@dataclass(frozen=True)
class Memory:
    """What one node says of its memory, in bytes."""

    used: int
    limit: int
    """``maxmemory``; where none is set, what the machine has."""
    policy: str = ""
    """``maxmemory-policy``: what happens when the limit is reached."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Memory | None:
        """Read the answer of ``INFO memory`` as redis-py parses it; None if it says nothing."""
        if "used_memory" not in info:
            return None
        limit = int(info.get("maxmemory", 0)) or int(info.get("total_system_memory", 0))
        return cls(int(info["used_memory"]), limit, str(info.get("maxmemory_policy", "")))


@dataclass(frozen=True)
class Report:
    """What one node says of itself."""

    role: str
    """``primary`` or ``replica``."""
    offset: int
    """How much of the replication stream it has, in bytes."""
    replid: str = ""
    replicas: tuple[Replica, ...] = ()
    """On a primary: who follows it."""
    link_up: bool | None = None
    """On a replica: whether it follows its primary."""
    silence: int | None = None
    """On a replica: seconds since it last heard from its primary; None while the link is down."""
    memory: Memory | None = None

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Report:
        """Read the answers of ``INFO replication`` and ``INFO memory`` as redis-py parses them."""
        if info.get("role") == "master":
            rows = [value for key, value in sorted(info.items()) if key.startswith("slave") and isinstance(value, dict)]
            return cls(
                role="primary",
                offset=int(info.get("master_repl_offset", 0)),
                replid=str(info.get("master_replid", "")),
                replicas=tuple(_replica(row) for row in rows),
                memory=Memory.of(info),
            )
        silence = int(info.get("master_last_io_seconds_ago", -1))
        return cls(
            role="replica",
            offset=int(info.get("slave_repl_offset", 0)),
            replid=str(info.get("master_replid", "")),
            link_up=info.get("master_link_status") == "up",
            silence=silence if silence >= 0 else None,
            memory=Memory.of(info),
        )


class Nodes:
    """Whoever answers behind the primary endpoint, and the members by their own addresses.

    :param url: of the primary endpoint. Its user, password and TLS settings are used for the members too.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the primary endpoint."""
        parts = urlsplit(self._url)
        return parts.hostname or "", parts.port or PORT

    def endpoint(self) -> Report:
        """Whoever answers at the primary endpoint.

        :raises Transient: nobody does.
        :raises Refused: it does not let us ask.
        :raises NeedsOperator: it refuses our login.
        """
        return self._ask(self._url)

    def member(self, host: str, port: int) -> Report:
        """The node at ``host:port``. Errors as for :meth:`endpoint`."""
        parts = urlsplit(self._url)
        login, at, _ = parts.netloc.rpartition("@")
        name = f"[{host}]" if ":" in host else host
        return self._ask(urlunsplit(parts._replace(netloc=f"{login}{at}{quote(name, safe='[]:.')}:{port}")))

    @staticmethod
    def _ask(url: str) -> Report:
        try:
            with closing(_client(url)) as client:
                return Report.of({**client.info("replication"), **client.info("memory")})
        except redis.exceptions.NoPermissionError as error:
            raise Refused(f"{_where(url)} refuses to say: allow this user the command INFO ({error})") from error
        except redis.AuthenticationError as error:
            raise NeedsOperator(f"{_where(url)} refuses our login: check the endpoint's URL ({error})") from error
        except (redis.RedisError, OSError) as error:
            raise Transient(f"{_where(url)} does not answer: {error}") from error


def connect(url: str) -> Nodes:
    """The nodes behind the primary endpoint ``url`` (``redis://`` or ``rediss://``). Nothing is asked yet.

    :raises Usage: if it is no such URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss", "valkey", "valkeys"} or not parts.hostname:
        raise Usage("the endpoint is not a URL like rediss://user:password@host:6379/0")
    # redis-py knows only its own names for the two schemes.
    return Nodes(urlunsplit(parts._replace(scheme=parts.scheme.replace("valkey", "redis"))))


def _client(url: str) -> redis.Redis:
    client: redis.Redis = redis.Redis.from_url(
        url, socket_connect_timeout=TIMEOUT, socket_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)
    )
    return client


def _replica(row: Mapping[str, Any]) -> Replica:
    return Replica(
        address=f"{row.get('ip', '')}:{row.get('port', '')}",
        state=str(row.get("state", "")),
        offset=int(row.get("offset", 0)),
        silence=int(row.get("lag", 0)),
    )


def _where(url: str) -> str:
    """The address alone: never the password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or PORT}"
