"""What has to be proven of the operation itself, at the end."""

from __future__ import annotations

from dataclasses import dataclass

from patchpilot.elasticache.facts import UpdateAction
from patchpilot.engine.plan import View
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import moment
from patchpilot.phases.operations import Sign, operation
from patchpilot.phases.order import Kind
from patchpilot.phases.p3_watch import baseline, rotated
from patchpilot.phases.proofs import Claim
from patchpilot.phases.sight import look_around


@dataclass(frozen=True)
class Goal:
    """What is claimed of the operation, if that is not that a service update is complete."""

    claim: Claim
    came_to: Sign
    """What the operation came to in the end: for the report of one that was to be stopped."""


def find(desk: Desk, update: str | None) -> UpdateAction | None:
    """The update action, or None while AWS does not list it: unknown then, neither done nor undone."""
    return next((action for action in desk.cloud.update_actions(desk.group) if action.update == update), None)


def other_goal(desk: Desk, view: View) -> Goal | None:
    """The claim; None if it is just that the service update is complete."""
    kind, trigger = operation(desk), view.facts["trigger"]
    aborted = bool(view.facts["watch"].get("abort"))
    if kind.kind is Kind.SERVICE_UPDATE and not aborted:
        return None
    sight = look_around(
        desk, view.now, since=moment(trigger["since"]), actions=kind.by_actions, nodes=kind.by_nodes, reports=True
    )
    standing = kind.standing(baseline(trigger, rotated(view.facts)), sight, tried=True)
    holds, evidence = kind.proof(standing, aborted=aborted)
    if aborted and standing.sign is Sign.UNKNOWN:
        # AWS has not said what it is for long already when it was given up, and may never do so.
        holds, evidence = sight.calm, f"{evidence}; the group is {sight.group.status}"
    name = "operation-stopped" if aborted else "operation-complete"
    return Goal(Claim(name, holds, evidence), standing.sign)
