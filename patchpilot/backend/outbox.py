"""The outbox: every task message is in PostgreSQL before it leaves for Valkey, and gone when its task ends.

A message that a failover lost can then be pushed again exactly as it was. The outbox sits on the one way that all task
messages of an application take, ``app.amqp.send_task_message``, so it sees header tasks, chain continuations,
retries, callbacks, errbacks and ``send_task`` alike. It fails the publish if it cannot write: a signal receiver could
not, because Celery swallows what receivers raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError
from kombu.serialization import dumps
from kombu.utils import json
from psycopg.types.json import Jsonb

from patchpilot.backend.config import CALLBACK_OF, CANARY, MESSAGE_ID
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

_dispatching: ContextVar[str | None] = ContextVar("patchpilot_dispatching", default=None)

# Options of Producer.publish that steer this publish and are not part of the message.
_NOT_PROPERTIES = frozenset(
    {
        "exchange",
        "routing_key",
        "serializer",
        "retry",
        "retry_policy",
        "declare",
        "headers",
        "timeout",
        "confirm_timeout",
    }
)


@contextmanager
def callback_of(group_id: str) -> Iterator[None]:
    """Messages sent inside are the callback of chord ``group_id``: they are fenced, and never withdrawn."""
    token = _dispatching.set(group_id)
    try:
        yield
    finally:
        _dispatching.reset(token)


class Outbox:
    """The outbox of one application in this process."""

    def __init__(self, app: Celery, database: Database) -> None:
        self._app = app
        self._database = database

    def install(self) -> None:
        """Put the outbox between the application and its broker. Once; a second call changes nothing."""
        send = self._app.amqp.send_task_message
        if getattr(send, "patchpilot", False):
            return

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            return send(_Journalling(producer, self), name, message, **options)

        send_task_message.patchpilot = True  # type: ignore[attr-defined]
        self._app.amqp.send_task_message = send_task_message

    def record(self, row: dict[str, Any]) -> None:
        """Commit a message.

        :raises OperationalError: if PostgreSQL cannot be reached: kombu's error, so that Celery and its users treat
            it like any other failure to publish.
        """
        try:
            self._database.execute(queries("outbox")["record"], row)
        except PatchpilotError as error:
            raise OperationalError(f"task {row['task_name']}[{row['task_id']}] not published: {error}") from error

    def withdraw(self, message_id: str, headers: Mapping[str, Any], group_id: str | None, error: Exception) -> None:
        """The caller is told that publishing failed, so nobody must publish the message, or finish its chord, later."""
        logger.warning("Publishing %s[%s] failed: %r", headers["task"], headers["id"], error)
        with suppress(PatchpilotError):
            self._database.execute(queries("outbox")["end"], {"message_id": message_id})
            if group_id:
                failed = {"group_id": group_id, "error": type(error).__name__}
                self._database.execute(queries("chords")["publishing_failed"], failed)

    def end(self, message_id: str) -> None:
        """The task of this message has ended."""
        try:
            self._database.execute(queries("outbox")["end"], {"message_id": message_id})
        except PatchpilotError as error:
            # Recovery sees that the task has a result and closes the row.
            logger.error("The end of message %s was not recorded: %s", message_id, error)  # noqa: TRY400


class _Journalling:
    """A kombu producer that writes a task message down before it publishes it."""

    def __init__(self, producer: Any, outbox: Outbox) -> None:
        self._producer = producer
        self._outbox = outbox
        self._message_id = str(uuid4())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        headers = options.get("headers") or {}
        if headers.get("task", CANARY) == CANARY:  # no task: a task-sent event takes the same producer
            return self._producer.publish(body, **options)
        headers[MESSAGE_ID] = self._message_id
        if (chord := _dispatching.get()) is not None:
            headers[CALLBACK_OF] = chord
        try:
            content_type, content_encoding, payload = dumps(body, serializer=options.pop("serializer", None))
            payload = payload.encode(content_encoding) if isinstance(payload, str) else payload
            row = _row(self._message_id, headers, body, payload, (content_type, content_encoding), options)
            self._outbox.record(row)
            return self._producer.publish(
                payload, content_type=content_type, content_encoding=content_encoding, **options
            )
        except Exception as error:
            if chord is None:
                self._outbox.withdraw(self._message_id, headers, _chord_of(headers, body), error)
            raise


def _row(
    message_id: str,
    headers: dict[str, Any],
    body: Any,
    payload: bytes,
    content: tuple[str, str],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The message as a row: exactly enough to publish it again, identical but for its delivery tag."""
    exchange = options.get("exchange") or ""
    declared = options.get("declare") or []
    return {
        "message_id": message_id,
        "task_id": headers["id"],
        "task_name": headers["task"],
        "group_id": _chord_of(headers, body),
        "callback_of": headers.get(CALLBACK_OF),
        "exchange": getattr(exchange, "name", exchange),
        "routing_key": options.get("routing_key") or "",
        "queue": getattr(declared[0], "name", None) if declared else None,
        "headers": Jsonb(headers, dumps=json.dumps),
        "properties": Jsonb(
            {key: value for key, value in options.items() if key not in _NOT_PROPERTIES}, dumps=json.dumps
        ),
        "body": payload,
        "content_type": content[0],
        "content_encoding": content[1],
        "eta": _moment(headers.get("eta")),
        "expires": _moment(headers.get("expires")),
    }


def _chord_of(headers: Mapping[str, Any], body: Any) -> str | None:
    """The chord that waits for this message, or for the end of the chain that it starts."""
    embed = body[2]
    if embed.get("chord") is not None:
        group: str | None = headers.get("group")
        return group
    chain = embed.get("chain") or []
    # The rest of a chain travels in reverse: its last task comes first.
    options = (chain[0].get("options") or {}) if chain else {}
    return options.get("group_id") if options.get("chord") is not None else None


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
