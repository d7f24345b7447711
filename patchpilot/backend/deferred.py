"""Results that are stored later: that of a callback in whose place a chord has an error, with the end of the chord.

Celery stores it where it makes the error. Here it goes into the transaction that ends the chord, with those of all
others that end with it: one statement for any number, and no such result of a chord that is not over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from patchpilot.postgres.connection import Connection
from patchpilot.postgres.queries import queries

SQL = queries("results")

Results = Mapping[str, Mapping[str, Any]]
"""By task id: the parameters of the statement that stores it."""

_current: ContextVar[dict[str, Mapping[str, Any]] | None] = ContextVar("patchpilot_deferred", default=None)


@contextmanager
def deferred(*, wanted: bool) -> Iterator[Results]:
    """Inside, results that belong to no running task are kept, if that is wanted."""
    kept: dict[str, Mapping[str, Any]] = {}
    token = _current.set(kept if wanted else None)
    try:
        yield kept
    finally:
        _current.reset(token)


def defer(row: Mapping[str, Any], request: Any) -> bool:
    """Keep a result, if that is wanted here. False if it is to be stored at once."""
    kept = _current.get()
    if kept is None or request is not None:  # what an errback stores that is called here is its own
        return False
    kept[row["task_id"]] = row
    return True


def store(connection: Connection, results: Iterable[Results]) -> None:
    """Store what was kept. Of the same task, the last one."""
    rows = {task_id: row for kept in results for task_id, row in kept.items()}
    if rows:
        names = ("task_id", "state", "meta", "expires", "result_of", "result_group")
        connection.execute(SQL["store_all"], {name: [row[name] for row in rows.values()] for name in names})
