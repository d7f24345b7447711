"""The account's contents as rows of the ElastiCache API, member by member as botocore's model names them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from patchpilot.lab.launch import Address
from patchpilot.lab.world import NODE, Event, Group, Member, NodeUpdate, ServiceUpdate, UpdateAction, World

Row = dict[str, Any]

_MAINTENANCE_WINDOW = "sun:03:00-sun:04:00"
_SNAPSHOT_WINDOW = "01:00-02:00"
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
        "SnapshotWindow": _SNAPSHOT_WINDOW,
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
        "CacheNodeType": group.node_type,
        "Engine": group.engine,
        "EngineVersion": group.engine_version,
        "CacheClusterStatus": member.status,
        "NumCacheNodes": 1,
        "PreferredAvailabilityZone": member.zone,
        "CacheClusterCreateTime": group.created,
        "PreferredMaintenanceWindow": _MAINTENANCE_WINDOW,
        "PendingModifiedValues": {},
        "CacheSecurityGroups": [],
        "CacheParameterGroup": {
            "CacheParameterGroupName": "default.valkey9",
            "ParameterApplyStatus": "in-sync",
            "CacheNodeIdsToReboot": [],
        },
        "CacheSubnetGroupName": "lab",
        "AutoMinorVersionUpgrade": False,
        "SecurityGroups": [],
        "ReplicationGroupId": group.group_id,
        "SnapshotRetentionLimit": 0,
        "SnapshotWindow": _SNAPSHOT_WINDOW,
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


def _endpoint(address: Address) -> Row:
    return {"Address": address.host, "Port": address.port}
