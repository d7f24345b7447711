"""Phase 3: follow the rotation until AWS has updated every node.

Completion comes from the update action, node by node; events corroborate and are not needed. Failovers come from events
or, where AWS tells of none, from the roles of the nodes.
"""

from __future__ import annotations

from datetime import datetime

from patchpilot.elasticache.facts import Event, Group, UpdateAction, UpdateStatus
from patchpilot.engine.plan import Contradicted, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.errors import NeedsOperator, PatchpilotError, Unsafe
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import length, moment, noted
from patchpilot.phases.p2_trigger import find
from patchpilot.phases.rotation import SKEW, Rotation
from patchpilot.settings import Runbook


class Watch(Phase):
    """Follow the rotation."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("watch", "follow the rotation", (FollowRotation(desk),))


class FollowRotation(Step):
    """The update is complete on every node, and the group is available again."""

    name = "watch"
    title = "follow the rotation until every node is updated"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        trigger = view.facts["trigger"]
        action = find(self._desk, trigger["update"])
        group = self._desk.cloud.group(self._desk.group)
        happened = events(self._desk, group, moment(trigger["since"]), view.now)
        return look(view, action, group, happened, self._desk.runbook)


def events(desk: Desk, group: Group, since: datetime, now: datetime) -> tuple[Event, ...]:
    """All events of the group and its nodes since shortly before ``since``: windows that overlap as far as can be."""
    sources = {desk.group, *(member.node for member in group.members)}
    return desk.cloud.events(sources, since - SKEW, now)


def look(
    view: View, action: UpdateAction | None, group: Group, happened: tuple[Event, ...], runbook: Runbook
) -> Observation:
    """What to make of one look at the group. Pure."""
    rotation = _known(view).follow(group.primary, happened, view.now)
    seen = {
        "status": action.status if action else None,
        "group": group.status,
        "nodes": {node.node: noted(node) for node in action.nodes} if action else view.seen.get("nodes", {}),
        "rotation": rotation.note(),
    }
    if action is not None and action.complete and group.available:
        return Reached({**seen, "completed": noted(view.now), "events": noted(happened), "sla_met": action.sla_met})
    problem = _problem(view, action, runbook)
    return Contradicted(problem, seen) if problem else NotYet(_progress(action, group, rotation), seen=seen)


def _known(view: View) -> Rotation:
    if view.seen:
        return Rotation.of(view.seen["rotation"])
    trigger = view.facts["trigger"]
    return Rotation(primary=trigger["primary"], primary_since=moment(trigger["since"]))


def _problem(view: View, action: UpdateAction | None, runbook: Runbook) -> PatchpilotError | None:
    """Why waiting on would be wrong."""
    if action is not None and action.status == UpdateStatus.STOPPED:
        return NeedsOperator(
            f"somebody stopped {action.update} ({action.nodes_updated} nodes are updated): apply it again with `aws "
            f"elasticache batch-apply-update-action --service-update-name {action.update} --replication-group-ids "
            f"{action.group}`, then run the same command again"
        )
    if action is not None and action.status == UpdateStatus.NOT_APPLICABLE:
        return Unsafe(f"{action.update} ceased to apply while it ran: look at the group in the console")
    began = max(filter(None, (view.intended_at, view.contradicted_at)), default=view.since)
    if view.now >= began + runbook.stall:
        return Unsafe(
            f"the rotation has not come to its end within {length(runbook.stall)}: look at the group in the console; "
            "the same command goes on watching"
        )
    return None


def _progress(action: UpdateAction | None, group: Group, rotation: Rotation) -> str:
    if action is None:
        return "AWS does not list the update at the moment"
    done = sum(node.status == UpdateStatus.COMPLETE for node in action.nodes)
    nodes = ", ".join(f"{node.node} {node.status}" for node in action.nodes)
    failovers = f"; failovers so far: {len(rotation.failovers)}" if rotation.failovers else ""
    return f"update {action.status}, {done}/{len(action.nodes)} nodes done ({nodes}); group {group.status}{failovers}"
