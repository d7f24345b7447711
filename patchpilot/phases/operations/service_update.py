"""A service update: ``BatchApplyUpdateAction``, followed node by node in ``DescribeUpdateActions``."""

from __future__ import annotations

from datetime import datetime

from patchpilot.elasticache.facts import (
    APPLICABLE,
    IN_FLIGHT,
    Application,
    UpdateAction,
    UpdateStatus,
)
from patchpilot.engine.plan import Data
from patchpilot.errors import NothingToDo, Unsafe
from patchpilot.phases.choice import Choice, Offer, choose
from patchpilot.phases.notes import noted
from patchpilot.phases.operations.base import Operation, Sign, Standing
from patchpilot.phases.order import Kind
from patchpilot.phases.sight import Sight


class ServiceUpdateOperation(Operation):
    """Apply a service update, from ``not-applied``, ``stopped`` or ``scheduled`` only."""

    kind = Kind.SERVICE_UPDATE
    begins = "start the update, unless it runs already"
    stoppable = True
    by_nodes = False
    by_actions = True

    def choose(self, offer: Offer, now: datetime) -> Choice:
        return choose(offer.actions, offer.updates, now, self.desk.order.update, offer.meant.get("update"))

    def baseline(self, aim: Data, sight: Sight) -> Data:
        action = sight.action(aim["update"])
        return {
            "update": aim["update"],
            "status": action.status if action else None,
            "nodes": noted(action.nodes) if action else [],
            "modified": noted(action.modified) if action else None,
        }

    def standing(self, baseline: Data, sight: Sight, *, tried: bool) -> Standing:
        members = {member.node for member in sight.group.members}
        return standing(sight.action(baseline["update"]), members, baseline, tried=tried)

    def start(self, baseline: Data) -> Application:
        return self.desk.cloud.apply(baseline["update"], self.desk.group)


def standing(action: UpdateAction | None, members: set[str], baseline: Data, *, tried: bool) -> Standing:
    """What an update action means. Absent means unknown, never done."""
    if action is None:
        return Standing(Sign.UNKNOWN, why="AWS does not list the update for this group at the moment")
    sign, why, error = _sign(action, members, baseline, tried=tried)
    dates = [date for node in action.nodes for date in (node.initiated, node.started) if date]
    return Standing(
        sign,
        action.status,
        why,
        rows={node.node: noted(node) for node in action.nodes},
        initiated_by=tuple(sorted({node.initiated_by for node in action.nodes if node.initiated_by})),
        began=min(dates, default=None),
        error=error,
        update=action.update,
        detail={"group": action.group, "sla_met": action.sla_met, "nodes_updated": action.nodes_updated},
    )


def _sign(
    action: UpdateAction, members: set[str], baseline: Data, *, tried: bool
) -> tuple[Sign, str, NothingToDo | Unsafe | None]:
    if action.status in IN_FLIGHT:
        return Sign.RUNNING, "", None
    if action.status == UpdateStatus.COMPLETE:
        if action.complete_on(members):
            return Sign.OVER, "", None
        done = sum(node.status == UpdateStatus.COMPLETE for node in action.nodes)
        told = f"{done} of {len(action.nodes)} rows, {action.nodes_updated or 'no ratio'}, {len(members)} members"
        return Sign.RUNNING, f"AWS shows it as complete, but not on every node ({told})", None
    if action.status == UpdateStatus.SCHEDULING:
        return Sign.BUSY, "AWS is scheduling the update by itself", None
    if action.status == UpdateStatus.STOPPED and _ran(action, baseline, tried=tried):
        return Sign.STOPPED, "", None
    if action.status in APPLICABLE:
        return Sign.READY, "", None
    if action.status == UpdateStatus.NOT_APPLICABLE:
        return Sign.IMPOSSIBLE, "", _superseded(action, tried=tried)
    why = f"AWS reports the update as {action.status!r}, which this version does not know"
    # AWS adds words without notice: whatever this one means, what has begun is watched to its end.
    return (Sign.UNKNOWN, why, None) if tried else (Sign.IMPOSSIBLE, "", Unsafe(why))


def _ran(action: UpdateAction, baseline: Data, *, tried: bool) -> bool:
    """Whether an update that is stopped ran since the baseline: then it was stopped after that, and stays so.

    One that was stopped then already did not if nothing of it has changed. Where AWS gives nothing to compare, a
    request of ours may have been what ran.
    """
    if baseline.get("begun") or baseline.get("status") not in {None, UpdateStatus.STOPPED}:
        return True
    rows = {row["node"]: row for row in baseline.get("nodes", ())}
    pairs = [(rows[node.node], noted(node)) for node in action.nodes if node.node in rows]
    if baseline.get("modified") and action.modified:
        pairs.append((baseline["modified"], noted(action.modified)))
    return any(before != now for before, now in pairs) or (tried and not pairs)


def _superseded(action: UpdateAction, *, tried: bool) -> NothingToDo | Unsafe:
    why = f"{action.update} no longer applies to this group; a newer update may have superseded it"
    if not tried:
        return NothingToDo(why)
    return Unsafe(f"{why}, after it was triggered: look at the group in the console")
