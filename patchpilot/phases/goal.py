"""What has to be proven of the operation itself, at the end."""

from __future__ import annotations

from patchpilot.elasticache.facts import UpdateAction
from patchpilot.engine.plan import View
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import moment
from patchpilot.phases.operations import Sign, operation
from patchpilot.phases.order import Kind
from patchpilot.phases.p3_watch import rotated
from patchpilot.phases.sight import look_around


def find(desk: Desk, update: str | None) -> UpdateAction | None:
    """The update action, or None while AWS does not list it: unknown then, neither done nor undone."""
    return next((action for action in desk.cloud.update_actions(desk.group) if action.update == update), None)


def other_goal(desk: Desk, view: View) -> tuple[str, bool, str] | None:
    """The claim, whether it holds, and the evidence; None if it is just that the service update is complete."""
    kind, trigger = operation(desk), view.facts["trigger"]
    aborted = bool(view.facts["watch"].get("abort"))
    if kind.kind is Kind.SERVICE_UPDATE and not aborted:
        return None
    sight = look_around(
        desk, view.now, since=moment(trigger["since"]), actions=kind.by_actions, nodes=kind.by_nodes, reports=True
    )
    baseline = {**trigger["baseline"], "begun": True, "followed": rotated(view.facts).get("update")}
    standing = kind.standing(baseline, sight, tried=True)
    holds, evidence = kind.proof(standing, aborted=aborted)
    if aborted and standing.sign is Sign.UNKNOWN:
        # It was unlisted for long already when it was given up, and may stay so.
        holds, evidence = sight.calm, f"{evidence}; the group is {sight.group.status}"
    return ("operation-stopped" if aborted else "operation-complete"), holds, evidence
