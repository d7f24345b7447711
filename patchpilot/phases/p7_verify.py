"""Phase 7: prove that all is well, claim by claim, each with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from patchpilot.elasticache.facts import Group, UpdateAction
from patchpilot.engine.plan import Contradicted, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.errors import VerificationFailed
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import length, moment, noted
from patchpilot.phases.p2_trigger import find
from patchpilot.phases.readings import read_endpoint, read_members
from patchpilot.recovery.findings import Finding
from patchpilot.valkey.nodes import Report


class Verify(Phase):
    """Prove that all is well."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("verify", "prove that all is well", (Prove(desk),))


@dataclass(frozen=True)
class Claim:
    """One thing that has to be true."""

    name: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Evidence:
    """Everything the claims rest on, read at one moment. A string in place of a report says why there is none."""

    action: UpdateAction | None
    group: Group
    endpoint: Report | str | None
    """None for a cluster without an endpoint in the configuration."""
    members: Mapping[str, Report | str]
    stuck: tuple[Finding, ...] | None
    """None for a cluster that is no broker."""
    min_age: timedelta = timedelta()
    """How long something makes no progress before it counts as stuck."""


class Prove(Step):
    """Every claim holds at the same moment."""

    name = "verify"
    title = "prove that the update is complete, the nodes are well and nothing is stuck"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        proof = claims(self._read(view))
        failing = [claim for claim in proof if not claim.holds]
        fact = {"claims": noted(proof), "repeated": self._repeated(view)}
        if not failing:
            return Reached(fact)
        what = "; ".join(f"{claim.name}: {claim.evidence}" for claim in failing)
        if view.now < view.since + self._desk.runbook.verify_timeout:
            return NotYet(what)
        return Contradicted(VerificationFailed(f"verification failed: {what}"), seen=fact)

    def _repeated(self, view: View) -> list[Any]:
        """What may have happened twice in part, for the report: no patch undoes half an execution."""
        age = view.now - moment(view.facts["trigger"]["since"])
        rows = self._desk.recovery.repeated_starts(age) if self._desk.recovery else ()
        return [noted(dict(row)) for row in rows]

    def _read(self, view: View) -> Evidence:
        desk = self._desk
        group = desk.cloud.group(desk.group)
        return Evidence(
            action=find(desk, view.facts["trigger"]["update"]),
            group=group,
            endpoint=read_endpoint(desk) if desk.nodes else None,
            members=read_members(desk, group) if desk.nodes else {},
            stuck=desk.recovery.survey(desk.window) if desk.recovery else None,
            min_age=desk.window.min_age,
        )


def claims(at: Evidence) -> tuple[Claim, ...]:
    """What has to be true, and whether it is. Pure."""
    proof = [_complete(at.action), _available(at.group)]
    if at.endpoint is not None:
        proof += [_answers(at.endpoint), _one_primary(at), _replicas_follow(at)]
    if at.stuck is not None:
        proof.append(_nothing_stuck(at.stuck, at.min_age))
    return tuple(proof)


def _complete(action: UpdateAction | None) -> Claim:
    if action is None:
        return Claim("update-complete", False, "AWS does not list the update at the moment")
    nodes = ", ".join(f"{node.node} {node.status}" for node in action.nodes)
    return Claim(
        "update-complete", action.complete, f"{action.update} is {action.status} ({nodes or action.nodes_updated})"
    )


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


def _nothing_stuck(stuck: tuple[Finding, ...], min_age: timedelta) -> Claim:
    curable = [finding for finding in stuck if finding.curable]
    rest = f", {len(stuck) - len(curable)} that only a person can judge" if len(stuck) > len(curable) else ""
    first = f", first {curable[0].kind} {curable[0].id}: {curable[0].reason}" if curable else ""
    evidence = f"{len(curable)} stuck for longer than {length(min_age)}{first}{rest}"
    return Claim("nothing-stuck", not curable, evidence)
