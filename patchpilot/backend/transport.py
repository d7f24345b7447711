"""kombu's Redis transport, for a broker that fails over.

What it adds: a node that is no primary any more is a lost connection (:mod:`patchpilot.backend.sockets`), so workers
reconnect instead of exiting and publishers retry on a fresh connection; and timeouts, keepalive and health checks, so
that neither hangs on a socket that nobody answers. Everything else is kombu's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partialmethod
from types import MethodType
from typing import Any

import celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import redis, virtual
from kombu.utils.eventio import READ, poll
from kombu.utils.functional import dictfilter
from kombu.utils.json import dumps
from kombu.utils.url import as_url, parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from patchpilot.backend import sockets
from patchpilot.clock import SYSTEM

DEFAULTS: Mapping[str, Any] = {
    "socket_timeout": sockets.SOCKET_TIMEOUT,
    "socket_connect_timeout": sockets.CONNECT_TIMEOUT,
    "socket_keepalive": True,
    "socket_keepalive_options": sockets.KEEPALIVE,
    "health_check_interval": sockets.HEALTH_CHECK_INTERVAL,
}
"""Transport options where the user has set none of that name."""


def with_defaults(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's transport options, completed. What the user says stands, None included."""
    return {**DEFAULTS, **(options or {})}


_LOST = (RedisConnectionError, RedisTimeoutError, OSError)

_KOMBU_CHECKS = hasattr(redis.MultiChannelPoller, "maybe_check_brpop_health")


_listeners: ContextVar[list[int] | None] = ContextVar("patchpilot_listeners", default=None)


@contextmanager
def counting_listeners() -> Iterator[list[int]]:
    """Inside, the list that this gives holds how many clients of the broker the last broadcast reached, by topic."""
    count: list[int] = []
    token = _listeners.set(count)
    try:
        yield count
    finally:
        _listeners.reset(token)


class Refused(OperationalError, ResponseError):
    """The server refuses a message for good, for want of memory for example. It is kombu's error and redis-py's."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Makes kombu's error of redis-py's, as kombu does with what it retries."""
    try:
        yield
    except ResponseError as error:
        raise Refused(str(error)) from error


class Poller(redis.MultiChannelPoller):  # type: ignore[misc]
    """Gives the whole connection up when a BRPOP is not answered.

    A half-open socket never becomes readable, so nothing else notices before the kernel does. kombu drops, from 5.7 on,
    the one socket, takes the next message over a new one, and loses it when it writes that down over an old one.
    """

    def on_poll_start(self) -> None:
        self._end_what_is_lost()
        super().on_poll_start()

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self._end_what_is_lost()  # before kombu 5.7, on_poll_start is for the event loop only
        return super().get(*args, **kwargs)

    def _end_what_is_lost(self) -> None:
        for channel in self._channels:
            channel.end_if_lost()

    def maybe_check_brpop_health(self) -> None:
        for channel in self._channels:
            channel.insist_on_answer()

    def maybe_restore_messages(self) -> Any:
        if not _KOMBU_CHECKS:
            self.maybe_check_brpop_health()
        return super().maybe_restore_messages()


class QoS(redis.QoS):  # type: ignore[misc]
    """Writes down what was delivered and what is done with, over a fresh connection if the one at hand is lost.

    Celery logs an acknowledgement that fails and goes on. The message then counts against the prefetch limit for good,
    and once the limit is reached a worker neither reads from its broker nor notices anything, so the channel ends.
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        self._persistently(super().append, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self.channel.end_if_lost()
        self._persistently(super().ack, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.channel.end_if_lost()
        self._persistently(super().reject, delivery_tag, requeue)

    def _persistently(self, write: Callable[..., None], *args: Any) -> None:
        try:
            write(*args)
        except _LOST:
            try:
                write(*args)  # each may be done twice
            except _LOST as error:
                self.channel.lost = error
                raise


class Channel(redis.Channel):  # type: ignore[misc]
    """A channel whose connections lead to a primary."""

    QoS = QoS
    lost: Exception | None = None
    """Why the channel has to end."""

    connection_class = sockets.PrimaryConnection
    connection_class_ssl = sockets.PrimarySSLConnection

    _asked_at = 0.0

    def basic_publish(self, *args: Any, **kwargs: Any) -> Any:
        if self.connection is None:
            # Closed under the producer, by a reconnect while it declared the queue. It has to start over.
            raise RedisConnectionError("the channel was closed before the message was published")
        with _refusals():
            return super().basic_publish(*args, **kwargs)

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **options: Any) -> None:
        listeners = _listeners.get()
        if listeners is None:
            super()._put_fanout(exchange, message, routing_key, **options)
            return
        # Since kombu 5.7 there may be several.
        topics = getattr(self, "_get_publish_topics", lambda *names: [self._get_publish_topic(*names)])
        with self.conn_or_acquire() as client:
            listeners[:] = [client.publish(topic, dumps(message)) for topic in topics(exchange, routing_key)]

    def _connparams(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.connection, "client", None) is None:
            # An acknowledgement on a channel, or a connection, that a reconnect has closed. Celery logs a lost
            # connection, and goes on.
            raise RedisConnectionError("the channel was closed")
        return super()._connparams(*args, **kwargs)

    def queue_declare(self, *args: Any, **kwargs: Any) -> Any:
        with _refusals():
            return super().queue_declare(*args, **kwargs)

    def queue_bind(self, *args: Any, **kwargs: Any) -> Any:
        with _refusals():
            return super().queue_bind(*args, **kwargs)

    def _brpop_start(self, *args: Any, **kwargs: Any) -> None:
        self._asked_at = SYSTEM.monotonic()
        super()._brpop_start(*args, **kwargs)

    def close(self) -> None:
        try:
            super().close()
        except _LOST:  # in the middle, and kombu would leave the sockets open
            with suppress(*_LOST):
                virtual.Channel.close(self)
        finally:
            if self.connection is not None:
                self.connection.cycle.discard(self)
            self._disconnect_pools()
            self._close_clients()

    def end_if_lost(self) -> None:
        if self.lost is not None:
            raise self.lost

    def insist_on_answer(self) -> None:
        """Give the connection up if the reply to its BRPOP, which the server delays for a known time, is overdue.

        :raises ConnectionError: if so.
        """
        delay = getattr(self, "brpop_timeout", 1)  # an attribute since kombu 5.6; 0 is for ever
        waited = SYSTEM.monotonic() - self._asked_at
        if not self._in_poll or not delay or not self.health_check_interval:
            return
        if waited > delay + self.health_check_interval and not _readable(self._in_poll._sock):
            self._in_poll.disconnect()
            raise RedisConnectionError(f"no answer from the broker for {waited:.0f} s")


class Transport(redis.Transport):  # type: ignore[misc]
    """The transport: ``broker_transport = "patchpilot.transport:Transport"``, for redis:// and rediss:// URLs."""

    Channel = Channel

    # kombu tells a transport that parses URLs itself the scheme, which alone says whether to speak TLS.
    can_parse_url = True

    # With these kombu retries a publish for as long as the policy says. Without, a second loss in a row is raised.
    # A KeyError, a lost connection to kombu 5.7, would be the same one each time.
    recoverable_connection_errors = tuple(
        error for error in redis.Transport.connection_errors if not issubclass(error, KeyError)
    )
    recoverable_channel_errors = ()

    def __init__(self, client: Any, **kwargs: Any) -> None:
        if "://" in (client.hostname or ""):
            _take_apart(client)
        client.switch = MethodType(_switch, client)
        client.transport_options = with_defaults(client.transport_options)
        super().__init__(client, **kwargs)
        self.cycle = Poller()
        _skip_beats()
        _size_green_pools()

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """The broker's URL, for log lines."""
        client = self.client
        scheme, port = "rediss" if client.ssl else "redis", client.port or self.default_port
        return as_url(
            scheme, client.hostname, port, client.userid, client.password, client.virtual_host,
            sanitize=not include_password, mask=mask,
        )  # fmt: skip


def _skip_beats() -> None:
    """Have a Celery worker publish each heartbeat event once.

    It tries for as long as it takes, in its main loop, which meanwhile neither reconnects nor learns that the worker
    was told to stop.
    """
    worker = sys.modules.get("celery.worker.heartbeat")
    if worker is not None and not isinstance(vars(worker.Heart)["_send"], partialmethod):
        worker.Heart._send = partialmethod(worker.Heart._send, retry=False)


def _size_green_pools() -> None:
    """Have a Celery worker know how many tasks its gevent pool takes at once, as Celery 5.7 does.

    Before, it takes those that run for all that the pool can run, and fetches no more than that from a lost connection
    on: often one at a time, each two seconds after the one before.
    """
    green = sys.modules.get("celery.concurrency.gevent")
    if green is not None and celery.VERSION < (5, 7):
        green.TaskPool.num_processes = property(lambda pool: pool._pool.size)


def _take_apart(client: Any) -> None:
    """Set up a kombu connection from its URL, exactly as kombu does when no transport is named."""
    parts = parse_url(client.hostname)
    ours = client.transport_cls
    client._init_params(**{**client._initial_params, **dictfilter(parts), "hostname": parts["hostname"]})
    client.transport_cls = ours


def _switch(client: Any, url: str) -> None:
    """Go to the next of several broker URLs. kombu's own would take the transport from the URL's scheme again."""
    ours = client.transport_cls
    Connection.switch(client, url)
    client.transport_cls = ours


def _readable(sock: Any) -> bool:
    if sock is None:  # closed, which others notice
        return True
    poller = poll()
    try:
        poller.register(sock, READ)
        return bool(poller.poll(0))
    finally:
        poller.close()
