"""The checks of pre-flight: each looks at the same situation and gives a verdict with its evidence. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from patchpilot.elasticache.facts import AVAILABLE, IN_FLIGHT, Group, Node, UpdateAction
from patchpilot.phases.choice import Choice
from patchpilot.phases.notes import clock_time
from patchpilot.settings import Role
from patchpilot.valkey.nodes import Report

MOST_LAG = 1024 * 1024
"""Bytes a replica may be behind. What it lacks at the failover is lost, so more than this is worth a warning."""

MOST_SILENCE = 10
"""Seconds since a replica last acknowledged; replicas do so every second."""


class Verdict(StrEnum):
    """What a check says."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARN = "warn"
    BLOCK = "block"
    UNKNOWN = "unknown"
    """It could not be found out. Blocks a broker: its chords hang on what nobody looked at."""


@dataclass(frozen=True)
class Check:
    """One verdict."""

    name: str
    verdict: Verdict
    evidence: str
    why: str
    """Why it matters."""
    mend: str
    """How to mend it; empty when it passes."""


@dataclass(frozen=True)
class Situation:
    """Everything that the checks look at, read at one moment. A string in place of a report says why there is none."""

    now: datetime
    role: Role
    group: Group
    nodes: tuple[Node, ...]
    actions: tuple[UpdateAction, ...]
    choice: Choice
    endpoint: Report | str
    members: Mapping[str, Report | str]
    schema: str | None


Judge = Callable[[Situation], tuple[Verdict, str]]


def judge(situation: Situation) -> tuple[Check, ...]:
    """All checks, in order. For an update that already runs it is too late to block: those become warnings."""
    checks = [
        Check(name, verdict, evidence, why, "" if verdict is Verdict.PASS else mend)
        for name, look, why, mend in CHECKS
        for verdict, evidence in (look(situation),)
    ]
    if situation.choice.adopted:
        checks = [
            replace(check, verdict=Verdict.WARN, evidence=f"{check.evidence} (the update already runs)")
            if check.verdict in {Verdict.BLOCK, Verdict.UNKNOWN}
            else check
            for check in checks
        ]
    return tuple(checks)


def blocking(checks: tuple[Check, ...], role: Role) -> tuple[Check, ...]:
    """Those that forbid to go on."""
    stops = {Verdict.BLOCK, Verdict.UNKNOWN} if role == "broker" else {Verdict.BLOCK}
    return tuple(check for check in checks if check.verdict in stops)


def _require(ok: bool, evidence: str) -> tuple[Verdict, str]:
    return (Verdict.PASS if ok else Verdict.BLOCK), evidence


def _group_available(at: Situation) -> tuple[Verdict, str]:
    return _require(at.group.available, f"group {at.group.status}, shards {', '.join(at.group.node_groups) or 'none'}")


def _nodes_available(at: Situation) -> tuple[Verdict, str]:
    ok = bool(at.nodes) and all(node.status == AVAILABLE for node in at.nodes)
    return _require(ok, ", ".join(f"{node.node} {node.status}" for node in at.nodes) or "AWS lists no node")


def _nothing_pending(at: Situation) -> tuple[Verdict, str]:
    pending = [f"{at.group.id}: {', '.join(at.group.pending)}"] if at.group.pending else []
    pending += [f"{node.node}: {', '.join(node.pending)}" for node in at.nodes if node.pending]
    return _require(not pending, "; ".join(pending) or "no pending modification")


def _automatic_failover(at: Situation) -> tuple[Verdict, str]:
    return _require(at.group.automatic_failover == "enabled", at.group.automatic_failover or "not reported")


def _multi_az(at: Situation) -> tuple[Verdict, str]:
    zones = ", ".join(sorted({member.zone for member in at.group.members if member.zone})) or "no zone reported"
    verdict = Verdict.PASS if at.group.multi_az == "enabled" else Verdict.WARN
    return verdict, f"{at.group.multi_az or 'not reported'} ({zones})"


def _has_replica(at: Situation) -> tuple[Verdict, str]:
    return _require(len(at.group.members) >= 2, f"{len(at.group.members)} nodes")


def _one_shard(at: Situation) -> tuple[Verdict, str]:
    shards = len(at.group.node_groups)
    mode = {True: "enabled", False: "disabled", None: "not reported"}[at.group.cluster_enabled]
    return _require(shards == 1 and not at.group.cluster_enabled, f"{shards} shard(s), cluster mode {mode}")


def _no_global_datastore(at: Situation) -> tuple[Verdict, str]:
    return _require(not at.group.global_datastore, at.group.global_datastore or "no member of a Global Datastore")


def _update_status(at: Situation) -> tuple[Verdict, str]:
    what = "is adopted" if at.choice.adopted else "will be applied"
    return Verdict.PASS, f"{at.choice.action.update} is {at.choice.action.status} and {what}"


def _update_dates(at: Situation) -> tuple[Verdict, str]:
    update = at.choice.update
    if update is None:
        return Verdict.UNKNOWN, f"AWS does not list {at.choice.action.update} among the service updates"
    dates = "; ".join((
        f"recommended by {clock_time(update.recommended_by) if update.recommended_by else 'no date'}",
        f"cannot be applied after {clock_time(update.ends) if update.ends else 'no date'}",
        f"applied by AWS itself after the recommended date: {_yes_no(update.automatic)}",
    ))  # fmt: skip
    if update.ends and update.ends <= at.now:
        return Verdict.BLOCK, dates
    late = update.recommended_by is not None and update.recommended_by <= at.now
    return (Verdict.WARN if late else Verdict.PASS), f"{update.name}, severity {update.severity}: {dates}"


def _update_alone(at: Situation) -> tuple[Verdict, str]:
    others = [a for a in at.actions if a.status in IN_FLIGHT and a.update != at.choice.action.update]
    return _require(not others, ", ".join(f"{a.update} {a.status}" for a in others) or "no other update in flight")


def _endpoint(at: Situation) -> tuple[Verdict, str]:
    if isinstance(at.endpoint, str):
        return (Verdict.BLOCK if at.role == "broker" else Verdict.UNKNOWN), at.endpoint
    return _require(at.endpoint.role == "primary", f"a {at.endpoint.role} answers at the primary endpoint")


def _replication(at: Situation) -> tuple[Verdict, str]:
    """The primary's own list of its replicas, and what each of them says of its link."""
    if isinstance(at.endpoint, str):
        return Verdict.UNKNOWN, at.endpoint
    lagging = [
        f"{replica.address} {replica.state}, {max(at.endpoint.offset - replica.offset, 0)} bytes behind, "
        f"silent for {replica.silence} s"
        for replica in at.endpoint.replicas
    ]
    broken = [f"{node} says its link is down" for node, said in at.members.items() if _link_down(said)]
    online = [replica for replica in at.endpoint.replicas if replica.state == "online"]
    evidence = "; ".join(lagging + broken) or "the primary lists no replica"
    if broken or len(online) < len(at.group.members) - 1:
        return Verdict.BLOCK, evidence
    slow = [r for r in online if at.endpoint.offset - r.offset > MOST_LAG or r.silence > MOST_SILENCE]
    return (Verdict.WARN if slow else Verdict.PASS), evidence


def _schema(at: Situation) -> tuple[Verdict, str]:
    return _require(at.schema is None, at.schema or "the schema is the one this version needs")


def _link_down(said: Report | str) -> bool:
    return isinstance(said, Report) and said.role == "replica" and not said.link_up


def _yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not reported"}[value]


CHECKS: tuple[tuple[str, Judge, str, str], ...] = (
    ("group-available", _group_available, "AWS applies updates to available groups only",
     "wait until the group is available; look for a modification or a snapshot under way"),
    ("nodes-available", _nodes_available, "a node that is already down leaves nothing to fail over to",
     "wait for it, or open a case with AWS"),
    ("nothing-pending", _nothing_pending, "a pending modification could be flushed by the update",
     "apply it or take it back first"),
    ("automatic-failover", _automatic_failover, "without it the primary is patched with no primary left",
     "aws elasticache modify-replication-group --automatic-failover-enabled --apply-immediately"),
    ("multi-az", _multi_az, "with all nodes in one zone a failure of that zone takes the last copy",
     "aws elasticache modify-replication-group --multi-az-enabled --apply-immediately"),
    ("replica", _has_replica, "without a replica the data is gone while the node is patched",
     "aws elasticache increase-replica-count"),
    ("one-shard", _one_shard, "this runbook follows one primary; Celery's transport speaks no cluster mode",
     "patch groups with several shards by hand"),
    ("no-global-datastore", _no_global_datastore, "in a Global Datastore another region takes part in a failover",
     "patch it by hand, region by region"),
    ("update", _update_status, "this is the update that the run is about", ""),
    ("update-dates", _update_dates, "after its end date an update cannot be applied; the other dates are deadlines",
     "aws elasticache describe-service-updates shows all three dates"),
    ("update-alone", _update_alone, "two updates at once cannot be told apart in events and roles",
     "wait until the other one is complete"),
    ("endpoint", _endpoint, "recovery and the proof at the end go through the primary endpoint",
     "check clusters.*.endpoint, the network path and the login"),
    ("replication", _replication, "what a replica lacks at the failover is lost",
     "wait until every replica is online and close behind"),
    ("schema", _schema, "recovery reads and writes these tables", "patchpilot db migrate"),
)  # fmt: skip
"""Name, judge, why it matters, how to mend it."""
