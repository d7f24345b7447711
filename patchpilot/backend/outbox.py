"""The outbox: every task message is in PostgreSQL before it leaves for Valkey, and gone when its task ends.

A message that a failover lost can then be pushed again exactly as it was. The outbox sits on the one way that all task
messages of an application take, ``app.amqp.send_task_message``, so it sees header tasks, chain continuations,
retries, callbacks, errbacks and ``send_task`` alike. It fails the publish if it cannot write: a signal receiver could
not, because Celery swallows what receivers raise.

A chord is written down as a whole: its record, its members and all its header's messages in one transaction, before the
first message leaves. A producer that dies on the way leaves a chord that recovery can finish, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from celery import Celery
from celery._state import get_current_worker_task
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError

from patchpilot.backend.config import Journal
from patchpilot.backend.message import Message, columns, prepare
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("outbox")

AT_ONCE = 5000
"""How many messages of one header are held in memory and written down at once. Longer headers take several turns."""

Work = Callable[[Connection], None]


class Opening(Protocol):
    """A chord that is about to be published: :class:`patchpilot.backend.chords.Opening`."""

    @property
    def group_id(self) -> str: ...

    def write(self, connection: Connection, publish_error: str | None = None) -> None:
        """Write it down."""


@dataclass
class Dispatch:
    """What one call publishes. It is written down in one transaction, and then pushed."""

    openings: list[Opening] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    """Group ids of the chords that are on record already."""
    whole: bool = False
    """Whether all of it has to be in one transaction, however much it is."""


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

    :param hold: whether a chord's header is held back until it can be written down as a whole.
    :param run: writes; by default a transaction of its own for each call.
    """

    def __init__(
        self,
        app: Celery,
        database: Database,
        journal: Journal = Journal.REQUIRED,
        *,
        hold: bool = True,
        run: Callable[[Work], None] | None = None,
    ) -> None:
        self._app = app
        self._journal = journal
        self._hold = hold
        self._run: Callable[[Work], None] = run or database.run

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

    def open(self, opening: Opening) -> None:
        """A chord is about to be published: its header's messages follow on this thread.

        :raises OperationalError: if it has to be written down at once, and cannot be.
        """
        dispatch = _current.get()
        if dispatch is not None:
            dispatch.openings.append(opening)
        elif self._hold:
            _announced.set(Dispatch([opening]))
        else:
            self._write(Dispatch([opening]))

    def opens(self, group_id: str) -> bool:
        """Whether chord ``group_id`` is being opened here and now."""
        dispatch = _current.get() or _announced.get() or Dispatch()
        return group_id in dispatch.opened or any(opening.group_id == group_id for opening in dispatch.openings)

    def publish(self, message: Message, producer: Any) -> None:
        """Publish a message, or hold it back until the dispatch that it belongs to is complete.

        :raises OperationalError: if it cannot be written down.
        """
        dispatch = _current.get()
        if dispatch is None:
            dispatch = _announced.get() or Dispatch()
            _announced.set(None)
            dispatch.messages.append(message)
            self.send(dispatch, producer)
        else:
            dispatch.messages.append(message)
            if len(dispatch.messages) >= AT_ONCE and not dispatch.whole:
                self.send(dispatch, producer)

    @contextmanager
    def together(self, also: Work) -> Iterator[None]:
        """Hold back everything that is published inside; then commit it together with ``also``, and push it.

        Once it is committed nothing raises any more: what cannot be pushed is left to recovery.

        :raises PatchpilotError: if it cannot be committed; or whatever ``also`` raises. Then nothing is pushed.
        """
        dispatch = Dispatch(whole=True)
        token = _current.set(dispatch)
        try:
            yield
        finally:
            _current.reset(token)
        self._run(self._work(dispatch, also))
        if dispatch.messages:
            with self._app.producer_or_acquire() as producer:
                self._push(dispatch, producer, leave=True)

    def send(self, dispatch: Dispatch, producer: Any) -> None:
        """Write a dispatch down and push it. It is empty afterwards, and may be filled again.

        :raises OperationalError: if it cannot be written down. Nothing is pushed then.
        """
        self._write(dispatch)
        self._push(dispatch, producer, leave=get_current_worker_task() is not None)

    def abandon(self, dispatch: Dispatch, error: BaseException) -> None:
        """Publishing raised half-way. What was held back never leaves; its chords are on record as not published."""
        opened, name = [*dispatch.opened], type(error).__name__

        def write(connection: Connection) -> None:
            for opening in dispatch.openings:
                opening.write(connection, publish_error=name)
            connection.execute(queries("chords")["publishing_failed"], {"group_ids": opened, "error": name})

        with suppress(PatchpilotError):
            self._run(write)

    def end(self, message_id: str) -> None:
        """The task of this message has ended."""
        self._forget([message_id])

    # -- writing and pushing ------------------------------------------------------------------------------------

    def _work(self, dispatch: Dispatch, also: Work | None = None) -> Work:
        rows = columns(self._journalled(dispatch.messages))

        def work(connection: Connection) -> None:
            if also is not None:
                also(connection)
            for opening in dispatch.openings:
                opening.write(connection)
            if rows["message_id"]:
                connection.execute(SQL["record"], rows)

        return work

    def _write(self, dispatch: Dispatch) -> None:
        try:
            if dispatch.openings or self._journalled(dispatch.messages):
                self._run(self._work(dispatch))
        except PatchpilotError as error:
            if self._journal is Journal.REQUIRED:
                names = ", ".join(sorted({message.name for message in dispatch.messages})) or "chord"
                raise OperationalError(f"{names} not published: {error}") from error
            logger.warning("Published without a record: %s", error)
        dispatch.opened += [opening.group_id for opening in dispatch.openings]
        dispatch.openings.clear()

    def _push(self, dispatch: Dispatch, producer: Any, *, leave: bool) -> None:
        """Push what is on record.

        :param leave: to recovery, whatever cannot be pushed. For whoever has no caller that could try again: a task
            that has ended must not become a failure because the next one's message could not be pushed.
        """
        messages, dispatch.messages = dispatch.messages, []
        for number, message in enumerate(messages):
            try:
                with producer.connection._reraise_as_library_errors():
                    message.push(producer)
            except Exception as error:
                left = messages[number:]
                if leave and len(self._journalled(left)) == len(left):
                    logger.warning("%d messages from %s on are left to recovery: %r", len(left), message, error)
                    return
                self._withdraw(dispatch, left, error)
                raise

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
        return [it for it in messages if self._journal is not Journal.OFF or it.callback_of]


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
        message = prepare(body, options, _callback_of.get(), self._message_id)
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
