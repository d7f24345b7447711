"""Which broker a message goes to, or a worker consumes from: see :mod:`patchpilot.broker_name`."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.utils.log import get_logger
from redis.exceptions import RedisError

from patchpilot.backend.config import BROKER
from patchpilot.broker_name import NAMES, name_of_url, named
from patchpilot.clock import SYSTEM

logger = get_logger(__name__)

AGAIN = 60.0
"""Seconds after which a name is left in the broker once more: a failover may have lost it."""


class Identity:
    """What the brokers of one application are called."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._known: dict[tuple[Any, ...], str | None] = {}
        self._due: dict[str, float] = {}

    @property
    def home(self) -> str | None:
        """The broker that the application publishes to unless it is told otherwise; None if it is no Redis."""
        prefix = (self._app.conf.broker_transport_options or {}).get("global_keyprefix") or ""
        return self._given(name_of_url(_first(self._app.conf.broker_write_url), prefix))

    def of(self, connection: Any) -> str | None:
        """The broker that a kombu connection leads to; None if it is no Redis."""
        if connection.transport.driver_type != "redis":
            return None
        prefix = (connection.transport_options or {}).get("global_keyprefix") or ""
        address = (connection.hostname, connection.port, connection.virtual_host, prefix)
        if address not in self._known:  # asked for with each message
            self._known[address] = self._given(named(*address))
        return self._known[address]

    def leave(self, connection: Any, channel: Any = None) -> None:
        """Leave the broker's name in it, unless that was done a moment ago. A broker that refuses is none the worse."""
        name = self.of(connection)
        now = SYSTEM.monotonic()
        if name is None or now < self._due.get(name, 0):
            return
        self._due[name] = now + AGAIN
        try:
            # By a connection of its own: on the channel's, a worker may be waiting for its next message.
            with (channel or connection.default_channel).conn_or_acquire() as client:
                client.sadd(NAMES, name)
        except (RedisError, OSError) as error:
            logger.debug("The name %s was not left in the broker: %r", name, error)

    def _given(self, name: str | None) -> str | None:
        """``name``; or what ``patchpilot_broker`` says, for the application's own broker."""
        given = self._app.conf.get(BROKER)
        if not given or name is None:
            return name
        prefix = (self._app.conf.broker_transport_options or {}).get("global_keyprefix") or ""
        own = {
            name_of_url(_first(url), prefix)
            for url in (self._app.conf.broker_write_url, self._app.conf.broker_read_url)
        }
        return str(given) if name in own else name


def _first(url: Any) -> str:
    return str((url[0] if isinstance(url, list | tuple) else url) or "")
