"""One PostgreSQL connection per process, opened when first needed, reopened when lost.

Workers fork, so a connection belongs to the process that opened it: a child opens its own and leaves its parent's
alone. Nothing here relies on session state (no LISTEN, no advisory locks held between statements, no prepared
statements unless asked for), so a transaction pooler may stand in between.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, LiteralString, Self, TypeVar

import psycopg
from psycopg.rows import DictRow, dict_row

from patchpilot.clock import SYSTEM, Backoff, Clock
from patchpilot.dsn import MALFORMED, is_readable
from patchpilot.errors import NeedsOperator, Transient

logger = logging.getLogger(__name__)

T = TypeVar("T")

Connection = psycopg.Connection[DictRow]
Row = DictRow

CONNECT_TIMEOUT = 5
"""Seconds one attempt to connect may take."""

# Where PostgreSQL is reachable but will never accept us: class 28 (authorisation), 3D000 (no such database).
_HOPELESS = ("28", "3D")
_REFUSED_WORDS = (
    "authentication failed", "does not exist", "no pg_hba.conf entry", "unrecognized configuration parameter",
)  # fmt: skip
_INVALID = re.compile(r"invalid (?:\w+ )?value")
"""libpq does not take a part of the DSN, or the server one of its settings."""


class Database:
    """The durable record, as one process sees it. Safe to share between threads: they take turns.

    :param dsn: a libpq connection string or URL. Never logged, never part of an error.
    :param budget: how long, in seconds, a lost connection is retried before the caller hears of it.
    :param prepare: keep prepared statements on the server, which is faster, and session state: not behind a transaction
        pooler.
    """

    def __init__(self, dsn: str, *, budget: float = 10.0, prepare: bool = False, clock: Clock = SYSTEM) -> None:
        self._dsn = dsn
        self._prepare_after = 2 if prepare else None
        self._budget = budget
        self._clock = clock
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._pid = os.getpid()
        self._gave_up_at: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        backoff = Backoff(self._clock, self._budget)
        told = False
        while True:
            try:
                with self._ours() as connection:
                    done = work(connection)
                    self._gave_up_at = None
                    return done
            except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction) as error:
                # Read-only: this session leads to a server that was demoted, or has just been promoted.
                self._drop()
                if _is_hopeless(error):
                    raise NeedsOperator(f"PostgreSQL refuses the connection: {_reason(error)}") from error
                if not told:
                    logger.info("PostgreSQL is away, trying again for %g s: %s", self._budget, _reason(error))
                    told = True
                if self._is_given_up() or not backoff.pause():
                    self._gave_up_at = self._clock.monotonic()
                    raise Transient(f"PostgreSQL cannot be reached: {_reason(error)}") from error
            except (
                psycopg.errors.UndefinedTable,
                psycopg.errors.UndefinedColumn,
                psycopg.errors.UndefinedFunction,
                psycopg.errors.InvalidSchemaName,
            ) as error:
                raise NeedsOperator("the patchpilot tables are missing or old: run `patchpilot db migrate`") from error

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

    @contextmanager
    def _ours(self) -> Iterator[Connection]:
        if self._pid != os.getpid():
            self._after_fork()
        with self._lock:
            if self._connection is None or self._connection.closed:
                self._connection = self._connected()
            yield self._connection

    def _connected(self) -> Connection:
        if not is_readable(self._dsn):
            raise NeedsOperator(f"the PostgreSQL DSN {MALFORMED}")
        return psycopg.connect(
            self._dsn,
            row_factory=dict_row,
            connect_timeout=CONNECT_TIMEOUT,
            prepare_threshold=self._prepare_after,
            autocommit=True,
            application_name="patchpilot",
        )

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


def database(dsn: str, *, budget: float = 10.0, prepare: bool = False) -> Database:
    """The process-wide :class:`Database` for ``dsn``. What the first caller asks for stands."""
    with _databases_lock:
        return _databases.setdefault(dsn, Database(dsn, budget=budget, prepare=prepare))


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
