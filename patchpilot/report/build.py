"""From the journal to ``report.json``. Pure: the same entries give the same report, years later too.

Steps and facts are looked up by their durable names, never by their order, and whatever is missing is reported as
missing: a run that was blocked or is under way has a report as well. ``report.schema.json`` describes the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from patchpilot.dsn import masked
from patchpilot.engine.journal import Entry, Kind, RunRecord
from patchpilot.errors import Exit
from patchpilot.postgres.journal import Run
from patchpilot.report.story import interruptions, phases, timeline

Json = dict[str, Any]

SCHEMA_VERSION = 1
"""Raised when a reader of an older report would misread a newer one; new keys alone do not raise it."""

OWN_PHASE = "report"
"""The phase that writes the report. Its entries are no part of it, or writing it would change it."""

_PREFLIGHT: Mapping[str, Any] = {"checks": [], "waivers": {}}

_CAME_TO = {
    "over": "complete", "complete": "complete", "stopped": "stopped", "stopping": "stopped", "ready": "not-begun",
    "not-applied": "not-begun", "scheduled": "not-begun", "impossible": "not-applicable",
    "not-applicable": "not-applicable", "unknown": "unknown",
    "running": "incomplete",
}  # fmt: skip
"""What an operation that was to be stopped came to, by what its proof says, or else by AWS's status of the update."""

_STOPPED = {Exit.BLOCKED: "blocked", Exit.VERIFICATION_FAILED: "verification-failed"}


def build(entries: Sequence[Entry], run: Run) -> Json:
    """The report of ``run``.

    :param entries: its whole journal.
    """
    told = [entry for entry in entries if entry.phase != OWN_PHASE]
    record = RunRecord.of(told)
    facts = record.facts()
    asked = record.step("readiness").intent
    about = asked.data if asked else {}
    outcome, why = _outcome(record, told)
    ended = _ended(record, outcome)
    report = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.id,
        "environment": run.environment,
        "cluster": run.cluster,
        **{key: about.get(key) for key in ("group", "role", "version")},
        "outcome": outcome,
        "why": why,
        "started_at": _text(record.started.at if record.started else None),
        "finished_at": _text(ended),
        "seconds": (ended - record.started.at).total_seconds() if ended and record.started else None,
        "phases": phases(told, record),
        "preflight": {key: _latest(record, "readiness").get(key, empty) for key, empty in _PREFLIGHT.items()},
        "operation": _operation(record, facts),
        "abort": _abort(record, facts),
        "update": _update(record, facts),
        "nodes": _nodes(record, facts),
        "timeline": timeline(told),
        "failovers": _failovers(record),
        "grace": _grace(record),
        "findings": _findings(facts),
        "remedies": _remedies(facts),
        "verification": {"claims": _latest(record, "verify").get("claims", [])},
        "may_have_run_twice": _latest(record, "verify").get("repeated", []),
        "interruptions": interruptions(told),
    }
    without_secrets: Json = masked(report)
    return without_secrets


def _outcome(record: RunRecord, told: Sequence[Entry]) -> tuple[str, str | None]:
    """How it ended, and why if it did not end well."""
    if record.finished and "why" in record.finished.data:  # it ended early: nothing to do, or aborted
        return record.finished.data["outcome"], record.finished.data["why"]
    if record.step("verify").reached:
        abort = _abort(record, record.facts())
        return ("aborted", abort["why"]) if abort else ("done", None)
    last = told[-1] if told else None
    if last and last.kind is Kind.CONTRADICTED:
        return _STOPPED.get(last.data.get("exit", Exit.ERROR), "stopped"), last.data.get("why")
    return "unfinished", last.data.get("why") if last and last.kind is Kind.PAUSED else None


def _ended(record: RunRecord, outcome: str) -> datetime | None:
    proven = record.step("verify").reached
    if outcome in {"done", "aborted"} and proven:
        return proven.at
    return record.finished.at if record.finished and outcome in {"nothing-to-do", "aborted"} else None


def _latest(record: RunRecord, step: str) -> Mapping[str, Any]:
    """The step's fact, or what it last saw or intended: the best that is known."""
    known = record.step(step)
    if known.reached:
        return known.reached.data
    return known.seen or (known.intent.data if known.intent else {})


def _operation(record: RunRecord, facts: Mapping[str, Any]) -> Json:
    """What the run was asked to do, what that came to, and who agreed to it."""
    ready, plan, approved = facts.get("readiness", {}), facts.get("plan", {}), facts.get("approve", {})
    kind, update = (
        ready.get("operation") or record.order.get("operation", "service-update"),
        _rotated(record).get("update"),
    )
    return {
        "kind": kind,
        "what": f"observation of {update}" if kind == "observe" and update else ready.get("what"),
        "plan": plan.get("digest") or approved.get("digest"),
        "held_to": record.order.get("plan"),
        "approved_by": approved.get("by"),
        "approved_at": approved.get("at"),
    }


def _abort(record: RunRecord, facts: Mapping[str, Any]) -> Json | None:
    """Why the rotation was to be stopped, and what it came to: AWS may have completed it all the same."""
    stopped, proof = facts.get("stop", {}), _latest(record, "verify")
    abort = facts.get("watch", {}).get("abort")
    if not abort:
        return None
    status = proof.get("status") or stopped.get("status")
    return {
        **abort,
        "status": status,
        "requests": stopped.get("attempts"),
        "given_up": "given_up" in facts.get("trigger", {}),
        "came_to": _CAME_TO.get(proof.get("came_to") or status or ""),
    }


def _rotated(record: RunRecord) -> Mapping[str, Any]:
    """What is known of the rotation: by the step that stopped it, if one did, else by the watch."""
    stopped = _latest(record, "stop")
    return stopped if "rotation" in stopped else _latest(record, "watch")


def _failovers(record: RunRecord) -> list[Json]:
    told = (_latest(record, "grace") or _rotated(record)).get("rotation", {}).get("failovers", [])
    return [{key: each[key] for key in ("at", "to", "old", "told_by")} for each in told]


def _update(record: RunRecord, facts: Mapping[str, Any]) -> Json | None:
    """The service update with its three dates, and how it came to run. None for an operation that is none."""
    if "readiness" not in facts:
        return None
    ready, trigger, watch = facts["readiness"], facts.get("trigger", {}), _rotated(record)
    name = (ready["action"] or {}).get("update") or watch.get("update")
    if name is None:
        return None
    proof = _latest(record, "verify")
    rows = (proof.get("nodes") or watch.get("nodes", {})).values()
    dates = dict.fromkeys(
        ("severity", "kind", "engine", "description", "estimate", "released", "recommended_by", "ends", "automatic")
    )
    return {
        **dates,
        **(ready["update"] or {}),
        "name": name,
        "status": proof.get("status") or watch.get("status") or (trigger or ready["action"] or {}).get("status"),
        "how": trigger.get("how"),
        "attempts": trigger.get("attempts"),
        "initiated_by": sorted({row.get("initiated_by", "") for row in rows} - {""}) or trigger.get("initiated_by", []),
        "sla_met": watch.get("sla_met"),
    }


def _nodes(record: RunRecord, facts: Mapping[str, Any]) -> list[Json]:
    """How far each node came, and what it was and is: of an operation that nobody can prove good, too."""
    before, after = facts.get("readiness", {}), _latest(record, "verify")
    rows = after.get("nodes") or _rotated(record).get("nodes", {})
    made_of = {"engine": "engines", "engine_version": "versions", "node_type": "node_types"}
    return [
        {
            **rows.get(name, {}),
            "node": name,
            **{f"{what}_before": before.get(key, {}).get(name) for what, key in made_of.items()},
            **{f"{what}_after": after.get(key, {}).get(name) for what, key in made_of.items()},
        }
        for name in sorted({*before.get("versions", {}), *rows, *after.get("versions", {})})
    ]


def _grace(record: RunRecord) -> Json | None:
    known, ended = _latest(record, "grace"), record.step("grace").reached
    if not known:
        return None
    return {
        "seconds": known["grace"],
        "because": known["because"],
        "deadline": known["deadline"],
        "rearmed": known.get("rearmed"),
        "ended_at": _text(ended.at if ended else None),
    }


def _findings(facts: Mapping[str, Any]) -> Json:
    found = facts.get("dry-run", {})
    return {
        "skipped": found.get("skipped"),
        "counts": found.get("counts", {}),
        "items": found.get("findings", []),
        "young": found.get("young", []),
    }


def _remedies(facts: Mapping[str, Any]) -> Json:
    """What recovery did before the patch and after it, and what it left."""
    before, after = facts.get("recover-beforehand", {}), facts.get("recover", {})
    return {
        "before": before.get("applied", []),
        "after": after.get("applied", []),
        "left": after.get("left", []),
    }


def _text(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
