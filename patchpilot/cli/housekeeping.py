"""``patchpilot recover --strays`` and ``--adopt``: what is done once in a while."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta

from patchpilot.cli.console import Output, emit, emit_json, emit_table, say
from patchpilot.durations import ago
from patchpilot.errors import NeedsOperator
from patchpilot.recovery.adopt import Verdict
from patchpilot.recovery.housekeeping import Housekeeping
from patchpilot.recovery.strays import Stray, Strays
from patchpilot.workers.application import Site

EXAMPLES = 20
"""How many strays are shown; of more it is told how many."""


def strays(site: Site, idle: timedelta, output: Output, *, dry_run: bool) -> None:
    """Show the keys of chords that are on no record, and remove those that are old enough.

    :raises NeedsOperator: the messages in the broker cannot be read, so that all of them stay.
    """
    with Housekeeping(site) as housekeeping:
        found = housekeeping.strays(idle, remove=not dry_run)
    if output is Output.JSON:
        counts = {"keys": found.keys, "removed": found.removed, "kept": found.kept}
        emit_json({"strays": [_stray(it) for it in found.found], **counts})
    else:
        _show_strays(found, idle, dry_run=dry_run)
    if found.kept is not None and not dry_run:
        raise NeedsOperator(f"nothing is removed: {found.kept}")


def adopt(site: Site, output: Output, *, dry_run: bool) -> None:
    """Take over the chords that Celery's own Redis backend has begun, or say which could be."""
    with Housekeeping(site) as housekeeping:
        verdicts = housekeeping.adoptable() if dry_run else housekeeping.adopt()
    if output is Output.JSON:
        emit_json({"chords": [verdict.as_dict() for verdict in verdicts]})
        return
    _show_verdicts(verdicts, dry_run=dry_run)


def _show_strays(found: Strays, idle: timedelta, *, dry_run: bool) -> None:
    if not found.found:
        say("no chord that is on no record has keys")
        return
    oldest = sorted(found.found, key=lambda stray: (not stray.goes, -(stray.keys.idle or timedelta()).total_seconds()))
    emit_table(
        ("CHORD", "KEYS", "UNTOUCHED", "EXPIRES", "SERVER", ""),
        [
            (
                _shown(it.keys.group_id), ",".join(it.suffixes), ago(it.keys.idle) if it.keys.idle is not None else "?",
                f"in {ago(it.keys.expires)}" if it.keys.expires is not None else "never", it.server,
                "goes" if it.goes else "stays",
            )
            for it in oldest[:EXAMPLES]
        ],
    )  # fmt: skip
    if len(oldest) > EXAMPLES:
        emit(f"... and {len(oldest) - EXAMPLES} more")
    many = f"{found.keys} keys of {len(found.found)} chords that are on no record"
    going = sum(len(it.suffixes) for it in found.found if it.goes)
    if found.kept is not None:
        say(f"{many}; none would be removed: {found.kept}" if dry_run else many)
    elif dry_run:
        say(f"{many}; {going} untouched for {ago(idle)} would be removed: run the same command without --dry-run")
    else:
        say(f"{many}; removed {found.removed}")


def _shown(group_id: str) -> str:
    """An id as a terminal may be given it: anybody may have written a key."""
    return "".join(each if each.isprintable() else "?" for each in group_id)


def _stray(stray: Stray) -> dict[str, object]:
    return {
        **asdict(stray.keys), "suffixes": stray.suffixes, "server": stray.server, "goes": stray.goes,
        "idle": None if stray.keys.idle is None else stray.keys.idle.total_seconds(),
        "expires": None if stray.keys.expires is None else stray.keys.expires.total_seconds(),
    }  # fmt: skip


def _show_verdicts(verdicts: list[Verdict], *, dry_run: bool) -> None:
    if not verdicts:
        say("no chord is under way in Celery's own backend")
        return
    emit_table(
        ("CHORD", "CALLBACK", "PARTS", "RUNNING OR LOST", ""),
        [
            (
                _shown(it.group_id), it.callback or "?", f"{it.returned}/{'?' if it.total is None else it.total}",
                it.unknown,
                "adopted" if it.adopted else "not adopted" if it.reason else "can be adopted",
            )
            for it in verdicts
        ],
    )  # fmt: skip
    emit("")
    for it in verdicts:
        if it.reason:
            emit(f"{_shown(it.group_id)}: {it.reason}")
    good = sum(it.reason is None for it in verdicts)
    say(
        f"{good} of {len(verdicts)} can be adopted: run the same command without --dry-run"
        if dry_run
        else f"adopted {good} of {len(verdicts)}"
    )
