"""Phase 7: prove that all is well, claim by claim, each with its evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any

from patchpilot.elasticache.cloudwatch import Alarm
from patchpilot.elasticache.facts import Group, UpdateAction
from patchpilot.engine.plan import (
    Attempt,
    Contradicted,
    Data,
    Effect,
    NotYet,
    Observation,
    Phase,
    Reached,
    Step,
    View,
)
from patchpilot.errors import VerificationFailed
from patchpilot.phases.desk import Desk
from patchpilot.phases.goal import Goal, find, other_goal
from patchpilot.phases.notes import length, moment, noted
from patchpilot.phases.p3_watch import rotated
from patchpilot.phases.proofs import Before, Claim, Workplace, alarm_claim, can_prove, is_proven, worker_claims
from patchpilot.phases.readings import known, made_of, read_endpoint, read_members
from patchpilot.recovery.findings import Finding
from patchpilot.valkey.nodes import Report
from patchpilot.workers.facts import Depth

FLIGHT = timedelta(minutes=5)
"""How long a canary may take to come back before another one is sent. It expires later than that."""

TOLD = ("half-published", "shadow")
"""Diagnoses of chords that are nobody's loss: the caller was told that it was not sent, or it is only watched."""


class Verify(Phase):
    """Prove that all is well."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("verify", "prove that all is well", (Prove(desk),))


@dataclass(frozen=True)
class Evidence:
    """Everything the claims rest on, read at one moment. A string in place of an answer says why there is none."""

    action: UpdateAction | None
    """None while AWS does not list it, and for an operation that is no service update."""
    group: Group
    endpoint: Report | str | None
    """None for a cluster without an endpoint in the configuration."""
    members: Mapping[str, Report | str]
    stuck: tuple[Finding, ...] | None
    """None for a cluster that is no broker."""
    min_age: timedelta = timedelta()
    """How long something makes no progress before it counts as stuck."""
    earlier: frozenset[str] = frozenset()
    """Ids of what was stuck before the patch and was left to a person."""
    waived: str = ""
    """Why somebody answers for the chords that only a person can judge; empty if nobody does."""
    workplace: Workplace | None = None
    """None for a cluster that is no broker."""
    alarms: tuple[Alarm, ...] | str = ()
    before: Before = field(default_factory=Before)
    goal: Goal | None = None
    """None if it is that the service update is complete."""


class Prove(Step):
    """Every claim holds at the same moment.

    For that it sends canaries to the workers, looks until they have come back, and at the end of its patience removes
    what is left of them. A canary that is sent twice, or that nobody waits for any more, does no harm.
    """

    name = "verify"
    title = "prove that the update is over, the nodes and workers are well and nothing is stuck"
    effect = Effect.PUBLISH

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        at = self._read(view)
        proof = claims(at)
        failing = [claim for claim in proof if not claim.holds]
        fact = {"claims": noted(proof), "repeated": self._repeated(view)}
        if not failing:
            return Reached({**fact, **self._became(at)})
        what = "; ".join(f"{claim.name}: {claim.evidence}" for claim in failing)
        seen = {**view.seen, **_noted(at.workplace), "waiting": _waiting(view, at.workplace)}
        if view.now < _began(view) + self._desk.runbook.verify_timeout or (seen["waiting"] and not _tries(view)):
            return NotYet(what, act=bool(seen["waiting"]), seen=seen)
        if _untidy(view):
            return NotYet(what, act=True, seen={**seen, "waiting": {}})
        return Contradicted(VerificationFailed(f"verification failed: {what}"), seen={**fact, **self._became(at)})

    def act(self, view: View) -> Data:
        """Send canaries to the workers that wait for one; if none does, the time for canaries is over."""
        workers = self._desk.workers
        if workers is None:
            return {}
        if view.seen["waiting"]:
            return {"sent": workers.release(view.seen["waiting"])}
        workers.tidy(_sent(view))
        return {"tidied": True}

    def _repeated(self, view: View) -> list[Any]:
        """What may have happened twice in part, for the report: no patch undoes half an execution."""
        age = view.now - moment(view.facts["trigger"]["since"])
        rows = self._desk.recovery.repeated_starts(age) if self._desk.recovery else ()
        return [noted(dict(row)) for row in rows]

    def _became(self, at: Evidence) -> dict[str, Any]:
        """For the report: what has become of the operation and of each node, as far as AWS says."""
        action = at.action
        return {
            **made_of(known(lambda: self._desk.cloud.nodes(at.group))),
            "came_to": at.goal.came_to if at.goal else None,
            "status": action.status if action else None,
            "nodes": {node.node: noted(node) for node in action.nodes} if action else {},
        }

    def _read(self, view: View) -> Evidence:
        desk = self._desk
        group = desk.cloud.group(desk.group)
        earlier = Before.of(view.facts["readiness"])
        nodes = [member.node for member in group.members]
        return Evidence(
            action=find(desk, rotated(view.facts).get("update") or view.facts["trigger"]["update"]),
            goal=other_goal(desk, view),
            group=group,
            endpoint=read_endpoint(desk) if desk.nodes else None,
            members=read_members(desk, group) if desk.nodes else {},
            stuck=desk.recovery.survey(desk.window) if desk.recovery else None,
            min_age=desk.window.min_age,
            earlier=frozenset(it["id"] for it in view.facts["recover-beforehand"].get("left", ())),
            waived=desk.waivers.get("chords", ""),
            workplace=self._workplace(view, earlier),
            alarms=known(lambda: desk.monitoring.alarms([desk.group, *nodes]), patient=True),
            before=earlier,
        )

    def _workplace(self, view: View, earlier: Before) -> Workplace | None:
        workers = self._desk.workers
        if workers is None:
            return None
        first = {name: Depth(name, *look) for name, look in view.seen.get("queues", {}).items()}
        return Workplace(workers.look(earlier.consumed | earlier.idle), earlier, _sent(view), first)


def claims(at: Evidence) -> tuple[Claim, ...]:
    """What has to be true, and whether it is. Pure."""
    proof = [at.goal.claim if at.goal else _complete(at.action, at.group), _available(at.group)]
    if at.endpoint is not None:
        proof += [_answers(at.endpoint), _one_primary(at), _replicas_follow(at)]
    if at.stuck is not None:
        proof.append(_nothing_stuck(at.stuck, at))
    if at.workplace is not None:
        proof += worker_claims(at.workplace)
    quiet = alarm_claim(at.alarms, at.before)
    return (*proof, quiet) if quiet else tuple(proof)


def _tries(view: View) -> list[Attempt]:
    """When canaries were sent or tidied away within this patience."""
    return [attempt for attempt in view.attempts if attempt.at >= view.since]


def _began(view: View) -> datetime:
    """Since when there is something to wait for: this process may have stood still before it sent anything."""
    return next((attempt.at for attempt in _tries(view)), view.since)


def _flights(tries: Iterable[Attempt]) -> dict[str, tuple[str, datetime]]:
    """The canaries that were sent: instance -> the token of the last one, and when it left."""
    flights: dict[str, tuple[str, datetime]] = {}
    for attempt in tries:
        sent = (attempt.outcome or {}).get("sent", {})
        flights |= {instance: (token, attempt.at) for instance, token in sent.items()}
    return flights


def _sent(view: View) -> dict[str, str]:
    return {instance: token for instance, (token, _) in _flights(_tries(view)).items()}


def _untidy(view: View) -> bool:
    """Whether canaries were sent that nobody has tidied away yet."""
    return bool(_sent(view)) and not (_tries(view)[-1].outcome or {}).get("tidied")


def _waiting(view: View, at: Workplace | None) -> dict[str, str]:
    """The workers that should be sent a canary: instance -> serialiser."""
    if at is None:
        return {}
    # What was interrupted after they left may have tidied them away.
    certain = list(takewhile(lambda attempt: not attempt.interrupted, reversed(_tries(view))))
    left = {name for name, (_, at) in _flights(reversed(certain)).items() if view.now < at + FLIGHT}
    wanted = [it for it in at.judged if can_prove(it) and it.instance not in left and not is_proven(it, at.sent)]
    return {worker.instance: worker.serializer for worker in wanted}


def _noted(at: Workplace | None) -> Data:
    """The first look at the queues, to be compared with the later ones."""
    if at is None or at.first:
        return {}
    return {"queues": {depth.queue: [depth.length, depth.oldest] for depth in at.fleet.queues}}


def _complete(action: UpdateAction | None, group: Group) -> Claim:
    if action is None:
        return Claim("update-complete", False, "AWS does not list the update at the moment")
    nodes = ", ".join(f"{node.node} {node.status}" for node in action.nodes)
    told = "; ".join(filter(None, (nodes, f"{action.nodes_updated or 'no ratio'}, members: {len(group.members)}")))
    holds = action.complete_on([member.node for member in group.members])
    return Claim("update-complete", holds, f"{action.update} is {action.status} ({told})")


def _available(group: Group) -> Claim:
    primary = f"primary {group.primary}" if group.primary else "no single primary"
    return Claim("group-available", group.available and group.primary is not None, f"group {group.status}, {primary}")


def _answers(endpoint: Report | str) -> Claim:
    if isinstance(endpoint, str):
        return Claim("endpoint-answers", False, endpoint)
    return Claim("endpoint-answers", endpoint.role == "primary", f"a {endpoint.role} answers at the primary endpoint")


def _one_primary(at: Evidence) -> Claim:
    """Who says it is the primary: never two, and the one whom AWS names unless that node cannot be asked."""
    primaries = [node for node, said in at.members.items() if isinstance(said, Report) and said.role == "primary"]
    unasked = [f"{node}: {said}" for node, said in at.members.items() if isinstance(said, str)]
    ok = primaries == [at.group.primary] or (not primaries and isinstance(at.members.get(at.group.primary or ""), str))
    evidence = f"of {len(at.members)} nodes, this one says that it is the primary: {', '.join(primaries) or 'none'}"
    return Claim("one-primary", ok, "; ".join([evidence, *unasked]))


def _replicas_follow(at: Evidence) -> Claim:
    """The primary lists every replica as online, and no replica that can be asked says that its link is down."""
    if isinstance(at.endpoint, str) or at.endpoint is None:
        return Claim("replicas-follow", False, at.endpoint or "no endpoint")
    wanted = len(at.group.members) - 1
    online = sum(replica.state == "online" for replica in at.endpoint.replicas)
    broken = [n for n, r in at.members.items() if isinstance(r, Report) and r.role == "replica" and not r.link_up]
    evidence = f"{online} of {wanted} replicas online"
    return Claim(
        "replicas-follow", online >= wanted and not broken, "; ".join([evidence, *(f"{n}: link down" for n in broken)])
    )


def _nothing_stuck(stuck: tuple[Finding, ...], at: Evidence) -> Claim:
    """Nothing that recovery could cure, and no chord that got stuck since the patch began."""
    curable = [finding for finding in stuck if finding.curable]
    judged = [finding for finding in stuck if not finding.curable]
    new = [it for it in judged if it.kind == "chord" and it.id not in at.earlier and it.diagnosis not in TOLD]
    evidence = [f"{len(curable)} stuck for longer than {length(at.min_age)}{_first(curable)}"]
    if judged:
        known = f"{len(new)} of them chords that were not stuck before the patch{_first(new)}"
        evidence.append(f"{len(judged)} that only a person can judge, {known}")
    if new and at.waived:
        evidence.append(f"somebody answers for these: {at.waived}")
    return Claim("nothing-stuck", not curable and (not new or bool(at.waived)), "; ".join(evidence))


def _first(findings: list[Finding]) -> str:
    return f", first {findings[0].kind} {findings[0].id}: {findings[0].reason}" if findings else ""
