"""The account's contents as rows of the ElastiCache API, member by member as botocore's model names them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from patchpilot.lab.launch import Address
from patchpilot.lab.world import NODE, Event, Group, Member, NodeUpdate, ServiceUpdate, Snapshot, UpdateAction, World

Row = dict[str, Any]

_SNAPSHOT_DAYS = 7


def replication_group(world: World, group: Group) -> Row:
    """A row of DescribeReplicationGroups."""
    replicas = [member for member in group.members if member.cluster_id != group.primary_id]
    node_group = {
        "NodeGroupId": NODE,
        "Status": group.status,
        "PrimaryEndpoint": _endpoint(group.endpoint),
        "NodeGroupMembers": [_member(group, member) for member in group.members],
    }
    if replicas:
        node_group["ReaderEndpoint"] = _endpoint(replicas[0].address)
    return {
        "ReplicationGroupId": group.group_id,
        "Description": group.description,
        "Status": group.status,
        "PendingModifiedValues": {},
        "MemberClusters": [member.cluster_id for member in group.members],
        "NodeGroups": [node_group],
        "AutomaticFailover": "enabled",
        "MultiAZ": "enabled",
        "SnapshotRetentionLimit": _SNAPSHOT_DAYS,
        "SnapshotWindow": group.snapshot_window,
        "ClusterEnabled": False,
        "ClusterMode": "disabled",
        "CacheNodeType": group.node_type,
        "AuthTokenEnabled": False,
        "TransitEncryptionEnabled": False,
        "AtRestEncryptionEnabled": False,
        "ARN": world.arn("replicationgroup", group.group_id),
        "UserGroupIds": [],
        "LogDeliveryConfigurations": [],
        "ReplicationGroupCreateTime": group.created,
        "DataTiering": "disabled",
        "AutoMinorVersionUpgrade": False,
        "NetworkType": "ipv4",
        "IpDiscovery": "ipv4",
        "Engine": group.engine,
        # Durable groups need cluster mode, which Celery's transport does not speak.
        "Durability": "disabled",
        "EffectiveDurability": "disabled",
    }


def cache_cluster(world: World, group: Group, member: Member, *, nodes: bool) -> Row:
    """A row of DescribeCacheClusters.

    :param nodes: `ShowCacheNodeInfo`.
    """
    row: Row = {
        "CacheClusterId": member.cluster_id,
        "CacheNodeType": member.node_type or group.node_type,
        "Engine": member.engine or group.engine,
        "EngineVersion": member.engine_version or group.engine_version,
        "CacheClusterStatus": member.status,
        "NumCacheNodes": 1,
        "PreferredAvailabilityZone": member.zone,
        "CacheClusterCreateTime": group.created,
        "PreferredMaintenanceWindow": group.maintenance_window,
        "PendingModifiedValues": _pending(group),
        "CacheSecurityGroups": [],
        "CacheParameterGroup": {
            "CacheParameterGroupName": group.parameter_group,
            "ParameterApplyStatus": "in-sync",
            "CacheNodeIdsToReboot": [],
        },
        "CacheSubnetGroupName": "lab",
        "AutoMinorVersionUpgrade": False,
        "SecurityGroups": [],
        "ReplicationGroupId": group.group_id,
        "SnapshotRetentionLimit": 0,
        "SnapshotWindow": group.snapshot_window,
        "AuthTokenEnabled": False,
        "TransitEncryptionEnabled": False,
        "AtRestEncryptionEnabled": False,
        "ARN": world.arn("cluster", member.cluster_id),
        "ReplicationGroupLogDeliveryEnabled": False,
        "LogDeliveryConfigurations": [],
        "NetworkType": "ipv4",
        "IpDiscovery": "ipv4",
    }
    if nodes:
        row["CacheNodes"] = [
            {
                "CacheNodeId": NODE,
                "CacheNodeStatus": member.status,
                "CacheNodeCreateTime": group.created,
                "Endpoint": _endpoint(member.address),
                "ParameterGroupStatus": "in-sync",
                "CustomerAvailabilityZone": member.zone,
            }
        ]
    return row


def parameter(name: str, value: str) -> Row:
    """A row of DescribeCacheParameters."""
    return {
        "ParameterName": name,
        "ParameterValue": value,
        "Source": "user",
        "DataType": "integer" if value.isdecimal() else "string",
        "IsModifiable": True,
        "MinimumEngineVersion": "7.2.4",
        "ChangeType": "immediate",
    }


def snapshot(world: World, group: Group, taken: Snapshot) -> Row:
    """A row of DescribeSnapshots."""
    return {
        "SnapshotName": taken.name,
        "ReplicationGroupId": group.group_id,
        "ReplicationGroupDescription": group.description,
        "SnapshotStatus": taken.status,
        "SnapshotSource": taken.source,
        "CacheNodeType": group.node_type,
        "Engine": group.engine,
        "EngineVersion": group.engine_version,
        "CacheParameterGroupName": group.parameter_group,
        "SnapshotRetentionLimit": _SNAPSHOT_DAYS,
        "SnapshotWindow": group.snapshot_window,
        "NumNodeGroups": 1,
        "AutomaticFailover": "enabled",
        "NodeSnapshots": [
            {
                "CacheClusterId": group.members[-1].cluster_id,
                "NodeGroupId": NODE,
                "CacheNodeId": NODE,
                "CacheSize": "1 MB",
                "CacheNodeCreateTime": group.created,
                "SnapshotCreateTime": taken.taken,
            }
        ],
        "ARN": world.arn("snapshot", taken.name),
        "DataTiering": "disabled",
    }


def engine_version(engine: str, version: str) -> Row:
    """A row of DescribeCacheEngineVersions."""
    major = version.partition(".")[0]
    return {
        "Engine": engine,
        "EngineVersion": version,
        "CacheParameterGroupFamily": f"{engine}6.x" if (engine, major) == ("redis", "6") else f"{engine}{major}",
        "CacheEngineDescription": engine.capitalize(),
        "CacheEngineVersionDescription": f"{engine} version {version}",
    }


def service_update(update: ServiceUpdate) -> Row:
    """A row of DescribeServiceUpdates."""
    return {
        "ServiceUpdateName": update.name,
        "ServiceUpdateReleaseDate": update.released,
        "ServiceUpdateEndDate": update.ends,
        "ServiceUpdateSeverity": update.severity,
        "ServiceUpdateRecommendedApplyByDate": update.recommended_by,
        "ServiceUpdateStatus": update.status,
        "ServiceUpdateDescription": update.description,
        "ServiceUpdateType": update.kind,
        "Engine": update.engine,
        "EngineVersion": update.engine_version,
        "AutoUpdateAfterRecommendedApplyByDate": update.automatic,
        "EstimatedUpdateTime": update.estimate,
    }


def update_action(action: UpdateAction, update: ServiceUpdate, *, nodes: bool) -> Row:
    """A row of DescribeUpdateActions.

    :param nodes: `ShowNodeLevelUpdateStatus`.
    """
    in_time = action.status == "complete" and action.modified <= update.recommended_by
    row: Row = {
        "ReplicationGroupId": action.group_id,
        "ServiceUpdateName": update.name,
        "ServiceUpdateReleaseDate": update.released,
        "ServiceUpdateSeverity": update.severity,
        "ServiceUpdateStatus": update.status,
        "ServiceUpdateRecommendedApplyByDate": update.recommended_by,
        "ServiceUpdateType": update.kind,
        "UpdateActionAvailableDate": update.released,
        "UpdateActionStatus": action.status,
        "NodesUpdated": f"{action.updated}/{len(action.nodes)}",
        "UpdateActionStatusModifiedDate": action.modified,
        "SlaMet": "yes" if in_time else "no",
        "EstimatedUpdateTime": update.estimate,
        "Engine": update.engine,
    }
    if nodes:
        rows = [_node_update(node) for node in action.nodes]
        row["NodeGroupUpdateStatus"] = [{"NodeGroupId": NODE, "NodeGroupMemberUpdateStatus": rows}]
    return row


def event(happened: Event) -> Row:
    """A row of DescribeEvents."""
    return {
        "SourceIdentifier": happened.source,
        "SourceType": happened.source_type,
        "Message": happened.message,
        "Date": happened.date,
    }


def _member(group: Group, member: Member) -> Row:
    return {
        "CacheClusterId": member.cluster_id,
        "CacheNodeId": NODE,
        "ReadEndpoint": _endpoint(member.address),
        "PreferredAvailabilityZone": member.zone,
        "CurrentRole": group.role(member.cluster_id),
    }


def _node_update(node: NodeUpdate) -> Row:
    row: dict[str, str | datetime | None] = {
        "CacheClusterId": node.cluster_id,
        "CacheNodeId": NODE,
        "NodeUpdateStatus": node.status,
        "NodeUpdateStartDate": node.started,
        "NodeUpdateEndDate": node.ended,
        "NodeUpdateInitiatedBy": node.initiated_by,
        "NodeUpdateInitiatedDate": node.initiated,
        "NodeUpdateStatusModifiedDate": node.modified,
    }
    return {key: value for key, value in row.items() if value is not None}


def _pending(group: Group) -> Row:
    """What a node shows as pending; a change of the engine shows as one of its version."""
    words = {"engine_version": "EngineVersion", "node_type": "CacheNodeType"}
    return {word: group.pending[name] for name, word in words.items() if name in group.pending}


def _endpoint(address: Address) -> Row:
    return {"Address": address.host, "Port": address.port}
