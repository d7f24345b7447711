"""Which chord a person means: by its id, by that of a task of it, or by the first characters of either."""

from __future__ import annotations

from typing import Literal

from patchpilot.errors import Usage
from patchpilot.postgres.connection import Database, Row
from patchpilot.postgres.queries import queries

SQL = queries("inventory")

Asked = Literal["chord", "header-task", "callback-task"]

LEAST = 8
"""How many characters of an id are enough to look for it."""

MOST = 10
"""How many chords are named if several ids begin so."""


class Ambiguous(Usage):
    """Several ids begin so. Carries the chords that it may be, one line each."""

    def __init__(self, message: str, candidates: tuple[str, ...]) -> None:
        super().__init__(message)
        self.candidates = candidates


def which(database: Database, text: str) -> tuple[Row, Asked]:
    """The chord that ``text`` leads to, as it is on record, and what of it ``text`` is.

    :raises Usage: there is none.
    :raises Ambiguous: there are several.
    """
    if found := database.fetch(SQL["chord"], {"id": text}):
        return found[0], "chord" if found[0]["group_id"] == text else "callback-task"
    if tasks := database.fetch(SQL["by_task"], {"id": text}):
        return _chord(database, tasks[0]["group_id"]), tasks[0]["what"]
    if len(text) < LEAST:
        raise Usage(f"no chord {text!r} is on record; of an id that is cut short, {LEAST} characters are needed")
    return _by_prefix(database, text)


def _by_prefix(database: Database, text: str) -> tuple[Row, Asked]:
    rows = database.fetch(SQL["by_prefix"], {"id": text, "most": MOST})
    if not rows:
        raise Usage(
            f"no chord {text!r} is on record, and no task of one: it was purged, or sent by a producer without this "
            "backend"
        )
    if len(rows) > 1:
        number = rows[0]["number"]
        told = f", of which the last {MOST} are told" if number > MOST else ""
        raise Ambiguous(f"{text!r} may be {number} chords{told}: give more of the id", tuple(map(_candidate, rows)))
    return _chord(database, rows[0]["group_id"]), _what(rows[0], text)


def _chord(database: Database, group_id: str) -> Row:
    return next(row for row in database.fetch(SQL["chord"], {"id": group_id}) if row["group_id"] == group_id)


def _what(row: Row, text: str) -> Asked:
    if row["group_id"].startswith(text):
        return "chord"
    return "callback-task" if row["callback_id"].startswith(text) else "header-task"


def _candidate(row: Row) -> str:
    task = "" if row["task_id"] is None else f"  (header task {row['task_id']})"
    callback = f"{row['callback_name']}[{row['callback_id']}]"
    return f"{row['group_id']}  {row['state']}  {row['created_at']:%Y-%m-%d %H:%M:%S}  {callback}{task}"
