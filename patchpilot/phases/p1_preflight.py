"""Phase 1: is it safe to patch now, and which update? Then recover what is stuck already.

Nothing here changes the cluster, so a resumed run begins with it again, until the update may have been triggered.
"""

from __future__ import annotations

from patchpilot import __version__
from patchpilot.engine.plan import Contradicted, Data, Effect, Observation, Phase, Reached, Step, View
from patchpilot.errors import Blocked, NothingToDo
from patchpilot.phases.checks import Check, Situation, blocking, judge
from patchpilot.phases.choice import choose
from patchpilot.phases.cures import cure, recover
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import noted
from patchpilot.phases.readings import read_endpoint, read_members


class Preflight(Phase):
    """Check that patching is safe, and recover what is stuck."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("preflight", "check that patching is safe", (Readiness(desk), RecoverBeforehand(desk)))


class Readiness(Step):
    """Every check passes, or only warns."""

    name = "readiness"
    title = "check the group, its nodes, the update and PostgreSQL"
    volatile = True

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def intend(self, view: View) -> Data:
        """What this run was asked to do: the report is made from the journal alone."""
        desk = self._desk
        return {
            "version": __version__,
            "cluster": desk.cluster,
            "group": desk.group,
            "role": desk.role,
            "asked": desk.update,
            "grace": desk.runbook.grace.total_seconds(),
            "window": noted(desk.window),
        }

    def observe(self, view: View) -> Observation:
        try:
            situation = read(self._desk, view)
        except NothingToDo as error:
            return Contradicted(error)
        checks = judge(situation)
        failed = blocking(checks, self._desk.role)
        if failed:
            return Contradicted(_refusal(failed), seen={"checks": noted(checks)})
        return Reached({
            "checks": noted(checks),
            "update": noted(situation.choice.update),
            "action": noted(situation.choice.action),
            "adopted": situation.choice.adopted,
            "group": noted(situation.group),
            "versions": {node.node: node.engine_version for node in situation.nodes},
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

    :raises NothingToDo: no update applies.
    :raises Transient: AWS or PostgreSQL could not be asked. Nodes that could not are part of the situation.
    """
    actions = desk.cloud.update_actions(desk.group)
    # The group first: of one that does not exist AWS lists no update action either, and that is not "nothing to do".
    group = desk.cloud.group(desk.group)
    choice = choose(actions, desk.cloud.service_updates(), view.now, desk.update)
    return Situation(
        now=view.now,
        role=desk.role,
        group=group,
        nodes=desk.cloud.nodes(group),
        actions=actions,
        choice=choice,
        endpoint=read_endpoint(desk),
        members=read_members(desk, group),
        schema=desk.schema(),
    )


def _refusal(failed: tuple[Check, ...]) -> Blocked:
    parts = [f"{check.name}: {check.evidence} ({check.mend})" for check in failed]
    return Blocked(f"pre-flight refuses: {'; '.join(parts)}")
