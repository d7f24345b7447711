"""One PostgreSQL connection per process, opened when first needed, reopened when lost.

Workers fork, so a connection belongs to the process that opened it: a child opens its own and leaves its parent's
alone. Nothing here relies on session state (no LISTEN, no advisory locks held between statements, no prepared
statements unless asked for), so a transaction pooler may stand in between.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, LiteralString, Self, TypeVar

import psycopg
from psycopg.rows import DictRow

from patchpilot.clock import SYSTEM, Backoff, Clock
from patchpilot.dsn import MALFORMED, is_readable
from patchpilot.errors import NeedsOperator, Transient
from patchpilot.postgres import session

logger = logging.getLogger(__name__)

T = TypeVar("T")

Connection = session.Connection
Row = DictRow

PATIENCE = 300.0
"""Seconds without an answer after which PostgreSQL counts as away, for whoever does not say: none of our statements
takes that long but migrations."""

QUIET = 2.0
"""Seconds for which nobody connects to a server that has just let somebody wait in vain: the threads of a process take
turns, and the last of many must not wait for as often as there are threads."""

LEAST = 1.0
"""Seconds that PostgreSQL is always given, however short the time of whoever asks."""

# Where PostgreSQL is reachable but will never accept us: class 28 (authorisation), 3D000 (no such database).
_HOPELESS = ("28", "3D")
_REFUSED_WORDS = (
    "authentication failed", "does not exist", "no pg_hba.conf entry", "unrecognized configuration parameter",
)  # fmt: skip
_INVALID = re.compile(r"invalid (?:\w+ )?value")
"""libpq does not take a part of the DSN, or the server one of its settings."""


class _Limit(threading.local):
    """Until when this thread waits for PostgreSQL, or this greenlet."""

    ends_at = math.inf


class Database:
    """The durable record, as one process sees it. Safe to share between threads: they take turns.

    :param dsn: a libpq connection string or URL. Never logged, never part of an error.
    :param budget: how long, in seconds, a lost connection is retried before the caller hears of it.
    :param patience: after how many seconds without an answer a connection counts as lost.
    :param prepare: keep prepared statements on the server, which is faster, and session state: not behind a transaction
        pooler.
    """

    def __init__(
        self,
        dsn: str,
        *,
        budget: float = 10.0,
        patience: float = PATIENCE,
        prepare: bool = False,
        clock: Clock = SYSTEM,
    ) -> None:
        self._dsn = dsn
        self._patience = patience
        self._prepare_after = 2 if prepare else None
        self._budget = budget
        self._clock = clock
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._pid = os.getpid()
        self._gave_up_at: float | None = None
        self._quiet_until = 0.0
        self._limit = _Limit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Inside, this thread hears of a PostgreSQL that is away after about ``seconds``, if not before.

        For budget and patience, and for its turn. Other threads wait as they would.
        """
        outer = self._limit.ends_at
        self._limit.ends_at = min(outer, self._clock.monotonic() + seconds)
        try:
            yield
        finally:
            self._limit.ends_at = outer

    def _left(self) -> float:
        return max(self._limit.ends_at - self._clock.monotonic(), LEAST)

    def run(self, work: Callable[[Connection], T], *, pipelined: bool = False) -> T:
        """Do ``work`` in one transaction, again from the start if the connection is lost on the way.

        ``work`` must therefore be idempotent: a commit whose answer was lost is repeated.

        :param pipelined: wait for answers only where ``work`` fetches rows, and at the end. How many rows a statement
            touched is not known before.
        :raises Transient: PostgreSQL stayed away for the whole budget.
        :raises NeedsOperator: it refuses us, or its schema is not ours.
        """

        def transact(connection: Connection) -> T:
            together = connection.pipeline() if pipelined and psycopg.Pipeline.is_supported() else nullcontext()
            with together, connection.transaction():
                return work(connection)

        return self._persistently(transact)

    def _persistently(self, work: Callable[[Connection], T]) -> T:
        budget = min(self._budget, self._left())
        backoff = Backoff(self._clock, budget)
        told = False
        while True:
            try:
                done = self._in_turn(work)
            except (psycopg.OperationalError, psycopg.InternalError) as error:
                # Internal are a session that leads to a server which was demoted, or has just been promoted, and is
                # read-only; and one that the server ended because a transaction took longer than it allows.
                if _is_hopeless(error):
                    raise NeedsOperator(f"PostgreSQL refuses the connection: {_reason(error)}") from error
                if not told:
                    logger.info("PostgreSQL is away, trying again for %g s: %s", budget, _reason(error))
                    told = True
                if self._is_given_up() or not backoff.pause() or self._clock.monotonic() >= self._limit.ends_at:
                    if budget == self._budget:  # nobody else has to be as hasty as this one
                        self._gave_up_at = self._clock.monotonic()
                    raise Transient(f"PostgreSQL cannot be reached: {_reason(error)}") from error
            except (
                psycopg.errors.UndefinedTable,
                psycopg.errors.UndefinedColumn,
                psycopg.errors.UndefinedFunction,
                psycopg.errors.InvalidSchemaName,
            ) as error:
                raise NeedsOperator("the patchpilot tables are missing or old: run `patchpilot db migrate`") from error
            else:
                self._gave_up_at = None
                return done

    def _is_given_up(self) -> bool:
        """Whether somebody has waited for the whole budget a moment ago: whoever calls again and again, as Celery does
        for a message that could not be published, is told at once, or its budget would be many times ours."""
        return self._gave_up_at is not None and self._clock.monotonic() < self._gave_up_at + self._budget

    def fetch(self, sql: LiteralString, params: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
        """Run one statement, a transaction by itself, and return its rows. Idempotent ones only, as for :meth:`run`."""
        return self._persistently(lambda connection: _rows(connection, sql, params))

    def execute(self, sql: LiteralString, params: Sequence[Any] | dict[str, Any] = ()) -> int:
        """Run one statement, likewise, and return how many rows it touched."""
        return self._persistently(lambda connection: connection.execute(sql, params).rowcount)

    def close(self) -> None:
        """Close this process's connection; the next statement opens a new one."""
        with self._lock:
            if self._pid == os.getpid():
                self._drop()

    def _in_turn(self, work: Callable[[Connection], T]) -> T:
        """Do ``work`` on the connection of this process, when it is the turn of this thread."""
        if self._pid != os.getpid():
            self._after_fork()
        lock, left = self._lock, self._left()
        try:
            if not lock.acquire(timeout=-1 if math.isinf(left) else left):
                raise psycopg.OperationalError("other threads wait for it")
            return self._on_ours(work)
        finally:
            # A signal, that of a soft time limit for one, may raise after any call: so there is none between acquiring
            # and `try`, nor between that and releasing, and what is not ours is no error here.
            try:  # noqa: SIM105 - `suppress` is a call
                lock.release()
            except RuntimeError:
                pass

    def _on_ours(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None or self._connection.closed:
            self._connection = self._connected()
        self._connection.patience = min(self._patience, self._left())
        try:
            return work(self._connection)
        except (psycopg.OperationalError, psycopg.InternalError):
            self._drop()
            raise

    def _connected(self) -> Connection:
        if not is_readable(self._dsn):
            raise NeedsOperator(f"the PostgreSQL DSN {MALFORMED}")
        if self._clock.monotonic() < self._quiet_until:
            raise psycopg.OperationalError("it did not answer a moment ago")
        try:
            return session.connect(
                self._dsn, timeout=self._left(), prepare_threshold=self._prepare_after, clock=self._clock
            )
        except psycopg.errors.ConnectionTimeout:
            self._quiet_until = self._clock.monotonic() + QUIET
            raise

    def _after_fork(self) -> None:
        # Only reached in a child that has not used the database yet. The parent's connection is kept, unused, so that
        # nothing here says goodbye on the parent's socket; its lock may be held by a thread that was not forked.
        self._inherited = self._connection
        self._lock = threading.RLock()
        self._connection = None
        self._pid = os.getpid()

    def _drop(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()


_databases: dict[str, Database] = {}
_databases_lock = threading.Lock()


def database(dsn: str, *, budget: float = 10.0, patience: float = PATIENCE, prepare: bool = False) -> Database:
    """The process-wide :class:`Database` for ``dsn``. What the first caller asks for stands."""
    with _databases_lock:
        return _databases.setdefault(dsn, Database(dsn, budget=budget, patience=patience, prepare=prepare))


def _rows(connection: Connection, sql: LiteralString, params: Sequence[Any] | dict[str, Any]) -> list[Row]:
    cursor = connection.execute(sql, params)
    return cursor.fetchall() if cursor.description is not None else []


def _is_hopeless(error: psycopg.Error) -> bool:
    if error.sqlstate is not None:
        return error.sqlstate.startswith(_HOPELESS)
    # libpq gives no SQLSTATE for a refused log-in.
    text = str(error)
    return any(words in text for words in _REFUSED_WORDS) or _INVALID.search(text) is not None


def _reason(error: Exception) -> str:
    """The first line of the driver's message, which names the server but never the password."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].removeprefix("connection failed: ") if lines else type(error).__name__
