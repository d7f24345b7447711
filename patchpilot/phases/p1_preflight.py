"""Phase 1: is it safe to patch now, and which update? Then recover what is stuck already.

Nothing here changes the cluster, so a resumed run begins with it again, until the update may have been triggered.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from patchpilot import __version__
from patchpilot.elasticache.facts import Node
from patchpilot.engine.plan import Contradicted, Data, Effect, Observation, Phase, Reached, Step, View
from patchpilot.errors import Blocked, NothingToDo
from patchpilot.phases.checks import Check, Situation, blocking, judge
from patchpilot.phases.cures import cure, recover
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import noted
from patchpilot.phases.operations import operation
from patchpilot.phases.order import Kind
from patchpilot.phases.proofs import before
from patchpilot.phases.proposal import HoldToPlan, offered
from patchpilot.phases.readings import known, made_of, read_endpoint, read_members
from patchpilot.recovery.findings import Finding

PATIENCE = timedelta(minutes=2)
"""How long whoever does not answer is asked again before what only one check needs counts as unknown."""


class Preflight(Phase):
    """Check that patching is safe, and recover what is stuck."""

    def __init__(self, desk: Desk) -> None:
        steps = (HoldToPlan(desk), Readiness(desk), RecoverBeforehand(desk))
        super().__init__("preflight", "check that patching is safe", steps)


class Readiness(Step):
    """Every check passes, or only warns."""

    name = "readiness"
    title = "check the group, the update, the data, the alarms and the workers"
    volatile = True

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def intend(self, view: View) -> Data:
        """What this run was asked to do: the report is made from the journal alone. And what it had set out to do."""
        desk = self._desk
        earlier = view.facts.get(self.name, {}).get("aim")
        return {
            "version": __version__,
            "cluster": desk.cluster,
            "group": desk.group,
            "role": desk.role,
            "asked": desk.order.update,
            "grace": desk.runbook.grace.total_seconds(),
            "window": noted(desk.window),
            "meant": earlier or view.intent.get("meant", {}),
        }

    def observe(self, view: View) -> Observation:
        try:
            situation = read(self._desk, view)
        except NothingToDo as error:
            return Contradicted(_and_stuck(error, _stuck(self._desk, patient=False)))
        checks = judge(situation, self._desk.waivers)
        failed = blocking(checks, self._desk.role)
        said = {"checks": noted(checks), "waivers": dict(self._desk.waivers)}
        if failed:
            return Contradicted(refusal(failed), seen=said)
        return Reached({
            **said,
            "operation": situation.choice.operation,
            "aim": dict(situation.choice.aim),
            "what": situation.choice.what,
            "update": noted(situation.choice.update),
            "action": noted(situation.choice.action) if situation.choice.is_update else None,
            "adopted": situation.choice.adopted,
            "group": noted(situation.group),
            **made_of(situation.nodes),
            "before": before(situation),
        })  # fmt: skip


class RecoverBeforehand(Step):
    """Nothing curable is stuck before the patch, so that what gets stuck later is the patch's doing."""

    name = "recover-beforehand"
    title = "recover what is stuck already"
    effect = Effect.PUBLISH
    volatile = True

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        return cure(self._desk, view)

    def act(self, view: View) -> Data:
        return recover(self._desk, view)


def read(desk: Desk, view: View) -> Situation:
    """Everything the checks look at.

    What only one check needs may stay unknown. Whoever does not answer is given some time for it: a check is unknown
    because of that only if it goes on.

    :raises NothingToDo: no update applies.
    :raises Transient: AWS or PostgreSQL could not be asked. Nodes that could not are part of the situation.
    """
    actions = desk.cloud.update_actions(desk.group)
    # The group first: of one that does not exist AWS lists no update action either, and that is not "nothing to do".
    group = desk.cloud.group(desk.group)
    patient = view.now < view.since + PATIENCE
    updates = known(desk.cloud.service_updates, patient=patient)
    nodes = known(lambda: desk.cloud.nodes(group), patient=patient)
    choice = operation(desk).choose(offered(group, nodes, actions, updates, view.intent.get("meant", {})), view.now)
    members = [member.node for member in group.members]
    return Situation(
        now=view.now,
        role=desk.role,
        group=group,
        actions=actions,
        choice=choice,
        updates=updates,
        nodes=nodes,
        elsewhere=known(desk.cloud.in_flight, patient=patient),
        parameters=_parameters(desk, nodes, patient),
        snapshots=known(lambda: desk.cloud.snapshots(desk.group), patient=patient),
        history=known(lambda: desk.cloud.history(group, view.now), patient=patient),
        alarms=known(lambda: desk.monitoring.alarms([desk.group, *members]), patient=patient),
        metrics=known(lambda: desk.monitoring.metrics(members, view.now), patient=patient) if desk.metrics else None,
        limit=desk.runbook.abort_metric,
        measured=_measured(desk, view.now, patient),
        address=desk.nodes.address if desk.nodes else None,
        endpoint=read_endpoint(desk),
        members=read_members(desk, group),
        fleet=known(desk.workers.look, patient=patient) if desk.workers else None,
        stuck=_stuck(desk, patient),
        schema=desk.schema(),
        offered=known(lambda: desk.cloud.engine_versions(choice.aim["engine"]), patient=patient)
        if choice.operation is Kind.ENGINE_UPGRADE
        else (),
    )


def _parameters(desk: Desk, nodes: tuple[Node, ...] | str, patient: bool) -> Mapping[str, str] | str:
    if isinstance(nodes, str):
        return nodes
    names = sorted({node.parameter_group for node in nodes})
    if len(names) != 1 or not names[0]:
        return f"the nodes have no parameter group in common: {', '.join(filter(None, names)) or 'AWS names none'}"
    return known(lambda: desk.cloud.parameters(names[0]), patient=patient)


def _measured(desk: Desk, now: datetime, patient: bool) -> tuple[float, ...] | str:
    gauge = desk.gauge
    return known(lambda: gauge.newest(now), patient=patient) if gauge else ()


def _stuck(desk: Desk, patient: bool) -> tuple[Finding, ...] | str | None:
    recovery = desk.recovery
    return known(lambda: recovery.survey(desk.window), patient=patient) if recovery else None


def _and_stuck(nothing: NothingToDo, stuck: tuple[Finding, ...] | str | None) -> NothingToDo:
    """No run will recover them: say so."""
    curable = [] if isinstance(stuck, str) else [finding for finding in stuck or () if finding.curable]
    more = f"; {len(curable)} stuck all the same: run `patchpilot recover`" if curable else ""
    return NothingToDo(f"{nothing}{more}")


def refusal(failed: tuple[Check, ...]) -> Blocked:
    """Why not to go on, in one line."""
    parts = [f"{check.name}: {check.evidence} ({check.mend})" for check in failed]
    return Blocked(f"pre-flight refuses: {'; '.join(parts)}")
