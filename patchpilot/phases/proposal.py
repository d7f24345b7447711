"""What a run would do, and whether the world is still the one for which that was agreed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

from patchpilot.elasticache.facts import Group, Node, ServiceUpdate, UpdateAction, UpdateStatus
from patchpilot.engine.plan import Contradicted, Observation, Reached, Step, View
from patchpilot.engine.requests import stop
from patchpilot.errors import Aborted, Blocked, NothingToDo, Usage
from patchpilot.phases.choice import Choice, Offer
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import length, noted
from patchpilot.phases.operations import operation
from patchpilot.phases.order import Kind, Order
from patchpilot.phases.readings import known

Json = dict[str, Any]

COMPARED = (
    "environment", "cluster", "group", "operation", "aim", "status", "primary", "members", "order", "versions",
    "node_types", "grace", "waived",
)  # fmt: skip
"""What a plan is held to. The rest is for people: AWS may move a date without making the plan another one."""


def offered(
    group: Group,
    nodes: tuple[Node, ...] | str,
    actions: tuple[UpdateAction, ...],
    updates: tuple[ServiceUpdate, ...] | str,
    meant: Mapping[str, str],
) -> Offer:
    """What there is to choose from, as far as AWS says it: what it refuses to say, pre-flight calls unknown."""
    return Offer(
        group, () if isinstance(nodes, str) else nodes, actions, () if isinstance(updates, str) else updates, meant
    )


def propose(desk: Desk, now: datetime, meant: Mapping[str, str] | None = None) -> Json:
    """What a run would do now, with all that it rests on.

    :param meant: as for :class:`~patchpilot.phases.choice.Offer`.

    :raises NothingToDo: nothing.
    :raises NeedsOperator: it cannot be done.
    """
    actions = desk.cloud.update_actions(desk.group)
    group = desk.cloud.group(desk.group)
    updates = known(desk.cloud.service_updates, patient=True)
    offer = offered(group, known(lambda: desk.cloud.nodes(group), patient=True), actions, updates, meant or {})
    choice, nodes = operation(desk).choose(offer, now), offer.nodes
    update = choice.update
    content: Json = {
        "environment": desk.environment,
        "cluster": desk.cluster,
        "group": desk.group,
        "role": desk.role,
        "operation": choice.operation,
        "what": choice.what,
        "aim": dict(choice.aim),
        "status": choice.status,
        "adopted": choice.adopted,
        "primary": group.primary,
        "members": sorted(member.node for member in group.members),
        "order": _order(choice, group),
        "versions": {node.node: f"{node.engine} {node.engine_version}".strip() for node in nodes},
        "node_types": {node.node: node.node_type for node in nodes},
        "grace": desk.runbook.grace.total_seconds(),
        "waived": sorted(desk.waivers),
        "severity": update.severity if update else None,
        "estimate": update.estimate if update else None,
        "dates": {
            "recommended_by": noted(update.recommended_by),
            "ends": noted(update.ends),
            "automatic": update.automatic,
        }
        if update
        else None,
    }
    return content


def _order(choice: Choice, group: Group) -> list[str]:
    """The nodes in the order in which AWS rotates them: the replicas, then the failover, then the old primary."""
    done = {node.node for node in choice.action.nodes if node.status == UpdateStatus.COMPLETE}
    if choice.operation is Kind.TEST_FAILOVER:
        return [group.primary] if group.primary else []
    names = sorted(member.node for member in group.members if member.node not in done)
    return sorted(names, key=lambda name: name == group.primary)


def digest(content: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for exactly this plan."""
    compared = {key: content.get(key) for key in COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]


def changes(planned: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is different, old and new, in one line; empty if nothing is. Pure."""
    different = [key for key in COMPARED if planned.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_said(key, planned.get(key))}, is {_said(key, now.get(key))}" for key in different)


def _said(key: str, value: Any) -> str:
    if key == "grace" and value is not None:
        return f"{value:g} s" if value % 1 else length(timedelta(seconds=value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "nothing"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "nothing"
    return "nothing" if value in {None, ""} else str(value)


def sentence(content: Mapping[str, Any]) -> str:
    """What would be done, in one line."""
    primary = content["primary"]
    if content["operation"] == Kind.TEST_FAILOVER:
        return f"{content['what']}: {content['group']} fails over from {primary} to one of its replicas"
    last = f", {primary} last, after the failover" if primary else ""
    return f"{content['what']} on {content['group']}: {' -> '.join(content['order'])}{last}"


def aim_of(planned: Mapping[str, Any]) -> dict[str, str]:
    """What to ask for, to get what was planned."""
    if not planned:
        return {}
    known = {field.name for field in fields(Order)}
    return {"operation": planned["operation"], **{k: v for k, v in planned["aim"].items() if k in known}}


class HoldToPlan(Step):
    """If the run is held to a plan: what there is to do is what was planned."""

    name = "plan"
    title = "see whether there is to do what was planned, if it was planned"
    volatile = True

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        if request := stop(self._desk.requests()):
            return Contradicted(Aborted(f"ended before anything was started: {request}"))
        if self._desk.gauge:
            self._desk.gauge.newest(view.now)  # whoever may not read it is told now, not in the middle
        asked = self._desk.order.plan
        return Reached({"digest": None}) if asked is None else self._compared(asked, view.now)

    def _compared(self, asked: str, now: datetime) -> Observation:
        held = self._desk.recall(asked)
        if held is None:
            return Contradicted(Usage(f"there is no plan {asked} for this cluster: make one with `patchpilot plan`"))
        if held.get("carried_out_by"):
            return Contradicted(NothingToDo(f"plan {asked} was carried out by run {held['carried_out_by']}"))
        try:
            content = propose(self._desk, now)
        except NothingToDo as reason:
            return Contradicted(_gone(asked, held, reason))
        different = changes(held, content)
        if different:
            return Contradicted(Blocked(f"the world has changed since plan {asked} was made: {different}"))
        return Reached({"digest": digest(content), "proposal": content, "held": held})


def _gone(asked: str, held: Mapping[str, Any], reason: NothingToDo) -> Blocked:
    return Blocked(
        f"the world has changed since plan {asked} was made: {held['what']} was {held['status']}, and now {reason}"
    )
