"""Where the callback of one chord stands, all its tasks taken together: from rows of the record to one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kombu.serialization import loads, prepare_accept_content

from patchpilot.postgres.connection import Row

FINAL = ("SUCCESS", "FAILURE", "REVOKED")


def task_ids(callback: Row, accept: Iterable[str] = ("json",)) -> tuple[str, ...]:
    """The ids of all tasks that a callback consists of: a chain, a group or a chord is several.

    What cannot be decoded, or may not be, is known by its own id only.

    :param callback: its id, and how it is stored.
    :param accept: the serialisers that may be decoded.
    """
    return tuple(dict.fromkeys(_leaves(_signature(callback, accept)))) or (str(callback["callback_id"]),)


def has_errbacks(callback: Row, accept: Iterable[str] = ("json",)) -> bool | None:
    """Whether a callback, or any task in it, has errbacks; None if it cannot be decoded, or may not be."""
    signature = _signature(callback, accept)
    return None if signature is None else _has_errbacks(signature)


def _signature(callback: Row, accept: Iterable[str]) -> Any:
    """What is stored, decoded; None if it cannot be."""
    if callback["callback"] is None:
        return None
    kind, encoding = callback["callback_type"], callback["callback_encoding"]
    try:
        return loads(callback["callback"], kind, encoding, accept=prepare_accept_content(accept))
    except Exception:  # noqa: BLE001 - a serialiser raises what it likes
        return None


def _has_errbacks(signature: Any) -> bool:
    if isinstance(signature, list | tuple):
        return any(map(_has_errbacks, signature))
    if not isinstance(signature, Mapping):
        return False
    inside = signature.get("kwargs") or {}
    below = [inside.get(name) for name in ("tasks", "header", "body")] if signature.get("subtask_type") else []
    return bool((signature.get("options") or {}).get("link_error")) or _has_errbacks(below)


def _leaves(signature: Any) -> Iterator[str]:
    if not isinstance(signature, Mapping):
        return
    inside = signature.get("kwargs") or {}
    kind = signature.get("subtask_type")
    if kind in ("chain", "group"):
        for each in inside.get("tasks") or ():
            yield from _leaves(each)
    elif kind == "chord":
        header = inside.get("header")
        for each in header if isinstance(header, list) else (header,):
            yield from _leaves(each)
        yield from _leaves(inside.get("body"))
    elif task_id := (signature.get("options") or {}).get("task_id"):
        yield str(task_id)


def place(message: Row) -> str:
    """Where a message was sent to."""
    if message["queue"]:
        return f"queue {message['queue']}"
    return f"exchange {message['exchange']!r} with routing key {message['routing_key']!r}"


def of_part(row: Row) -> str:
    """Where a part that has not returned stands; empty if nothing is on record."""
    if row["inside"] is not None:
        inner = row["inside"]
        return f", the callback of the chord {inner}, which is open: `patchpilot chords show {inner}` says why"
    if row["sent_at"] is not None:
        return f", whose message was sent to {place(row)} at {row['sent_at']:%Y-%m-%d %H:%M:%S} and is not over"
    return ""


def under_way(ids: Sequence[str], messages: Sequence[Row], starts: Sequence[Row], results: Sequence[Row]) -> str | None:
    """What is still to end of it; None if nothing is on record.

    :param messages: those that are not over.
    """
    if not messages:
        return None
    sentence = min((_of(message, starts, results) for message in messages), key=lambda it: it[0])[1]
    ended = len(_ended(ids, messages, starts, results))
    return sentence if len(ids) == 1 or not ended else f"{ended} of {len(ids)} tasks of its callback ended; {sentence}"


def over(ids: Sequence[str], starts: Sequence[Row], results: Sequence[Row]) -> str | None:
    """How it ended; None if that is not on record. Given that no message of it is left."""
    states = {row["task_id"]: row["state"] for row in results if row["state"] in FINAL}
    ended = _ended(ids, (), starts, results)
    if "FAILURE" in states.values():
        return "its callback has run: FAILURE"
    if "REVOKED" in states.values():
        began = {row["task_id"] for row in starts}
        revoked = {task_id for task_id, state in states.items() if state == "REVOKED"}
        if len(ids) > 1:
            return f"{len(revoked)} of {len(ids)} tasks of its callback had expired, or were revoked"
        if revoked & began:
            return "its callback began and was revoked"
        return "its callback has not run: it had expired, or was revoked"
    if ended and len(ended) < len(ids):
        return (
            f"{len(ended)} of {len(ids)} tasks of its callback ended, and of the others there is neither a message nor "
            "an end on record"
        )
    return (
        (f"its callback has run: {next(iter(states.values()))}" if states else "its callback has run")
        if ended
        else None
    )


def _of(message: Row, starts: Sequence[Row], results: Sequence[Row]) -> tuple[int, str]:
    """Where one of its messages stands; what a person should know first has the lowest number."""
    what = "its callback"
    mine = [it for it in starts if it["task_id"] == message["task_id"] and it["attempt"] == message["attempt"]]
    start = mine[-1] if mine else None
    state = next((it["state"] for it in results if it["task_id"] == message["task_id"]), None)
    if start is not None and start["finished_at"] is None:
        if start["lease_over"]:
            return 0, f"{what} began and its worker died: recovery sends it again"
        return 3, f"{what} runs, on {start['worker']}"
    if start is None and state == "STARTED":
        return 3, f"{what} runs, as its worker said"
    if state == "RETRY" or not message["attempt"].startswith("0/"):
        return 2, f"{what} waits for a retry, in {place(message)}"
    return 1, f"{what} was sent to {place(message)} and has not begun"


def _ended(ids: Sequence[str], messages: Sequence[Row], starts: Sequence[Row], results: Sequence[Row]) -> set[str]:
    left = {row["task_id"] for row in messages}
    final = {row["task_id"] for row in results if row["state"] in FINAL}
    finished = {row["task_id"] for row in starts if row["finished_at"] is not None}
    unfinished = {row["task_id"] for row in starts if row["finished_at"] is None}
    going_on = {row["task_id"] for row in results if row["state"] not in FINAL}
    return ({*ids} & (final | (finished - unfinished - going_on))) - left
