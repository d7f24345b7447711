"""Connections to Valkey that lead to a primary, or count as lost.

After a failover an open socket may still lead to the node that was the primary. That node answers, so neither redis-py
nor kombu nor Celery takes the connection for lost: a write gets READONLY, a blocked read UNBLOCKED, and a PUBLISH
vanishes. Here such an answer is a lost connection, and a new connection that reaches no primary is none.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, ResponseError
from redis.utils import str_if_bytes

from patchpilot.clock import SYSTEM

if TYPE_CHECKING:
    from typing import Any as _Connection
else:
    _Connection = object  # a class of redis-py's comes beside it

SOCKET_TIMEOUT = 10.0
"""Seconds without an answer after which a connection counts as lost."""

CONNECT_TIMEOUT = 5.0
"""Seconds for which a new connection is waited for."""

HEALTH_CHECK_INTERVAL = 5
"""Seconds after which a connection is asked again, before it is used, whether it leads to a primary."""

# Without these the kernel asks for the first time after two hours. Not every system has all three.
KEEPALIVE = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}
"""Kernel keepalive: a peer that is gone is noticed after about 30 s on an idle socket."""

# A transaction that was queued before the failover is refused with EXECABORT, which names the reason.
_NO_PRIMARY = ("READONLY", "UNBLOCKED", "MASTERDOWN", "LOADING")


class NotPrimary(RedisConnectionError):
    """The connection led to a node that is no primary, and was closed."""


def is_no_primary(error: ResponseError) -> bool:
    """Whether a server's error means that it is no primary (any more), or not yet."""
    return isinstance(error, ReadOnlyError | MasterDownError) or any(code in str(error) for code in _NO_PRIMARY)


class _Primary(_Connection):  # type: ignore[misc]
    """Makes a connection class of redis-py insist on a primary."""

    # kombu hands over health_check_interval only if it finds it named here.
    def __init__(self, *args: Any, health_check_interval: float = 0, **kwargs: Any) -> None:
        super().__init__(*args, health_check_interval=health_check_interval, **kwargs)
        self.redis_connect_func: Any = _connected
        self.role_known_until = 0.0
        self.greeting = False

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not is_no_primary(error):
                raise
            self.disconnect()
            raise NotPrimary(str(error)) from error

    def check_health(self) -> None:
        """Before a command, as redis-py does; but the role is asked for even on a connection that is never silent."""
        if self.greeting:  # by a check that reconnects, perhaps: redis-py would check anew, and so on without an end
            return
        super().check_health()
        if self.health_check_interval and SYSTEM.monotonic() > self.role_known_until:
            _check_role(self)


def _connected(connection: Any) -> None:
    connection.greeting = True
    try:
        connection.on_connect()
    finally:
        connection.greeting = False
    _check_role(connection)


def _check_role(connection: Any) -> None:
    """Ask the node for its role. HELLO says it, and needs no permission that a client would not have anyway.

    :raises NotPrimary: if it is no primary.
    """
    connection.role_known_until = SYSTEM.monotonic() + connection.health_check_interval
    connection.send_command("HELLO", check_health=False)
    try:
        answer = connection.read_response()
    except ResponseError:  # refused after all, or too old a server: then the first write tells
        return
    pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=False)
    role = next((str_if_bytes(value) for key, value in pairs if str_if_bytes(key) == "role"), "master")
    if role != "master":
        connection.disconnect()
        raise NotPrimary(f"connected to a {role}, not to the primary")


class PrimaryConnection(_Primary, redis.Connection):
    """A plain connection to a primary."""


class PrimarySSLConnection(_Primary, redis.SSLConnection):
    """A connection to a primary over TLS."""


def insisting(connparams: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a redis-py pool, for connections that insist on a primary. Unix sockets stay as they are."""
    insists = {redis.Connection: PrimaryConnection, redis.SSLConnection: PrimarySSLConnection}.get(
        connparams.get("connection_class", redis.Connection)
    )
    if insists is None:
        return {key: value for key, value in connparams.items() if key != "socket_keepalive"}
    return {"socket_keepalive_options": KEEPALIVE, **connparams, "connection_class": insists}
