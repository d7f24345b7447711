"""Evidence: what PostgreSQL, the broker and the workers know. Reads only, and decides nothing.

A message changes hands all the time: from the outbox to a queue, to a worker, to its end. So that one that is between
two hands is not taken for lost, the order matters: the outbox first, then the broker, then the workers, then the
broker and the outbox again. What was in nobody's hands in both looks, and is still in the outbox, is nowhere.

Why two looks are enough: between two hands a message is for as long as one reply travels. It is longer in two places,
and both are asked. A reply that a worker has not read stays in its socket, where the worker looks when it is asked; and
a chord that is complete is finished by the worker of its last part, which runs that part's task until it has done so.
What a producer has written down and not yet pushed is in no hands at all. While it pushes, the messages of its dispatch
appear one by one; a producer that has stopped to do so is told from one that died only by the window's age. A message
that was acknowledged when its task began is with neither broker nor producer, so workers say since when it runs; one
whose task has ended as well was at work just now, whenever it was pushed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from celery import Celery

from patchpilot.clock import Clock
from patchpilot.postgres.connection import Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.findings import Window
from patchpilot.recovery.hands import Hands, ask, queues_of
from patchpilot.recovery.quiet import Outside
from patchpilot.valkey.broker import Broker, Holdings
from patchpilot.workers.asking import Asking
from patchpilot.workers.contact import Contact

SQL = queries("recovery")

INTERRUPTED_AFTER = timedelta(seconds=10)
"""A worker stores a task's result and then returns its part. If that takes longer than this, it was interrupted."""

RESENDS = 5
"""What was sent again so often is not lost by chance: a worker takes it, and drops it."""

PATIENCE = timedelta(minutes=1)
"""How long a chord that is complete is left to a worker that does not answer."""


class Where(StrEnum):
    """In whose hands a message is."""

    QUEUED = "queued"
    HELD = "held"
    """A living worker has it."""
    ABANDONED = "abandoned"
    """Taken by a worker that no longer has it: the broker gives it back after the visibility timeout."""
    NOWHERE = "nowhere"
    UNKNOWN = "unknown"
    """In nobody's hands that answered, but somebody did not, or cannot tell."""
    REVOKED = "revoked"
    """Nowhere, and somebody revoked its task."""
    ENDED = "ended"
    """Its task has ended; only the outbox does not know."""


LOST = (Where.ABANDONED, Where.NOWHERE, Where.REVOKED)
"""What may be done about a message depends on that it is in no queue."""


@dataclass(frozen=True)
class Message:
    """One task message of the outbox, and where it is."""

    message_id: str
    task_id: str
    task_name: str
    group_id: str | None
    callback_of: str | None
    where: Where
    age: timedelta
    expired: bool
    resends: int
    sent_at: datetime
    tag: str | None = None
    """Its delivery tag, if it is unacknowledged."""
    shadow: bool = False
    """It was only watched."""
    awaited: bool = False
    """Its task is a part of its chord that has not returned: not the beginning of a chain that ends in one."""
    taken: float | None = None
    """When it was taken, by the clock of whoever did, if it is unacknowledged."""
    exchange: str = ""
    routing_key: str = ""
    refused: bool = False
    """It was sent again and again, and there is no sign that a worker ever began with it."""

    @property
    def dead(self) -> bool:
        """If it is lost: it is not sent again."""
        return self.expired or self.where is Where.REVOKED


@dataclass(frozen=True)
class Chord:
    """One chord whose callback is not out yet."""

    group_id: str
    callback: str
    age: timedelta
    total: int
    returned: int
    ended: int
    """Parts still to come whose task has ended."""
    inner_chords: int
    """Parts still to come that are the callback of another open chord."""
    messages: int
    """Messages of the header in the outbox."""
    claimed: bool
    claim_live: bool
    publish_error: str | None
    failed: int = 0
    """Of the parts that returned."""
    counting: str = "postgres"
    unrecoverable: str | None = None
    """Why its callback is not on record."""
    shadow: bool = False
    """It was only watched: Celery's own backend counts and dispatches it."""
    finishing: bool = False
    """A worker is at it: it runs the task whose part came last, or whose end is on record and whose part is not."""


@dataclass(frozen=True)
class Evidence:
    """All that was found."""

    chords: tuple[Chord, ...]
    messages: tuple[Message, ...]
    doubts: tuple[str, ...] = ()
    """Who may have something and has not said so, and why."""
    outside: Outside = field(default_factory=Outside)
    """Open chords that were not looked at."""
    messages_outside: Outside = field(default_factory=Outside)
    """Messages that were not looked at."""


class Collector:
    """Collects evidence from one site.

    :param stale: a worker that gave no sign of life for this long counts as dead, if it had the time to.
    :param contact: ours with PostgreSQL, which tells whether it had.
    """

    def __init__(
        self, database: Database, broker: Broker, app: Celery, clock: Clock, stale: timedelta, contact: Contact
    ) -> None:
        self._database = database
        self._broker = broker
        self._app = app
        self._clock = clock
        self._stale = stale
        self._contact = contact

    def collect(self, window: Window, *, assume_lost: bool = False) -> Evidence:
        """Look at everything in ``window``.

        :param assume_lost: workers that are alive and do not answer hold nothing, and none refuses anything.
        :raises NeedsOperator: if the broker's queues are not called as we call them.
        :raises Transient: if PostgreSQL or the broker cannot be read.
        """
        self._broker.check()
        names = self._broker.names()
        span: dict[str, Any] = {"min_age": window.min_age, "max_age": window.max_age, "brokers": sorted(names)}
        asked = {**span, "interrupted_after": INTERRUPTED_AFTER}
        found = self._database.fetch(SQL["open_chords"], asked)
        chords = tuple(_chord(row) for row in found if row["group_id"] is not None)
        span["group_ids"] = [it.group_id for it in chords]
        listed = self._database.fetch(SQL["messages"], span)
        rows = [row for row in listed if row["message_id"] is not None]
        outside = _outside(found), _outside(listed)
        at_the_end = self._at_the_end(chords)
        looked_at = self._clock.monotonic()
        first = self._holdings(rows)
        unseen = [row for row in rows if row["message_id"] not in first.queued and not row["ended"]]
        if not unseen and not at_the_end:
            seen = tuple(_message(row, _settled(row)) for row in rows)
            return Evidence(chords, seen, outside=outside[0], messages_outside=outside[1])
        hands = self._ask(unseen, at_the_end, names)
        begun = {key for key, age in hands.began.items() if age <= self._clock.monotonic() - looked_at}
        messages = self._locate(rows, unseen, first, hands, begun, assume_lost)
        chords = tuple(replace(it, finishing=_finishing(it, at_the_end, hands, assume_lost)) for it in chords)
        return Evidence(chords, messages, hands.doubts, *outside)

    def _locate(
        self, rows: list[Row], unseen: list[Row], first: Holdings, hands: Hands, begun: set[str], assume_lost: bool
    ) -> tuple[Message, ...]:
        second = self._holdings(rows) if unseen else first
        still = self._still_there(unseen) if unseen else set()
        ended = {row["message_id"] for row in unseen} - still
        appeared = {*second.queued, *second.unacked, *begun, *ended} - {*first.queued, *first.unacked}
        pushing = {_dispatch(row) for row in unseen if row["message_id"] in appeared}
        found = []
        for row in rows:
            key = row["message_id"]
            if row["ended"] or key in first.queued or key in second.queued:
                where = _settled(row)
            elif key in hands.messages or row["task_id"] in hands.tasks or row["running"] or key not in still:
                where = Where.HELD
            elif first.taken.get(key) != second.taken.get(key) or (key in first.unacked) != (key in second.unacked):
                where = Where.HELD  # it moved between the two looks, so somebody is at it
            elif _dispatch(row) in pushing:
                where = Where.HELD  # its producer is at it: others of its dispatch have just been pushed
            elif hands.may_have(row) and not assume_lost:
                where = Where.UNKNOWN
            elif key in second.unacked:
                where = Where.ABANDONED
            else:
                where = Where.REVOKED if row["task_id"] in hands.revoked else Where.NOWHERE
            refused = row["pushes"] >= RESENDS and not row["started"] and not assume_lost
            found.append(replace(_message(row, where, second), refused=refused))
        lost = [row for row, it in zip(rows, found, strict=True) if it.where in LOST]
        if lost:
            queues = {queue for row in lost for queue in queues_of(row)}
            self._broker.check_layout(queues, {row["exchange"] for row in lost if row["exchange"]})
        return tuple(found)

    def _at_the_end(self, chords: Iterable[Chord]) -> dict[str, set[str]]:
        """Chords that a worker may be finishing right now: group id -> the tasks that it would be running. Also under a
        claim whose lease is over: errbacks are called before the chord is, and may take long."""
        asked = [it.group_id for it in chords if not it.claim_live and (it.returned == it.total or it.ended)]
        found: dict[str, set[str]] = {}
        for row in self._database.fetch(SQL["last_parts"], {"group_ids": asked}) if asked else ():
            found.setdefault(row["group_id"], set()).add(row["task_id"])
        return found

    def _holdings(self, rows: Iterable[Row]) -> Holdings:
        queues = {queue for row in rows for queue in queues_of(row)}
        if not queues:
            return Holdings(frozenset(), {})
        return self._broker.holdings(queues, {row["exchange"] for row in rows if row["exchange"]})

    def _still_there(self, rows: list[Row]) -> set[str]:
        params: dict[str, list[Any]] = {"message_ids": [row["message_id"] for row in rows]}
        params |= {name: [row[name] for row in rows] for name in ("resends", "sent_at")}
        return {row["message_id"] for row in self._database.fetch(SQL["still_there"], params)}

    def _ask(self, unseen: Iterable[Row], at_the_end: Mapping[str, set[str]], names: frozenset[str]) -> Hands:
        asking = Asking(self._database, self._app, self._clock, self._stale, names, self._contact)
        message_ids = {row["message_id"] for row in unseen}
        task_ids = {row["task_id"] for row in unseen}.union(*at_the_end.values())
        return ask(asking, message_ids, task_ids)


def _outside(rows: list[Row]) -> Outside:
    return Outside(rows[0]["young"], rows[0]["old"])


def _dispatch(row: Row) -> datetime:
    """What was written down at once, in one transaction, is sent by one process, one after the other: a header with
    those nested in it, the messages of a callback that is a group, what a recovery sends again."""
    sent_at: datetime = row["sent_at"]
    return sent_at


def _finishing(chord: Chord, at_the_end: Mapping[str, set[str]], hands: Hands, assume_lost: bool) -> bool:
    tasks = at_the_end.get(chord.group_id)
    if tasks is None:
        return False
    if tasks & hands.active:
        return True
    if assume_lost:
        return False
    # Whoever has claimed it may be calling its errbacks, and nothing keeps those from being called twice: one that
    # lives and does not answer is waited for. Without a claim only for a while: then it cannot dispatch it as well.
    return bool(chord.claimed and hands.silent) or (not hands.complete and chord.age < PATIENCE)


def _settled(row: Row) -> Where:
    return Where.ENDED if row["ended"] else Where.QUEUED


def _chord(row: Row) -> Chord:
    names = (
        "group_id", "age", "total", "returned", "ended", "inner_chords", "messages", "claimed", "claim_live",
        "publish_error", "failed", "counting", "unrecoverable", "shadow",
    )  # fmt: skip
    return Chord(callback=row["callback_name"], **{name: row[name] for name in names})


def _message(row: Row, where: Where, holdings: Holdings | None = None) -> Message:
    names = (
        "message_id", "task_id", "task_name", "group_id", "callback_of", "age", "resends", "sent_at", "shadow",
        "awaited", "exchange", "routing_key",
    )  # fmt: skip
    key = row["message_id"]
    tag, taken = (holdings.unacked.get(key), holdings.taken.get(key)) if holdings else (None, None)
    return Message(
        where=where, expired=bool(row["expired"]), tag=tag, taken=taken, **{name: row[name] for name in names}
    )
