"""Evidence: what PostgreSQL, the broker and the workers know. Reads only, and decides nothing.

A message changes hands all the time: from the outbox to a queue, to a worker, to its end. So that one that is between
two hands is not taken for lost, the order matters: the outbox first, then the broker, then the workers, then the
broker and the outbox again. What was in nobody's hands in both looks, and is still in the outbox, is nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from celery import Celery

from patchpilot.backend.holdings import COMMAND
from patchpilot.clock import Clock
from patchpilot.postgres.connection import Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.findings import Window
from patchpilot.valkey.broker import Broker
from patchpilot.workers.asking import Asking

SQL = queries("recovery")

INTERRUPTED_AFTER = timedelta(seconds=10)
"""A worker stores a task's result and then returns its part. If that takes longer than this, it was interrupted."""


class Where(StrEnum):
    """In whose hands a message is."""

    QUEUED = "queued"
    HELD = "held"
    """A living worker has it."""
    ABANDONED = "abandoned"
    """Taken by a worker that no longer has it: the broker gives it back after the visibility timeout."""
    NOWHERE = "nowhere"
    UNKNOWN = "unknown"
    """In nobody's hands that answered, but a worker that is alive did not answer."""
    ENDED = "ended"
    """Its task has ended; only the outbox does not know."""


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


@dataclass(frozen=True)
class Evidence:
    """All that was found."""

    chords: tuple[Chord, ...]
    messages: tuple[Message, ...]
    answered: frozenset[str] = frozenset()
    """Workers that answered."""
    silent: frozenset[str] = frozenset()
    """Workers that are alive and did not answer."""


class Collector:
    """Collects evidence from one site.

    :param stale: a worker that gave no sign of life for this long counts as dead.
    """

    def __init__(self, database: Database, broker: Broker, app: Celery, clock: Clock, stale: timedelta) -> None:
        self._database = database
        self._broker = broker
        self._app = app
        self._clock = clock
        self._stale = stale

    def collect(self, window: Window, *, assume_lost: bool = False) -> Evidence:
        """Look at everything in ``window``.

        :param assume_lost: workers that are alive and do not answer hold nothing.
        :raises Transient: if PostgreSQL or the broker cannot be read.
        """
        self._broker.check()
        names = self._broker.names()
        span = {"min_age": window.min_age, "max_age": window.max_age, "brokers": sorted(names)}
        asked = {**span, "interrupted_after": INTERRUPTED_AFTER}
        chords = tuple(_chord(row) for row in self._database.fetch(SQL["open_chords"], asked))
        rows = self._database.fetch(SQL["messages"], span)
        messages, answered, silent = self._locate(rows, assume_lost, names)
        return Evidence(chords, messages, answered, silent)

    def _locate(
        self, rows: list[Row], assume_lost: bool, names: frozenset[str]
    ) -> tuple[tuple[Message, ...], frozenset[str], frozenset[str]]:
        if not rows:
            return (), frozenset(), frozenset()
        first = self._holdings(rows)
        unseen = [row for row in rows if row["message_id"] not in first.queued and not row["ended"]]
        if not unseen:
            return tuple(_message(row, _settled(row), None) for row in rows), frozenset(), frozenset()
        held, answered, silent = self._ask({row["message_id"] for row in unseen}, names)
        second = self._holdings(rows)
        still = self._still_there(unseen)
        found = []
        for row in rows:
            key = row["message_id"]
            tag = second.unacked.get(key)
            if row["ended"] or key in first.queued or key in second.queued:
                where = _settled(row)
            elif key in held or row["running"] or key not in still:
                where = Where.HELD
            elif (key in first.unacked) != (key in second.unacked):
                where = Where.HELD  # it moved between the two looks, so somebody is at it
            elif silent and not assume_lost:
                where = Where.UNKNOWN
            else:
                where = Where.ABANDONED if tag else Where.NOWHERE
            found.append(_message(row, where, tag))
        return tuple(found), answered, silent

    def _holdings(self, rows: Iterable[Row]) -> Any:
        queues = {row["queue"] or row["routing_key"] for row in rows}
        return self._broker.holdings(queues, {row["exchange"] for row in rows if row["exchange"]})

    def _still_there(self, rows: list[Row]) -> set[str]:
        params = {"message_ids": [row["message_id"] for row in rows], "resends": [row["resends"] for row in rows]}
        return {row["message_id"] for row in self._database.fetch(SQL["still_there"], params)}

    def _ask(self, message_ids: set[str], names: frozenset[str]) -> tuple[set[str], frozenset[str], frozenset[str]]:
        """Which of these messages some worker has, which workers answered, and which are alive and did not."""
        asking = Asking(self._database, self._app, self._clock, self._stale, names)
        answers = asking.ask(COMMAND, {"message_ids": sorted(message_ids)})
        held = {message_id for answer in answers.by_instance.values() for message_id in answer["held"]}
        return held, frozenset(answers.by_instance), frozenset(answers.silent)


def _settled(row: Row) -> Where:
    return Where.ENDED if row["ended"] else Where.QUEUED


def _chord(row: Row) -> Chord:
    names = (
        "group_id", "age", "total", "returned", "ended", "inner_chords", "messages", "claimed", "claim_live",
        "publish_error", "failed", "counting", "unrecoverable", "shadow",
    )  # fmt: skip
    return Chord(callback=row["callback_name"], **{name: row[name] for name in names})


def _message(row: Row, where: Where, tag: str | None) -> Message:
    names = ("message_id", "task_id", "task_name", "group_id", "callback_of", "age", "resends", "sent_at", "shadow")
    return Message(where=where, expired=bool(row["expired"]), tag=tag, **{name: row[name] for name in names})
