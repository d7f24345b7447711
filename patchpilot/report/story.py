"""What happened when, told from the order of the entries. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from patchpilot.engine.journal import Entry, Kind, RunRecord

Json = dict[str, Any]

PHASES = {
    "preflight": ("Check that patching is safe", "recover-beforehand"),
    "trigger": ("Start the operation", "trigger"),
    "watch": ("Follow the rotation", "stop"),
    "grace": ("Give clients time to reconnect", "grace"),
    "dry-run": ("Find what is stuck", "dry-run"),
    "recover": ("Recover what is stuck", "recover"),
    "verify": ("Prove that all is well", "verify"),
}
"""Each phase that the report tells of: its title, and the step that ends it."""

_LEFT = {Kind.PAUSED: "stopped", Kind.CONTRADICTED: "gave-up"}


def phases(told: Sequence[Entry], record: RunRecord) -> list[Json]:
    """How far each phase came, from its first entry to its last."""
    return [_phase(name, [entry for entry in told if entry.phase == name], record) for name in PHASES]


def _phase(name: str, entries: list[Entry], record: RunRecord) -> Json:
    title, last_step = PHASES[name]
    reached = record.step(last_step).reached
    work = [entry for entry in entries if entry.kind is not Kind.RESUMED]
    return {
        "name": name,
        "title": title,
        "state": "done" if reached else "begun" if work else "not-begun",
        "started_at": work[0].at.isoformat() if work else None,
        "finished_at": reached.at.isoformat() if reached else None,
        "seconds": (reached.at - work[0].at).total_seconds() if reached else None,
    }


def interruptions(told: Sequence[Entry]) -> list[Json]:
    """Each time the run was taken up again: where, and how the process before had left it.

    A process that was killed leaves no entry that says so: it simply writes no more.
    """
    return [
        {
            "left_at": before.at.isoformat(),
            "how": _LEFT.get(before.kind, "killed"),
            "why": before.data.get("why") if before.kind in _LEFT else None,
            "after": f"{before.kind} {before.phase}/{before.step}".rstrip("/ "),
            "resumed_at": entry.at.isoformat(),
            "resumed_in": f"{entry.phase}/{entry.step}",
        }
        for before, entry in pairwise(told)
        if entry.kind is Kind.RESUMED
    ]


def timeline(told: Sequence[Entry]) -> list[Json]:
    """Each change that the watch saw: of the update, of the group, and of each node; and when it could not watch the
    limits past which it would stop the rotation."""
    lines: list[Json] = []
    known: dict[str, str | None] = {}
    for entry in told:
        if entry.phase != "watch" or "nodes" not in entry.data:
            continue
        now = {"update": entry.data["status"], "group": entry.data["group"]}
        now |= {f"node {name}": row["status"] for name, row in entry.data["nodes"].items()}
        if unwatched := entry.data.get("unwatched"):
            now["limits"] = f"not watched: {unwatched}"
        elif "limits" in known and entry.kind is Kind.OBSERVED:
            now["limits"] = "watched"
        lines += [
            {"at": entry.at.isoformat(), "what": what, "status": status}
            for what, status in sorted(now.items())
            if known.get(what) != status
        ]
        known |= now
    return lines
