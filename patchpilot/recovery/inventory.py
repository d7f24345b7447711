"""The inventory of chords: what is open, and the life of one as a timeline. Reads PostgreSQL, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from patchpilot.postgres.connection import Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.lookup import Asked, which
from patchpilot.recovery.standing import has_errbacks, of_part, over, place, task_ids, under_way

SQL = queries("inventory")

MOST_PARTS = 10
"""How many parts a timeline names one by one; of more it tells the first, the last and how many."""


@dataclass(frozen=True)
class OfCallback:
    """The open chords of one callback."""

    callback: str
    open: int
    oldest: datetime
    unrecoverable: int
    """Of those: their callback could not be stored."""
    half_published: int
    """Of those: sending them raised in the caller."""
    shadow: int
    """Of those: only watched."""


@dataclass(frozen=True)
class Backlog:
    """The open chords in numbers."""

    open: int = 0
    oldest: timedelta = timedelta()
    """The age of the oldest, since it was sent; zero if none is open."""
    unrecoverable: int = 0
    """Of those: their callback could not be stored."""


@dataclass(frozen=True)
class Elsewhere:
    """What is open of another broker."""

    broker: str
    chords: int
    messages: int


@dataclass(frozen=True)
class Moment:
    """One thing that happened to a chord."""

    at: datetime
    what: str


@dataclass(frozen=True)
class Life:
    """The life of one chord."""

    group_id: str
    callback: str
    callback_id: str
    state: str
    returned: int
    total: int
    why: str
    """Where it stands, in one sentence: why its callback has run, or has not."""
    moments: tuple[Moment, ...]
    over: bool
    """Nothing of it is still to come: neither parts nor its callback."""
    callback_ids: tuple[str, ...] = ()
    """The tasks that its callback consists of."""
    asked_for: Asked = "chord"
    """What the id is that it was found by, or begins with what was given."""


def inventory(database: Database) -> tuple[OfCallback, ...]:
    """The chords that are open, by callback; the most first.

    :raises PatchpilotError: if PostgreSQL cannot be asked.
    """
    return tuple(
        OfCallback(
            row["callback_name"], row["open"], row["oldest"], row["unrecoverable"], row["half_published"], row["shadow"]
        )
        for row in database.fetch(SQL["by_callback"])
    )


def backlog(database: Database) -> Backlog:
    """The open chords in numbers.

    :raises PatchpilotError: if PostgreSQL cannot be asked.
    """
    [row] = database.fetch(SQL["backlog"])
    return Backlog(row["open"], row["oldest"], row["unrecoverable"])


def elsewhere(database: Database, names: Collection[str]) -> tuple[Elsewhere, ...]:
    """What is open of brokers that have none of these names.

    :raises PatchpilotError: if PostgreSQL cannot be asked.
    """
    rows = database.fetch(SQL["elsewhere"], {"brokers": sorted(names)})
    return tuple(Elsewhere(row["broker"], row["chords"], row["messages"]) for row in rows)


def life(database: Database, chord: str, accept: Iterable[str] = ("json",)) -> Life:
    """The life of the chord with this group id, or that a task with this id belongs to.

    :param chord: its id, or the first characters of one.
    :param accept: the serialisers that may be decoded, to know the tasks that its callback consists of.
    :raises Usage: if there is none on record.
    :raises Ambiguous: if several ids begin so.
    """
    row, asked_for = which(database, chord)
    parts = database.fetch(SQL["parts"], row)
    ids = task_ids(row, accept)
    asked = {**row, "callback_ids": list(ids)}
    messages = database.fetch(SQL["callback_messages"], asked)
    starts = database.fetch(SQL["starts"], asked)
    results = database.fetch(SQL["results"], asked)
    inside = [each["group_id"] for each in database.fetch(SQL["chords_inside"], asked)]
    standing = under_way(ids, messages, starts, results)
    if inside and standing is None:
        standing = f"its callback waits for the chord {inside[0]}, which is open"
    failed = row["state"] == "failed"
    ending = over(ids, starts, results) if row["state"] == "dispatched" or row["shadow"] else None
    subjects = {**row, "task_ids": [part["task_id"] for part in parts]}
    moments = [
        *_of_chord(row),
        *_of_parts(parts),
        *_of_callback(messages, starts, results),
        *(Moment(it["applied_at"], _remedy(it)) for it in database.fetch(SQL["remedies"], subjects)),
    ]
    returned = sum(part["state"] is not None for part in parts)
    return Life(
        group_id=row["group_id"],
        callback=row["callback_name"],
        callback_id=row["callback_id"],
        state=row["state"],
        returned=returned,
        total=len(parts),
        why=_why_failed(parts, messages, has_errbacks(row, accept))
        if failed
        else standing or ending or _why_open(row, parts),
        moments=tuple(sorted(moments, key=lambda moment: moment.at)),
        over=row["state"] in ("dispatched", "failed") and not messages and not inside,
        callback_ids=ids,
        asked_for=asked_for,
    )


def _of_chord(row: Row) -> Iterator[Moment]:
    yield Moment(row["created_at"], "written down, with its callback and its header's messages")
    if row["finished_at"] is not None:
        what = "the error path ran" if row["state"] == "failed" else "callback dispatched"
        yield Moment(row["finished_at"], what)


def _of_parts(parts: list[Row]) -> Iterator[Moment]:
    returned = sorted((part for part in parts if part["state"] is not None), key=lambda part: part["returned_at"])
    told = returned if len(returned) <= MOST_PARTS else [returned[0], returned[-1]]
    for part in told:
        number = returned.index(part) + 1
        yield Moment(part["returned_at"], f"part {number} of {len(parts)} returned: {part['task_id']} {part['state']}")
    for part in parts:
        if part["sent_at"] is not None and part["resends"]:
            yield Moment(part["sent_at"], f"header task {part['task_name']}[{part['task_id']}] sent again")


def _of_callback(messages: list[Row], starts: list[Row], results: list[Row]) -> Iterator[Moment]:
    goes_on = {it["task_id"] for it in messages}
    for it in messages:
        again = f", {it['resends']} time(s) again" if it["resends"] else ""
        yield Moment(it["sent_at"], f"callback {it['task_name']}[{it['task_id']}] sent to {place(it)}{again}")
    for it in starts:
        times = f" (start number {it['starts']})" if it["starts"] > 1 else ""
        yield Moment(it["started_at"], f"callback {it['task_id']} began{times}")
        if it["finished_at"] is not None:
            how = "ended this attempt" if it["task_id"] in goes_on else "ended"
            yield Moment(it["finished_at"], f"callback {it['task_id']} {how}")
    for it in results:
        yield Moment(it["stored_at"], f"callback's result stored: {it['state']} ({it['task_id']})")


def _remedy(row: Row) -> str:
    by = f" by run {row['run_id']}" if row["run_id"] else ""
    return f"recovered{by}: {row['remedy']} ({row['diagnosis']})"


def _why_failed(parts: list[Row], messages: list[Row], errbacks: bool | None) -> str:
    failed = sum(part["state"] not in (None, "SUCCESS") for part in parts)
    why = f"{failed} of {len(parts)} parts failed" if failed else "its callback could not be sent"
    if messages:
        first = messages[0]
        return f"{why}, so its errbacks run instead: {first['task_name']} was sent to {place(first)} and is not over"
    if errbacks is None:
        return f"{why}, so its errbacks, if it has any, ran instead"
    return f"{why}, so its errbacks ran instead" if errbacks else f"{why}; it has no errbacks, so nothing ran instead"


def _why_open(row: Row, parts: list[Row]) -> str:
    """Where it stands, given that of its callback nothing is on record. The first sentence that applies."""
    pending = [part for part in parts if part["state"] is None]
    sentences: tuple[tuple[bool, Callable[[], str]], ...] = (
        (row["state"] == "dispatched", lambda: "its callback was dispatched and has ended"),
        (row["publish_error"] is not None, lambda: f"sending it raised {row['publish_error']} in the caller"),
        (row["generating"], lambda: "its producer's generator has not come to its end"),
        (
            bool(pending),
            lambda: (
                f"{len(pending)} of {len(parts)} header tasks have not returned, first {pending[0]['task_id']}"
                + of_part(pending[0])
            ),
        ),
        (row["unrecoverable"] is not None, lambda: f"its callback could not be stored: {row['unrecoverable']}"),
        (row["state"] == "claimed" and not row["claim_over"], lambda: "a process is dispatching its callback"),
    )
    for applies, sentence in sentences:
        if applies:
            return sentence()
    return "all parts are in, and nobody has dispatched its callback: `patchpilot recover` does"
