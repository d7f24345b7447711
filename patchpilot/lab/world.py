"""What the simulated ElastiCache account holds: facts that never change in place, and the one place that replaces them.

A reader takes a :class:`View` and has a consistent picture of one moment, also of an earlier one if it kept the view.
Texts, statuses and their order follow what AWS documents and what people published in logs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeVar

from patchpilot.clock import SYSTEM, Clock
from patchpilot.lab.launch import Address

_K = TypeVar("_K")
_V = TypeVar("_V")

NODE = "0001"
"""The id of the only cache node of a cache cluster, and of the only node group of a group without cluster mode."""

AVAILABLE = "available"
MODIFYING = "modifying"
APPLICABLE = ("not-applied", "stopped", "scheduled")
"""Statuses from which an update action can be applied."""
UNDER_WAY = ("waiting-to-start", "in-progress")
"""Statuses in which nodes are replaced."""

_KEPT = 10_000
"""How many earlier views are remembered, for answers that lag behind."""


class Milestone(StrEnum):
    """What a scenario counts from: the first time that it happens."""

    START = "start"
    """The API begins to answer."""
    ASKED = "asked"
    """Somebody calls BatchApplyUpdateAction, ModifyReplicationGroup or TestFailover; before anything comes of it."""
    APPLIED = "applied"
    """An operation on the nodes begins, whoever asked for it: the update leaves `not-applied`, say."""
    FAILOVER = "failover"
    """Another node is the primary."""
    COMPLETE = "complete"
    """That operation is complete."""


PARAMETERS = MappingProxyType(
    {
        "close-on-replica-write": "yes",
        "maxmemory-policy": "noeviction",
        "reserved-memory-percent": "25",
        "timeout": "0",
    }
)
"""What of a parameter group matters for a failover, set as it should be for a broker."""


@dataclass(frozen=True, slots=True)
class Member:
    """One node of a replication group; ElastiCache calls it a cache cluster."""

    cluster_id: str
    address: Address
    zone: str
    status: str = AVAILABLE
    engine: str | None = None
    """What this node is already, or still, while the group is being modified; None for what the group is."""
    engine_version: str | None = None
    node_type: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot of a replication group."""

    name: str
    taken: datetime
    status: str = AVAILABLE
    source: str = "automated"


@dataclass(frozen=True, slots=True)
class Group:
    """One replication group without cluster mode."""

    group_id: str
    endpoint: Address
    members: tuple[Member, ...]
    primary_id: str
    created: datetime
    status: str = AVAILABLE
    engine: str = "valkey"
    engine_version: str = "9.1"
    node_type: str = "cache.r7g.large"
    description: str = "a lab's broker"
    maintenance_window: str = "sun:03:00-sun:04:00"
    snapshot_window: str = "01:00-02:00"
    snapshots: tuple[Snapshot, ...] = ()
    parameter_group: str = "lab-broker-parameters"
    parameters: Mapping[str, str] = field(default_factory=lambda: dict(PARAMETERS))
    pending: Mapping[str, str] = field(default_factory=dict)
    """What was asked for and not applied yet: ``engine``, ``engine_version``, ``node_type``."""

    def role(self, cluster_id: str) -> str:
        """The `CurrentRole` of a member."""
        return "primary" if cluster_id == self.primary_id else "replica"


@dataclass(frozen=True, slots=True)
class ServiceUpdate:
    """A service update, with its three dates kept apart."""

    name: str
    engine: str
    released: datetime
    recommended_by: datetime
    """The update is compliant if it is applied by then."""
    ends: datetime
    """After this the update cannot be applied any more."""
    engine_version: str = "9.1"
    severity: str = "important"
    status: str = "available"
    kind: str = "security-update"
    automatic: bool = False
    """Whether AWS schedules it into a maintenance window by itself after ``recommended_by``."""
    estimate: str = "30 minutes per node"
    description: str = "Security fixes"


@dataclass(frozen=True, slots=True)
class NodeUpdate:
    """How far an update is on one node."""

    cluster_id: str
    modified: datetime
    status: str = "not-applied"
    initiated: datetime | None = None
    initiated_by: str | None = None
    started: datetime | None = None
    ended: datetime | None = None


@dataclass(frozen=True, slots=True)
class UpdateAction:
    """One service update for one replication group."""

    update: str
    group_id: str
    modified: datetime
    nodes: tuple[NodeUpdate, ...]
    status: str = "not-applied"

    @property
    def updated(self) -> int:
        """How many nodes are done."""
        return sum(node.status == "complete" for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Event:
    """One row of DescribeEvents."""

    source_type: str
    source: str
    message: str
    date: datetime


ActionKey = tuple[str, str]
"""The name of a service update and the id of a replication group."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything in the account at one moment."""

    groups: Mapping[str, Group] = field(default_factory=dict)
    updates: Mapping[str, ServiceUpdate] = field(default_factory=dict)
    actions: Mapping[ActionKey, UpdateAction] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


class World:
    """The account, in one region. Thread safe.

    :param region: other regions of the account are empty.
    """

    def __init__(self, *, region: str = "eu-central-1", account: str = "123456789012", clock: Clock = SYSTEM) -> None:
        self.region = region
        self.account = account
        self.clock = clock
        self._lock = threading.RLock()
        self._view = View()
        self._earlier = deque([(clock.now(), self._view)], maxlen=_KEPT)
        self._reached: dict[Milestone, datetime] = {}

    def now(self) -> datetime:
        """The time as AWS writes it: UTC, to the millisecond."""
        now = self.clock.now()
        return now.replace(microsecond=now.microsecond // 1000 * 1000)

    def view(self) -> View:
        """What the account holds now."""
        return self._view

    def view_at(self, moment: datetime) -> View:
        """What the account held at ``moment``; before :attr:`Milestone.START`, what it held then."""
        with self._lock:
            return next((view for at, view in reversed(self._earlier) if at <= moment), self._earlier[0][1])

    def start(self) -> None:
        """The account is as it should be in the beginning: what comes from now on is history."""
        with self._lock:
            self._earlier.clear()
            self._change()
            self.reach(Milestone.START)

    def reach(self, milestone: Milestone) -> None:
        """Note that something happens. Only the first time counts."""
        with self._lock:
            self._reached.setdefault(milestone, self.clock.now())

    def reached(self, milestone: Milestone) -> datetime | None:
        """When that happened first; None if it has not yet."""
        return self._reached.get(milestone)

    def arn(self, kind: str, name: str) -> str:
        """The ARN of a resource of this account."""
        return f"arn:aws:elasticache:{self.region}:{self.account}:{kind}:{name}"

    def add_group(self, group: Group) -> None:
        """Create a replication group; every service update for its engine applies to it."""
        with self._lock:
            self._change(groups=_with(self._view.groups, group.group_id, group))
            self._make_actions()

    def add_update(self, update: ServiceUpdate) -> None:
        """Publish a service update; it applies to every group of its engine."""
        with self._lock:
            self._change(updates=_with(self._view.updates, update.name, update))
            self._make_actions()

    def publish(self, source_type: str, source: str, message: str) -> None:
        """Append an event, dated now."""
        with self._lock:
            event = Event(source_type, source, message, self.now())
            self._change(events=(*self._view.events, event))

    def claim(self, group_id: str) -> bool:
        """Take a group out of `available` for an operation that changes it; False if another one has done so."""
        with self._lock:
            if self._view.groups[group_id].status != AVAILABLE:
                return False
            self.change_group(group_id, status=MODIFYING)
            return True

    def change_group(self, group_id: str, *, status: str | None = None, primary_id: str | None = None) -> None:
        """Give a group another status or another primary."""
        with self._lock:
            group = self._view.groups[group_id]
            changed = replace(group, status=status or group.status, primary_id=primary_id or group.primary_id)
            self._change(groups=_with(self._view.groups, group_id, changed))
            if changed.primary_id != group.primary_id:
                self.reach(Milestone.FAILOVER)

    def modify_group(self, group_id: str, **what: Any) -> None:
        """Change what a group is, or what is pending."""
        with self._lock:
            self._change(groups=_with(self._view.groups, group_id, replace(self._view.groups[group_id], **what)))

    def change_member(self, group_id: str, cluster_id: str, **what: Any) -> None:
        """Give one node another status, or what it becomes when the group is modified."""
        with self._lock:
            group = self._view.groups[group_id]
            members = tuple(
                replace(member, **what) if member.cluster_id == cluster_id else member for member in group.members
            )
            self._change(groups=_with(self._view.groups, group_id, replace(group, members=members)))

    def change_action(
        self, key: ActionKey, status: str, *, nodes: Callable[[NodeUpdate], NodeUpdate] | None = None
    ) -> UpdateAction:
        """Give an update action another status, and its nodes what ``nodes`` makes of them."""
        with self._lock:
            action = self._view.actions[key]
            rows = tuple(map(nodes, action.nodes)) if nodes else action.nodes
            changed = replace(action, status=status, nodes=rows, modified=self.now())
            self._change(actions=_with(self._view.actions, key, changed))
            if status == "complete":
                self.reach(Milestone.COMPLETE)
            return changed

    def start_action(self, key: ActionKey, *, by: str = "customer") -> UpdateAction | None:
        """Apply an update: from an applicable status to `waiting-to-start`; None if that is not possible now."""
        with self._lock:
            action = self._view.actions[key]
            if action.status not in APPLICABLE or not self.claim(action.group_id):
                return None
            now = self.now()

            def queue(node: NodeUpdate) -> NodeUpdate:
                if node.status == "complete":
                    return node
                return replace(node, status="waiting-to-start", initiated=now, initiated_by=by, modified=now)

            self.reach(Milestone.APPLIED)
            return self.change_action(key, "waiting-to-start", nodes=queue)

    def stop_action(self, key: ActionKey) -> UpdateAction | None:
        """Ask for an update to stop after the node in progress; None if it is not under way."""
        with self._lock:
            if self._view.actions[key].status not in UNDER_WAY:
                return None
            return self.change_action(key, "stopping")

    def supersede(self, key: ActionKey, by: ServiceUpdate | None) -> None:
        """Make an update inapplicable to a group, unless it is complete there, and publish the one that replaces it."""
        with self._lock:
            if self._view.actions[key].status != "complete":
                self.change_action(key, "not-applicable")
            if by is not None:
                self.add_update(by)

    def _change(self, **what: Any) -> None:
        with self._lock:
            self._view = replace(self._view, **what)
            self._earlier.append((self.clock.now(), self._view))

    def _make_actions(self) -> None:
        actions = dict(self._view.actions)
        for update in self._view.updates.values():
            for group in self._view.groups.values():
                if update.engine == group.engine:
                    now = self.now()
                    nodes = tuple(NodeUpdate(member.cluster_id, now) for member in group.members)
                    key = (update.name, group.group_id)
                    actions.setdefault(key, UpdateAction(update.name, group.group_id, now, nodes))
        self._change(actions=MappingProxyType(actions))


LAB_UPDATE = "elasticache-valkey-9-1-3-update-20261101"


def lab_update(now: datetime) -> ServiceUpdate:
    """The security update that every lab starts with: released, important, and not overdue."""
    return ServiceUpdate(
        name=LAB_UPDATE,
        engine="valkey",
        released=now - timedelta(days=7),
        recommended_by=now + timedelta(days=23),
        ends=now + timedelta(days=83),
        automatic=True,
        description="Security fixes for Valkey 9.1",
    )


def _with(mapping: Mapping[_K, _V], key: _K, value: _V) -> Mapping[_K, _V]:
    return MappingProxyType({**mapping, key: value})
