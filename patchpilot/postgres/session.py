"""A session with PostgreSQL that does not wait for ever.

A server can take connections and statements and never answer: it is stopped, or its host is frozen behind a proxy that
lives. To the kernel all is well then, so it is up to us to stop waiting. A peer that is gone without a word is the
kernel's to notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from selectors import DefaultSelector
from types import TracebackType
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row

from patchpilot.clock import SYSTEM, Clock

T = TypeVar("T")

CONNECT_TIMEOUT = 5
"""Seconds one attempt to connect may take."""

# Without these the kernel waits two hours on an idle connection, and a quarter of an hour for an acknowledgement.
_KERNEL = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
"""Of libpq, in seconds, but the last one in milliseconds: a peer that is gone is noticed after about 30 s."""


AT_ONCE = 0.05
"""Seconds in which psycopg does not ask without a reason: it does ten times a second."""


class Pipeline(psycopg.Pipeline):
    """As psycopg's, but quiet: that logs another error for each pipeline it leaves because the session is over."""

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        if exc_val is not None and _ends(exc_val):
            self._conn.close()
        if exc_val is not None and self._conn.closed:
            self._exit(exc_val)
        else:
            super().__exit__(exc_type, exc_val, exc_tb)


def _ends(error: BaseException) -> bool:
    """Whether the server says that it ends the session: class 57P, it shuts down."""
    return isinstance(error, psycopg.OperationalError) and (error.sqlstate or "").startswith("57P")


class Connection(psycopg.Connection[DictRow]):
    """One session.

    :ivar patience: after how many seconds without a word from the server an answer is not waited for any longer.
    """

    patience: float = math.inf
    clock: Clock = SYSTEM

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """As psycopg waits for everything.

        :raises OperationalError: the server is silent. The connection is closed then.
        """
        return super().wait(impatient(gen, self.patience, self.clock, self._arrived, self.close), *args, **kwargs)

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        """As psycopg's, of our own kind."""
        if self._pipeline is None and not self.closed:
            self._pipeline = Pipeline(self)
        with super().pipeline() as pipeline:
            yield pipeline

    def _arrived(self, wants: int) -> bool:
        with DefaultSelector() as selector:
            selector.register(self.pgconn.socket, wants)
            return bool(selector.select(0))

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Inside, wait for as long as it takes."""
        patience, self.patience = self.patience, math.inf
        try:
            yield
        finally:
            self.patience = patience


def impatient(
    gen: PQGen[T], patience: float, clock: Clock, arrived: Callable[[int], bool], give_up: Callable[[], None]
) -> PQGen[T]:
    """``gen``, which psycopg asks when something arrived, and some times a second when nothing did; with an end.

    :param patience: seconds without anything.
    :param arrived: whether something has arrived, of what is waited for: in old versions psycopg always says so.
    :param give_up: called at that end.
    :raises OperationalError: at that end.
    """
    try:
        wants = next(gen)
        heard = asked = clock.monotonic()
        while True:
            ready = yield wants
            before, asked = asked, clock.monotonic()
            if ready and (asked - before < AT_ONCE or arrived(wants)):
                heard = asked
            elif asked - heard >= patience:
                give_up()  # not even a cancellation would be answered
                raise psycopg.OperationalError(f"no answer for {patience:g} s")
            wants = gen.send(ready)
    except StopIteration as end:
        done: T = end.value
        return done


def connect(dsn: str, *, timeout: float, prepare_threshold: int | None, clock: Clock) -> Connection:
    """Open a session.

    :param timeout: seconds that one attempt may take, if it is less than :data:`CONNECT_TIMEOUT`. libpq knows whole
        ones, and takes two at least.
    :raises OperationalError: there is none to be had.
    """
    given = conninfo_to_dict(dsn)
    kernel: dict[str, Any] = (
        {} if "service" in given else {key: value for key, value in _KERNEL.items() if key not in given}
    )
    connection = Connection.connect(
        dsn,
        row_factory=dict_row,
        connect_timeout=max(int(min(timeout, CONNECT_TIMEOUT)), 2),
        prepare_threshold=prepare_threshold,
        autocommit=True,
        application_name="patchpilot",
        **kernel,
    )
    connection.clock = clock
    return connection
