"""Where an application's messages are taken to the outbox: producers that stand before kombu's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from patchpilot.backend.dispatch import Dispatch, chord_called_back, current
from patchpilot.backend.message import prepare

if TYPE_CHECKING:
    from patchpilot.backend.outbox import Outbox


class Journalling:
    """A kombu producer that gives a task message to the outbox in place of the broker."""

    def __init__(self, producer: Any, outbox: Outbox) -> None:
        self._producer = producer
        self._outbox = outbox
        self._message_id: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> None:
        if "task" not in (options.get("headers") or {}):  # a task-sent event takes the same producer
            self._producer.publish(body, **options)
            return
        connection = self._producer.connection
        broker, to_all = self._outbox.identity.of(connection), _is_fanout(connection, options.get("exchange"))
        message = prepare(body, options, chord_called_back(), self._message_id, broker, to_all=to_all)
        self._message_id = message.id  # a caller that tries again publishes the same message
        self._outbox.publish(message, self._producer)


class Publishing:
    """The time in which one group's messages are published: they are held back until its end."""

    def __init__(self, outbox: Outbox, dispatch: Dispatch, producer: AbstractContextManager[Any]) -> None:
        self._outbox = outbox
        self._dispatch = dispatch
        self._context = producer
        self._producer: Any = None
        self._token: Token[Dispatch | None] | None = None

    def __enter__(self) -> Any:
        self._producer = self._context.__enter__()
        self._token = current.set(self._dispatch)
        return self._producer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            current.reset(self._token)
        try:
            if error is None:
                self._outbox.send(self._dispatch, self._producer)
            else:
                self._outbox.abandon(self._dispatch, error)
        finally:
            self._context.__exit__(kind, error, trace)


def _is_fanout(connection: Any, exchange: Any) -> bool:
    """Whether kombu gives what is published there to all who listen: it knows what this connection declared."""
    if not exchange:
        return False
    known = getattr(connection.transport, "state", None)
    declared = known.exchanges.get(getattr(exchange, "name", exchange), {}) if known else {}
    return bool(getattr(exchange, "type", None) == "fanout" or declared.get("type") == "fanout")
