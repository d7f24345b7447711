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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery._state import get_current_worker_task
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError, OperationalError
from redis.exceptions import RedisError

from patchpilot.backend.config import CANARY, Journal
from patchpilot.backend.dispatch import AT_ONCE, Dispatch, Opening, Work, announced, current, merged, write_down
from patchpilot.backend.identity import Identity
from patchpilot.backend.message import Message, Part, columns
from patchpilot.backend.producing import Journalling, Publishing
from patchpilot.clock import SYSTEM
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("outbox")

SLOW = 2.0
"""Seconds after which whoever pushes says that more is to come, again and again."""

# What a broker that is away raises. Anything else (an unknown compression, a soft time limit) is the caller's to hear.
_AWAY = (OperationalError, RedisError, OSError)


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
            return send(Journalling(producer, self), name, message, **options)

        def producer_or_acquire(producer: Any = None) -> Any:
            # Whoever publishes a group asks for a producer first: what was announced a moment ago begins here.
            dispatch = announced.get()
            announced.set(None)
            return acquire(producer) if dispatch is None else Publishing(self, dispatch, acquire(producer))

        send_task_message.patchpilot = True  # type: ignore[attr-defined]
        self._app.amqp.send_task_message = send_task_message
        self._app.producer_or_acquire = producer_or_acquire

    # -- what happens to a dispatch -----------------------------------------------------------------------------

    def open(self, opening: Opening, *, at_once: bool = True) -> None:
        """A chord is about to be published: its header's messages follow on this thread.

        :param at_once: hold them until all are there. Those of a generator are sent as they come.
        :raises OperationalError: if it has to be written down at once, and cannot be.
        """
        dispatch = current.get()
        if dispatch is not None:
            dispatch.openings.append(opening)
        elif self._shadow:
            self._write(Dispatch([opening]), ())
        else:
            announced.set(Dispatch([opening], at_once=AT_ONCE if at_once else 1))

    def opens(self, group_id: str) -> bool:
        """Whether chord ``group_id`` is being opened here and now."""
        dispatch = current.get() or announced.get() or Dispatch()
        return group_id in dispatch.opened or self.opening(group_id) is not None

    @staticmethod
    def opening(group_id: str) -> Opening | None:
        """Chord ``group_id``, if it is being opened here and now and is not on record yet."""
        dispatch = current.get() or announced.get() or Dispatch()
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
        dispatch = current.get()
        if dispatch is None:
            dispatch = announced.get() or Dispatch()
            announced.set(None)
            dispatch.hold(message)
            self.send(dispatch, producer)
        elif dispatch.hold(message):
            self.send(dispatch, producer)

    @staticmethod
    @contextmanager
    def collect() -> Iterator[Dispatch]:
        """Hold back everything that is published inside: :meth:`deliver` it."""
        dispatch = Dispatch(at_once=math.inf)
        token = current.set(dispatch)
        try:
            yield dispatch
        finally:
            current.reset(token)

    def deliver(self, dispatches: Mapping[str, Dispatch], claim: Callable[[Connection], Iterable[str]]) -> set[str]:
        """Commit those dispatches that ``claim`` says are ours, all in one transaction with it, and push them.

        Once they are committed nothing takes them back: whatever cannot be pushed then is left to recovery.

        :returns: which were ours.
        :raises PatchpilotError: if nothing could be committed. Nothing is pushed then.
        :raises SoftTimeLimitExceeded: if it struck meanwhile. What was committed was seen to all the same.
        """

        def work(connection: Connection) -> set[str]:
            ours = set(claim(connection))
            whole = merged(dispatches, ours)
            self._work(whole.openings, whole.messages)(connection)
            return ours

        ours = self._database.run(work, pipelined=True)
        messages = merged(dispatches, ours).messages
        if messages:
            with self._app.producer_or_acquire() as producer:
                self._push_or_leave(messages, producer)
        return ours

    def send(self, dispatch: Dispatch, producer: Any) -> None:
        """Write a dispatch down and push it. It is empty afterwards, and may be filled again.

        Whoever hears that this failed may try again, so nobody else must push the rest. But in a task, what only a
        broker that is away keeps from being pushed is left to recovery: a task that has succeeded must not become a
        failure because the next one's message could not be pushed.

        :raises OperationalError: if it cannot be written down. Nothing is pushed then.
        """
        messages = dispatch.take()
        on_record = self._write(dispatch, messages)
        left = deque(messages)
        try:
            for message in self._in_turn(left):
                self._push(message, producer)
        except BaseException as error:
            in_task = on_record and get_current_worker_task() is not None
            if not (in_task and isinstance(error, _AWAY) and len(self._journalled(left)) == len(left)):
                self._withdraw(dispatch, left, error)
                raise
            self._leave(left, error)
        else:
            self._note_broker(messages, producer)

    def abandon(self, dispatch: Dispatch, error: BaseException) -> None:
        """Publishing raised half-way. What was held back never leaves; its chords are on record as not published."""
        openings, opened, name = tuple(dispatch.openings), [*dispatch.opened], type(error).__name__

        def write(connection: Connection) -> None:
            write_down(connection, openings, publish_error=name)
            connection.execute(queries("chords")["publishing_failed"], {"group_ids": opened, "error": name})

        with suppress(PatchpilotError):
            self._run(write)

    def end(self, message_id: str) -> None:
        """The task of this message has ended."""
        self._forget([message_id])

    # -- writing and pushing ------------------------------------------------------------------------------------

    def _work(self, openings: Iterable[Opening], messages: Sequence[Message]) -> Work:
        chords, rows = tuple(openings), columns(self._journalled(messages))
        parts = [message.part for message in messages if message.part is not None]

        def work(connection: Connection) -> None:
            write_down(connection, chords)
            for part in parts:
                self.foresee(connection, part)
            if rows["message_id"]:
                connection.execute(SQL["record"], {**rows, "shadow": self._shadow})

        return work

    def _write(self, dispatch: Dispatch, messages: Sequence[Message]) -> bool:
        """Write these messages of a dispatch down, and the chords that it opens. Whether recovery may send them then:
        it only watches what is in shadow mode."""
        written = True
        try:
            if dispatch.openings or messages:
                self._run(self._work(dispatch.openings, messages))
        except PatchpilotError as error:
            if self._journal is Journal.REQUIRED or dispatch.openings:  # half a chord's protection is none
                names = ", ".join(sorted({message.name for message in messages})) or "chord"
                raise OperationalError(f"{names} not published: {error}") from error
            logger.warning("Published without a record: %s", error)
            written = False
        except BaseException as error:  # interrupted: it may have been committed
            self._withdraw(dispatch, messages, error)
            raise
        dispatch.opened += [opening.group_id for opening in dispatch.openings]
        dispatch.openings.clear()
        return written and not self._shadow

    def _push_or_leave(self, messages: Sequence[Message], producer: Any) -> None:
        """Push messages that are on record for good.

        :raises SoftTimeLimitExceeded: if it struck meanwhile. It strikes once, so the others are pushed.
        """
        left, struck, away = deque(messages), None, False
        while left and not away:
            try:
                for message in self._in_turn(left):
                    try:
                        self._push(message, producer)
                    except _AWAY as error:
                        self._leave(left, error)
                        away = True
                        break
                    except SoftTimeLimitExceeded as error:
                        self._leave([message], error)
                        struck = error
                    except Exception as error:  # noqa: BLE001 - it must not keep the others from being pushed
                        self._leave([message], error)
            except SoftTimeLimitExceeded as error:  # while it was said that this goes on
                struck = error
        if not away:
            self._note_broker(messages, producer)
        if struck is not None:
            raise struck

    def _in_turn(self, left: deque[Message]) -> Iterator[Message]:
        """Each message, until the next one is asked for. If that takes long, it is said again and again that it goes
        on: recovery would take for lost what is not pushed yet."""
        said = SYSTEM.monotonic()
        while left:
            if SYSTEM.monotonic() - said > SLOW:
                self._go_on([message.id for message in left])
                said = SYSTEM.monotonic()
            yield left[0]
            left.popleft()

    def _go_on(self, message_ids: Sequence[str]) -> None:
        with suppress(PatchpilotError), self._database.within(SLOW):
            self._run(lambda connection: connection.execute(SQL["going_on"], {"message_ids": message_ids}))

    @staticmethod
    def _push(message: Message, producer: Any) -> None:
        with producer.connection._reraise_as_library_errors():
            message.push(producer)

    def _note_broker(self, messages: Iterable[Message], producer: Any) -> None:
        if self._journalled(messages):
            self.identity.leave(producer.connection, producer.channel)

    def _leave(self, left: Sequence[Message], error: BaseException) -> None:
        chords = sorted({it.callback_of for it in left if it.callback_of})
        logger.warning(
            "%d messages from %s on are left to recovery%s: %r",
            len(left), left[0], f", callbacks of chords {', '.join(chords)}" if chords else "", error,
        )  # fmt: skip
        if gone := [str(message) for message in left if message.to_all]:
            logger.error("Lost, for nobody can send again what goes to all who listen: %s", ", ".join(gone))

    def _withdraw(self, dispatch: Dispatch, left: Sequence[Message], error: BaseException) -> None:
        """The caller is told that publishing failed, so nobody must publish these, or finish their chord, later."""
        logger.warning("Publishing %s failed: %r", left[0] if left else "a chord", error)
        opened = [*dispatch.opened, *(opening.group_id for opening in dispatch.openings)]
        chords = {*opened, *(message.group_id for message in left if message.group_id)}
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
