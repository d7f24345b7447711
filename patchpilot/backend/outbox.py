"""The outbox: every task message is in PostgreSQL before it leaves for Valkey, and gone when its task ends.

A message that a failover lost can then be pushed again exactly as it was. The outbox sits on the one way that all task
messages of an application take, ``app.amqp.send_task_message``, so it sees header tasks, chain continuations,
retries, callbacks, errbacks and ``send_task`` alike. It fails the publish if it cannot write: a signal receiver could
not, because Celery swallows what receivers raise.

A chord is written down as a whole: its record, its members and all its header's messages in one transaction, before the
first message leaves. A producer that dies on the way leaves a chord that recovery can finish, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from celery import Celery
from celery._state import get_current_worker_task
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError, OperationalError
from redis.exceptions import RedisError

from patchpilot.backend.config import CANARY, Journal
from patchpilot.backend.identity import Identity
from patchpilot.backend.message import Message, Part, columns, prepare
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("outbox")

# What a broker that is away raises. Anything else (an unknown compression, a soft time limit) is the caller's to hear.
_AWAY = (OperationalError, RedisError, OSError)

AT_ONCE = 5000
"""How many messages of one header are held in memory and written down at once. Longer headers take several turns."""

Work = Callable[[Connection], object]


class Opening(Protocol):
    """A chord that is about to be published: :class:`patchpilot.backend.chords.Opening`."""

    @property
    def group_id(self) -> str: ...

    def count_in_postgres(self) -> None:
        """Have its parts counted in PostgreSQL, whatever is configured."""

    def write(self, connection: Connection, publish_error: str | None = None) -> None:
        """Write it down."""


@dataclass
class Dispatch:
    """What one call publishes. It is written down in one transaction, and then pushed."""

    openings: list[Opening] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    """Group ids of the chords that are on record already."""
    at_once: float = 1
    """How many messages are held before they are sent."""


_current: ContextVar[Dispatch | None] = ContextVar("patchpilot_current", default=None)
_announced: ContextVar[Dispatch | None] = ContextVar("patchpilot_announced", default=None)
_callback_of: ContextVar[str | None] = ContextVar("patchpilot_callback_of", default=None)


@contextmanager
def callback_of(group_id: str) -> Iterator[None]:
    """Messages sent inside are the callback of chord ``group_id``: their start is fenced."""
    token = _callback_of.set(group_id)
    try:
        yield
    finally:
        _callback_of.reset(token)


class Outbox:
    """The outbox of one application in this process.

    :param strict: refuse a message that no worker could read.
    :param shadow: only watch: what is published is written down, and nothing is held back for that.
    :param run: writes; by default a transaction of its own for each call.
    """

    def __init__(
        self,
        app: Celery,
        database: Database,
        journal: Journal = Journal.REQUIRED,
        *,
        shadow: bool = False,
        strict: bool = False,
        run: Callable[[Work], object] | None = None,
    ) -> None:
        self._app = app
        self._database = database
        self._journal = journal
        self._shadow = shadow
        self._strict = strict
        self.identity = Identity(app)
        self.foresee: Callable[[Connection, Part], None] = lambda _connection, _part: None
        """Told of each part of a chord that a message will bring, in the transaction that writes the message down."""
        self._run: Callable[[Work], object] = run or partial(database.run, pipelined=True)

    def install(self) -> None:
        """Put the outbox between the application and its broker. Once; a second call changes nothing."""
        send, acquire = self._app.amqp.send_task_message, self._app.producer_or_acquire
        if getattr(send, "patchpilot", False):
            return

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            return send(_Journalling(producer, self), name, message, **options)

        def producer_or_acquire(producer: Any = None) -> Any:
            # Whoever publishes a group asks for a producer first: what was announced a moment ago begins here.
            dispatch = _announced.get()
            _announced.set(None)
            return acquire(producer) if dispatch is None else _Publishing(self, dispatch, acquire(producer))

        send_task_message.patchpilot = True  # type: ignore[attr-defined]
        self._app.amqp.send_task_message = send_task_message
        self._app.producer_or_acquire = producer_or_acquire

    # -- what happens to a dispatch -----------------------------------------------------------------------------

    def open(self, opening: Opening, *, at_once: bool = True) -> None:
        """A chord is about to be published: its header's messages follow on this thread.

        :param at_once: hold them until all are there. Those of a generator are sent as they come.
        :raises OperationalError: if it has to be written down at once, and cannot be.
        """
        dispatch = _current.get()
        if dispatch is not None:
            dispatch.openings.append(opening)
        elif self._shadow:
            self._write(Dispatch([opening]))
        else:
            _announced.set(Dispatch([opening], at_once=AT_ONCE if at_once else 1))

    def opens(self, group_id: str) -> bool:
        """Whether chord ``group_id`` is being opened here and now."""
        dispatch = _current.get() or _announced.get() or Dispatch()
        return group_id in dispatch.opened or self.opening(group_id) is not None

    @staticmethod
    def opening(group_id: str) -> Opening | None:
        """Chord ``group_id``, if it is being opened here and now and is not on record yet."""
        dispatch = _current.get() or _announced.get() or Dispatch()
        return next((opening for opening in dispatch.openings if opening.group_id == group_id), None)

    def publish(self, message: Message, producer: Any) -> None:
        """Publish a message, or hold it back until the dispatch that it belongs to is complete.

        :raises OperationalError: if it cannot be written down.
        :raises EncodeError: if no worker could read it, and the configuration is strict.
        """
        if message.flaw is not None:
            if self._strict:
                raise EncodeError(f"{message} is not published, no worker could read it: {message.flaw}")
            logger.warning("No worker will be able to read %s: %s", message, message.flaw)
        dispatch = _current.get()
        if dispatch is None:
            dispatch = _announced.get() or Dispatch()
            _announced.set(None)
            dispatch.messages.append(message)
            self.send(dispatch, producer)
        else:
            dispatch.messages.append(message)
            if len(dispatch.messages) >= dispatch.at_once:
                self.send(dispatch, producer)

    @staticmethod
    @contextmanager
    def collect() -> Iterator[Dispatch]:
        """Hold back everything that is published inside: :meth:`deliver` it."""
        dispatch = Dispatch(at_once=math.inf)
        token = _current.set(dispatch)
        try:
            yield dispatch
        finally:
            _current.reset(token)

    def deliver(self, dispatches: Mapping[str, Dispatch], claim: Callable[[Connection], Iterable[str]]) -> set[str]:
        """Commit those dispatches that ``claim`` says are ours, all in one transaction with it, and push them.

        Once they are committed nothing raises any more: what cannot be pushed is left to recovery.

        :returns: which were ours.
        :raises PatchpilotError: if nothing could be committed. Nothing is pushed then.
        """

        def work(connection: Connection) -> set[str]:
            ours = set(claim(connection))
            self._work(_merged(dispatches, ours))(connection)
            return ours

        ours = self._database.run(work, pipelined=True)
        whole = _merged(dispatches, ours)
        if whole.messages:
            with self._app.producer_or_acquire() as producer:
                self._push(whole, producer, leave=True)
        return ours

    def send(self, dispatch: Dispatch, producer: Any) -> None:
        """Write a dispatch down and push it. It is empty afterwards, and may be filled again.

        :raises OperationalError: if it cannot be written down. Nothing is pushed then.
        """
        on_record = self._write(dispatch)
        self._push(dispatch, producer, leave=on_record and get_current_worker_task() is not None)

    def abandon(self, dispatch: Dispatch, error: BaseException) -> None:
        """Publishing raised half-way. What was held back never leaves; its chords are on record as not published."""
        openings, opened, name = tuple(dispatch.openings), [*dispatch.opened], type(error).__name__

        def write(connection: Connection) -> None:
            for opening in openings:
                opening.write(connection, publish_error=name)
            connection.execute(queries("chords")["publishing_failed"], {"group_ids": opened, "error": name})

        with suppress(PatchpilotError):
            self._run(write)

    def end(self, message_id: str) -> None:
        """The task of this message has ended."""
        self._forget([message_id])

    # -- writing and pushing ------------------------------------------------------------------------------------

    def _work(self, dispatch: Dispatch) -> Work:
        openings, rows = tuple(dispatch.openings), columns(self._journalled(dispatch.messages))
        parts = [message.part for message in dispatch.messages if message.part is not None]

        def work(connection: Connection) -> None:
            for opening in openings:
                opening.write(connection)
            for part in parts:
                self.foresee(connection, part)
            if rows["message_id"]:
                connection.execute(SQL["record"], {**rows, "shadow": self._shadow})

        return work

    def _write(self, dispatch: Dispatch) -> bool:
        """Write a dispatch down. Whether recovery may send it then: it only watches what is in shadow mode."""
        written = True
        try:
            if dispatch.openings or dispatch.messages:
                self._run(self._work(dispatch))
        except PatchpilotError as error:
            if self._journal is Journal.REQUIRED or dispatch.openings:  # half a chord's protection is none
                names = ", ".join(sorted({message.name for message in dispatch.messages})) or "chord"
                raise OperationalError(f"{names} not published: {error}") from error
            logger.warning("Published without a record: %s", error)
            written = False
        dispatch.opened += [opening.group_id for opening in dispatch.openings]
        dispatch.openings.clear()
        return written and not self._shadow

    def _push(self, dispatch: Dispatch, producer: Any, *, leave: bool) -> None:
        """Push a dispatch.

        :param leave: to recovery, whatever is on record and cannot be pushed. For whoever has no caller that could try
            again: a task that has ended must not become a failure because the next one's message could not be pushed.
        """
        messages, dispatch.messages = dispatch.messages, []
        for number, message in enumerate(messages):
            try:
                with producer.connection._reraise_as_library_errors():
                    message.push(producer)
            except Exception as error:
                left = messages[number:]
                if leave and isinstance(error, _AWAY) and len(self._journalled(left)) == len(left):
                    chords = sorted({it.callback_of for it in left if it.callback_of})
                    logger.warning(
                        "%d messages from %s on are left to recovery%s: %r",
                        len(left), message, f", callbacks of chords {', '.join(chords)}" if chords else "", error,
                    )  # fmt: skip
                    return
                self._withdraw(dispatch, left, error)
                raise
        if self._journalled(messages):
            self.identity.leave(producer.connection, producer.channel)

    def _withdraw(self, dispatch: Dispatch, left: Sequence[Message], error: Exception) -> None:
        """The caller is told that publishing failed, so nobody must publish these, or finish their chord, later."""
        logger.warning("Publishing %s failed: %r", left[0], error)
        chords = {*dispatch.opened, *(message.group_id for message in left if message.group_id)}
        failed = {"group_ids": sorted(chords), "error": type(error).__name__}

        def write(connection: Connection) -> None:
            connection.execute(SQL["end"], {"message_ids": [message.id for message in left]})
            if chords:
                connection.execute(queries("chords")["publishing_failed"], failed)

        with suppress(PatchpilotError):
            self._run(write)

    def _forget(self, message_ids: list[str]) -> None:
        def write(connection: Connection) -> None:
            connection.execute(SQL["end"], {"message_ids": message_ids})

        try:
            self._run(write)
        except PatchpilotError as error:
            # Recovery sees that the task has a result and closes the row.
            logger.error("The end of message %s was not recorded: %s", message_ids[0], error)  # noqa: TRY400

    def _journalled(self, messages: Iterable[Message]) -> list[Message]:
        kept = (it for it in messages if self._journal is not Journal.OFF or it.callback_of)
        return [it for it in kept if it.name != CANARY and not it.to_all]


def _merged(dispatches: Mapping[str, Dispatch], ours: Collection[str]) -> Dispatch:
    parts = [dispatch for name, dispatch in dispatches.items() if name in ours]
    return Dispatch(
        openings=[opening for part in parts for opening in part.openings],
        messages=[message for part in parts for message in part.messages],
    )


def _is_fanout(connection: Any, exchange: Any) -> bool:
    """Whether kombu gives what is published there to all who listen: it knows what this connection declared."""
    if not exchange:
        return False
    known = getattr(connection.transport, "state", None)
    declared = known.exchanges.get(getattr(exchange, "name", exchange), {}) if known else {}
    return bool(getattr(exchange, "type", None) == "fanout" or declared.get("type") == "fanout")


class _Journalling:
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
        message = prepare(body, options, _callback_of.get(), self._message_id, broker, to_all=to_all)
        self._message_id = message.id  # a caller that tries again publishes the same message
        self._outbox.publish(message, self._producer)


class _Publishing:
    """The time in which one group's messages are published: they are held back until its end."""

    def __init__(self, outbox: Outbox, dispatch: Dispatch, producer: AbstractContextManager[Any]) -> None:
        self._outbox = outbox
        self._dispatch = dispatch
        self._context = producer
        self._producer: Any = None
        self._token: Token[Dispatch | None] | None = None

    def __enter__(self) -> Any:
        self._producer = self._context.__enter__()
        self._token = _current.set(self._dispatch)
        return self._producer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
        try:
            if error is None:
                self._outbox.send(self._dispatch, self._producer)
            else:
                self._outbox.abandon(self._dispatch, error)
        finally:
            self._context.__exit__(kind, error, trace)
