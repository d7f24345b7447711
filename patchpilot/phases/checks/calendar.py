"""Checks of what happened lately and of what is about to: snapshots, windows, events. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from patchpilot.phases.checks.situation import Judgement, Row, Situation, Verdict, prefer, unknown
from patchpilot.phases.notes import clock_time, length
from patchpilot.phases.rotation import failover

PER_NODE = timedelta(minutes=12)
"""How long a node is reckoned to take. Two nodes were seen to take 23 minutes."""

RECENT = timedelta(hours=24)
"""How old a snapshot may be: AWS takes one a day if it is asked to."""

_TAKING = frozenset({"creating", "copying", "restoring"})
_SHOWN = 3
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:(\w{3}):)?(\d\d):(\d\d)-(?:(\w{3}):)?(\d\d):(\d\d)")
_REPLACEMENT = re.compile(r"scheduled for replacement", re.IGNORECASE)


def _snapshot(at: Situation) -> Judgement:
    if isinstance(at.snapshots, str):
        return unknown(at.snapshots)
    running = [snapshot for snapshot in at.snapshots if snapshot.status in _TAKING]
    if running:
        return Verdict.BLOCK, ", ".join(f"{snapshot.name} {snapshot.status}" for snapshot in running)
    newest = max((s.taken for s in at.snapshots if s.taken and s.status == "available"), default=None)
    if at.role == "cache":
        return Verdict.PASS, "none is running, and a cache needs none to be restored from"
    if newest is None:
        return Verdict.WARN, "none is running, and none was ever taken"
    return prefer(at.now - newest <= RECENT, f"none is running; the newest is of {clock_time(newest)}")


def _snapshot_window(at: Situation) -> Judgement:
    return _clear(at, {at.group.snapshot_window} - {""}, "no automatic snapshots")


def _maintenance_window(at: Situation) -> Judgement:
    if isinstance(at.nodes, str):
        return unknown(at.nodes)
    return _clear(at, {node.maintenance_window for node in at.nodes} - {""}, "no maintenance window reported")


def _clear(at: Situation, windows: set[str], none: str) -> Judgement:
    """Whether none of ``windows`` is open, or will open while the patch is likely to run."""
    takes = PER_NODE * len(at.group.members)
    said, clear = [], True
    for window in sorted(windows):
        wait = opens_in(window, at.now)
        clear = clear and wait is not None and wait > takes
        when = "cannot be read" if wait is None else f"opens in {length(wait)}" if wait else "is open now"
        said.append(f"{window} {when}")
    patch = f"; the patch is reckoned to take {length(takes)}" if windows else ""
    return prefer(clear, ("; ".join(said) or none) + patch)


def opens_in(window: str, now: datetime) -> timedelta | None:
    """How long until ``window`` opens; zero while it is open, None if it is not written as AWS writes windows.

    :param window: daily, ``05:00-06:00``, or weekly, ``sun:23:00-mon:01:30``; in UTC.
    """
    found = _WINDOW.fullmatch(window.strip().lower())
    if found is None or (found[1] is None) != (found[4] is None) or not {found[1], found[4]} <= {None, *_DAYS}:
        return None
    period = timedelta(days=7 if found[1] else 1)
    begin, end = _offset(found[1], found[2], found[3]), _offset(found[4], found[5], found[6])
    monday = (now - timedelta(days=now.weekday())).replace(hour=0, minute=0, second=0, microsecond=0)
    here = now - monday
    if (here - begin) % period < (end - begin) % period:
        return timedelta()
    return (begin - here) % period


def _offset(day: str | None, hour: str, minute: str) -> timedelta:
    return timedelta(days=_DAYS.index(day) if day else 0, hours=int(hour), minutes=int(minute))


def _history(at: Situation) -> Judgement:
    if isinstance(at.history, str):
        return unknown(at.history)
    # AWS tells of a failover twice, once for the group and once for the node.
    told = {(event.at, event.message) for event in at.history if failover(event) or _REPLACEMENT.search(event.message)}
    newest = [f"{clock_time(when)}: {message}" for when, message in sorted(told, reverse=True)[:_SHOWN]]
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return prefer(not told, ("; ".join(newest) or "no failover and no replacement notice in 14 days") + more)


ROWS: tuple[Row, ...] = (
    Row("snapshot", _snapshot, "a snapshot competes with a full synchronisation for memory; a recent one is a way back",
        "wait for the one that is running; or aws elasticache create-snapshot, and wait for it"),
    Row("snapshot-window", _snapshot_window, "a snapshot during the patch competes with it for memory",
        "patch at another time of the day"),
    Row("maintenance-window", _maintenance_window, "in it AWS may work on the nodes by itself while they are patched",
        "patch at another time of the week, or leave it to AWS and watch"),
    Row("history", _history, "a node that failed lately may fail again; one that AWS is about to replace fails over",
        "find out why; wait until AWS has replaced the node"),
)  # fmt: skip
