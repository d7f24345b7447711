"""What the ElastiCache API says, as frozen facts.

Absent means unknown, never done: fields that AWS may leave out are ``None`` or empty then. Words from AWS's enums are
kept verbatim, because AWS adds to them without notice (the model lists one type of update, the documentation three):
compare them with the ``StrEnum`` members here, which are strings too, and treat anything else as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

Row = Mapping[str, Any]


class UpdateStatus(StrEnum):
    """``UpdateActionStatus``; nodes have the first six."""

    NOT_APPLIED = "not-applied"
    WAITING_TO_START = "waiting-to-start"
    IN_PROGRESS = "in-progress"
    STOPPING = "stopping"
    STOPPED = "stopped"
    COMPLETE = "complete"
    SCHEDULING = "scheduling"
    SCHEDULED = "scheduled"
    NOT_APPLICABLE = "not-applicable"


APPLICABLE = frozenset({UpdateStatus.NOT_APPLIED, UpdateStatus.STOPPED, UpdateStatus.SCHEDULED})
"""Only from these may an update be applied: AWS does not say what applying twice does, and there is no token for it."""

IN_FLIGHT = frozenset({UpdateStatus.WAITING_TO_START, UpdateStatus.IN_PROGRESS, UpdateStatus.STOPPING})
"""Somebody has applied it: we, another person, or AWS."""

AVAILABLE = "available"
"""The status of a group, a node group or a node in good health, and of a service update that can be applied."""

PRIMARY = "primary"
"""The ``CurrentRole`` of the primary. AWS returns roles for groups with cluster mode disabled only."""


@dataclass(frozen=True)
class ServiceUpdate:
    """One service update. Its three dates mean three things."""

    name: str
    status: str
    severity: str = ""
    kind: str = ""
    engine: str = ""
    description: str = ""
    estimate: str = ""
    """AWS's own words: "30 minutes per node", for example."""
    released: datetime | None = None
    recommended_by: datetime | None = None
    """Compliance: ``SlaMet`` is judged by it. Nothing happens on this day by itself, unless ``automatic``."""
    ends: datetime | None = None
    """After this moment the update can no longer be applied."""
    automatic: bool | None = None
    """True: after ``recommended_by`` AWS schedules it into a maintenance window by itself."""

    @classmethod
    def of(cls, row: Row) -> ServiceUpdate:
        return cls(
            name=row.get("ServiceUpdateName", ""),
            status=row.get("ServiceUpdateStatus", ""),
            severity=row.get("ServiceUpdateSeverity", ""),
            kind=row.get("ServiceUpdateType", ""),
            engine=row.get("Engine", ""),
            description=row.get("ServiceUpdateDescription", ""),
            estimate=row.get("EstimatedUpdateTime", ""),
            released=_utc(row.get("ServiceUpdateReleaseDate")),
            recommended_by=_utc(row.get("ServiceUpdateRecommendedApplyByDate")),
            ends=_utc(row.get("ServiceUpdateEndDate")),
            automatic=row.get("AutoUpdateAfterRecommendedApplyByDate"),
        )


@dataclass(frozen=True)
class NodeUpdate:
    """How far an update is on one node."""

    node: str
    """The cache cluster id, which names a node of a replication group."""
    status: str
    started: datetime | None = None
    ended: datetime | None = None
    initiated_by: str = ""
    """``customer`` or ``system``: the latter is AWS applying it by itself."""
    initiated: datetime | None = None

    @classmethod
    def of(cls, row: Row) -> NodeUpdate:
        return cls(
            node=row.get("CacheClusterId", ""),
            status=row.get("NodeUpdateStatus", ""),
            started=_utc(row.get("NodeUpdateStartDate")),
            ended=_utc(row.get("NodeUpdateEndDate")),
            initiated_by=row.get("NodeUpdateInitiatedBy", ""),
            initiated=_utc(row.get("NodeUpdateInitiatedDate")),
        )


@dataclass(frozen=True)
class UpdateAction:
    """How far an update is on one replication group."""

    group: str
    update: str
    status: str
    update_status: str = ""
    """The service update's own status: ``available``, ``cancelled`` or ``expired``."""
    nodes: tuple[NodeUpdate, ...] = ()
    nodes_updated: str = ""
    """AWS's own ratio, as text: "1/3"."""
    sla_met: str = ""
    modified: datetime | None = None

    @classmethod
    def of(cls, row: Row) -> UpdateAction:
        return cls(
            group=row.get("ReplicationGroupId", ""),
            update=row.get("ServiceUpdateName", ""),
            status=row.get("UpdateActionStatus", ""),
            update_status=row.get("ServiceUpdateStatus", ""),
            nodes=tuple(
                NodeUpdate.of(node)
                for node_group in row.get("NodeGroupUpdateStatus", ())
                for node in node_group.get("NodeGroupMemberUpdateStatus", ())
            ),
            nodes_updated=row.get("NodesUpdated", ""),
            sla_met=row.get("SlaMet", ""),
            modified=_utc(row.get("UpdateActionStatusModifiedDate")),
        )

    def complete_on(self, members: Collection[str]) -> bool:
        """Whether AWS shows it as complete, and on every one of ``members``: by a row for each, or by the ratio.

        A row that is missing is not a node that is done. Where rows and ratio contradict each other, neither counts.
        """
        done = {node.node for node in self.nodes if node.status == UpdateStatus.COMPLETE}
        numbers = re.fullmatch(r"(\d+)/(\d+)", self.nodes_updated)
        counted, total = (int(numbers[1]), int(numbers[2])) if numbers else (None, None)
        if self.status != UpdateStatus.COMPLETE or not members or len(done) < len(self.nodes) or counted != total:
            return False
        if counted is not None:
            return counted >= max(len(members), len(done))
        return done.issuperset(members)


@dataclass(frozen=True)
class Member:
    """One node of a replication group."""

    node: str
    role: str = ""
    """``primary`` or ``replica``; empty where AWS does not say."""
    host: str = ""
    port: int = 0
    zone: str = ""


@dataclass(frozen=True)
class Group:
    """One replication group."""

    id: str
    status: str
    members: tuple[Member, ...] = ()
    node_groups: tuple[str, ...] = ()
    """The status of each node group (shard)."""
    node_group_ids: tuple[str, ...] = ()
    automatic_failover: str = ""
    multi_az: str = ""
    cluster_enabled: bool | None = None
    pending: tuple[str, ...] = ()
    """The names of the modifications that wait to be applied."""
    global_datastore: str = ""
    engine: str = ""
    node_type: str = ""
    effective_durability: str = ""
    snapshot_window: str = ""
    """Daily, in UTC: ``05:00-06:00``."""
    endpoint: tuple[str, int] | None = None
    """Host and port of the primary endpoint, which leads to whichever node is the primary."""
    answered: datetime | None = field(default=None, compare=False)
    """When AWS answered, by its own clock and to the second."""
    heard: datetime | None = field(default=None, compare=False)
    """When that answer had arrived, by ours."""

    @classmethod
    def of(cls, row: Row) -> Group:
        return cls(
            id=row.get("ReplicationGroupId", ""),
            status=row.get("Status", ""),
            members=tuple(
                _member(member)
                for node_group in row.get("NodeGroups", ())
                for member in node_group.get("NodeGroupMembers", ())
            ),
            node_groups=tuple(node_group.get("Status", "") for node_group in row.get("NodeGroups", ())),
            node_group_ids=tuple(node_group.get("NodeGroupId", "") for node_group in row.get("NodeGroups", ())),
            automatic_failover=row.get("AutomaticFailover", ""),
            multi_az=row.get("MultiAZ", ""),
            cluster_enabled=row.get("ClusterEnabled"),
            pending=_pending(row),
            global_datastore=row.get("GlobalReplicationGroupInfo", {}).get("GlobalReplicationGroupId", ""),
            engine=row.get("Engine", ""),
            node_type=row.get("CacheNodeType", ""),
            effective_durability=row.get("EffectiveDurability", ""),
            snapshot_window=row.get("SnapshotWindow", ""),
            endpoint=_primary_endpoint(row),
        )

    @property
    def primary(self) -> str | None:
        """The node that AWS calls the primary; None unless there is exactly one."""
        primaries = [member.node for member in self.members if member.role == PRIMARY]
        return primaries[0] if len(primaries) == 1 else None

    @property
    def available(self) -> bool:
        return self.status == AVAILABLE and all(status == AVAILABLE for status in self.node_groups)


@dataclass(frozen=True)
class Node:
    """One node as a cache cluster of its own."""

    node: str
    status: str
    engine_version: str = ""
    pending: tuple[str, ...] = ()
    maintenance_window: str = ""
    """Weekly, in UTC: ``sun:23:00-mon:01:30``."""
    parameter_group: str = ""
    parameters_applied: str = ""
    """``in-sync`` once the node has all the values of its parameter group."""
    engine: str = ""
    node_type: str = ""

    @classmethod
    def of(cls, row: Row) -> Node:
        parameters = row.get("CacheParameterGroup", {})
        return cls(
            node=row.get("CacheClusterId", ""),
            status=row.get("CacheClusterStatus", ""),
            engine_version=row.get("EngineVersion", ""),
            pending=_pending(row),
            maintenance_window=row.get("PreferredMaintenanceWindow", ""),
            parameter_group=parameters.get("CacheParameterGroupName", ""),
            parameters_applied=parameters.get("ParameterApplyStatus", ""),
            engine=row.get("Engine", ""),
            node_type=row.get("CacheNodeType", ""),
        )


@dataclass(frozen=True)
class Snapshot:
    """One snapshot of a replication group."""

    name: str
    status: str
    """``creating`` while it is taken; ``available`` afterwards."""
    source: str = ""
    """``automated`` or ``manual``."""
    taken: datetime | None = None
    """The moment whose data the last of its nodes' snapshots holds."""

    @classmethod
    def of(cls, row: Row) -> Snapshot:
        moments = [node.get("SnapshotCreateTime") for node in row.get("NodeSnapshots", ())]
        return cls(
            name=row.get("SnapshotName", ""),
            status=row.get("SnapshotStatus", ""),
            source=row.get("SnapshotSource", ""),
            taken=_utc(max(filter(None, moments), default=None)),
        )


@dataclass(frozen=True, order=True)
class Event:
    """One event. Equal events are one event: windows overlap, and AWS promises no identity."""

    at: datetime
    source: str
    message: str
    source_type: str = field(default="", compare=False)

    @classmethod
    def of(cls, row: Row) -> Event:
        at = _utc(row.get("Date"))
        return cls(
            at=at or datetime.min.replace(tzinfo=UTC),
            source=row.get("SourceIdentifier", ""),
            message=row.get("Message", ""),
            source_type=row.get("SourceType", ""),
        )


@dataclass(frozen=True)
class Unprocessed:
    """Why AWS did not start an update, in its own words; both are free text."""

    error_type: str
    error_message: str


@dataclass(frozen=True)
class Modification:
    """What to change of a group, in the words of ModifyReplicationGroup; empty is left as it is."""

    engine: str = ""
    engine_version: str = ""
    parameter_group: str = ""
    node_type: str = ""


@dataclass(frozen=True)
class Application:
    """What a request to change a group, or BatchStopUpdateAction, answered. Batch* answer 200 also when they did
    nothing."""

    status: str | None
    """The status of the update action, or of the group, if the request was processed."""
    unprocessed: Unprocessed | None = None


def _primary_endpoint(row: Row) -> tuple[str, int] | None:
    found = [group["PrimaryEndpoint"] for group in row.get("NodeGroups", ()) if group.get("PrimaryEndpoint")]
    return (found[0].get("Address", ""), found[0].get("Port", 0)) if len(found) == 1 else None


def _member(row: Row) -> Member:
    endpoint = row.get("ReadEndpoint", {})
    return Member(
        node=row.get("CacheClusterId", ""),
        role=row.get("CurrentRole", ""),
        host=endpoint.get("Address", ""),
        port=endpoint.get("Port", 0),
        zone=row.get("PreferredAvailabilityZone", ""),
    )


def _pending(row: Row) -> tuple[str, ...]:
    return tuple(
        sorted(name for name, value in row.get("PendingModifiedValues", {}).items() if value not in (None, []))
    )


def _utc(moment: datetime | None) -> datetime | None:
    return moment.astimezone(UTC) if moment is not None else None
