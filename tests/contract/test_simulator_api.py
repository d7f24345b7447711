"""The simulator's operations through real boto3: filters, pages, faults. An account without nodes can be large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from patchpilot.clock import SYSTEM
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.launch import Address
from patchpilot.lab.world import Group, Member, ServiceUpdate, World, lab_update

GROUPS = 45
UPDATE = "elasticache-valkey-9-1-3-update-20261101"
OLD = "elasticache-redis-7-0-7-update-20240201"


class Idle:
    """An operator that is told what to do and never gets round to it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def rotate(self, update: str) -> None:
        self.told.append(update)

    def test_failover(self) -> None:
        self.told.append("TestFailover")


def group(number: int, engine: str = "valkey") -> Group:
    members = tuple(
        Member(f"group-{number:02d}-{node:03d}", Address("127.0.0.1", 6000 + node), f"eu-central-1{'ab'[node - 1]}")
        for node in (1, 2)
    )
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return Group(f"group-{number:02d}", Address("127.0.0.1", 6379), members, members[0].cluster_id, now, engine=engine)


def old_update() -> ServiceUpdate:
    long_ago = SYSTEM.now() - timedelta(days=900)
    return ServiceUpdate(OLD, "redis", long_ago, long_ago, long_ago, status="expired", severity="critical")


@pytest.fixture
def operators() -> dict[str, Idle]:
    return {"group-01": Idle(), "group-02": Idle()}


@pytest.fixture
def cloud(tmp_path: Path, operators: dict[str, Idle]) -> Iterator[Cloud]:
    world = World()
    for number in range(1, GROUPS + 1):
        world.add_group(group(number))
    world.add_group(group(99, engine="redis"))
    world.add_update(lab_update(world.now()))
    world.add_update(old_update())
    with Cloud(world, operators, calls=tmp_path / "calls.jsonl") as cloud:
        yield cloud


@pytest.fixture
def client(cloud: Cloud, elasticache: Callable[..., Any]) -> Any:
    return elasticache(cloud.url)


def code(call: Callable[..., Any], **parameters: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**parameters)
    return str(caught.value.response["Error"]["Code"])


@pytest.mark.parametrize(
    ("operation", "key", "identity", "total"),
    [
        ("describe_replication_groups", "ReplicationGroups", "ReplicationGroupId", GROUPS + 1),
        ("describe_cache_clusters", "CacheClusters", "CacheClusterId", 2 * GROUPS + 2),
        ("describe_update_actions", "UpdateActions", "ReplicationGroupId", GROUPS + 1),
        ("describe_events", "Events", "Message", 57),
    ],
)
def test_pages_hold_everything_once_and_in_order(
    cloud: Cloud, client: Any, operation: str, key: str, identity: str, total: int
) -> None:
    for number in range(57):
        cloud.world.publish("cache-cluster", "group-01-001", f"event {number:02d}")
    pages = list(client.get_paginator(operation).paginate(PaginationConfig={"PageSize": 20}))
    found = [row[identity] for page in pages for row in page[key]]
    assert len(pages) == -(-total // 20)
    assert len(pages[0][key]) == 20
    assert found == sorted(set(found))
    assert len(found) == total


def test_the_engine_versions_on_offer(client: Any) -> None:
    def versions(**filters: Any) -> list[str]:
        pages = client.get_paginator("describe_cache_engine_versions").paginate(**filters)
        return [row["EngineVersion"] for page in pages for row in page["CacheEngineVersions"]]

    assert len(versions()) == 10
    assert versions(Engine="redis") == ["6.2", "7.0", "7.1"]
    assert versions(Engine="valkey", CacheParameterGroupFamily="valkey8") == ["8.0", "8.1", "8.2"]
    assert versions(EngineVersion="7.2") == ["7.2"]
    assert versions(DefaultOnly=True, Engine="redis") == ["7.1"]
    assert versions(Engine="memcached") == []


def test_a_page_that_was_asked_for_stays_right_while_events_arrive(cloud: Cloud, client: Any) -> None:
    for number in range(30):
        cloud.world.publish("cache-cluster", "group-01-001", f"event {number:02d}")
    first = client.describe_events(MaxRecords=20)
    cloud.world.publish("cache-cluster", "group-01-001", "event 30")
    second = client.describe_events(MaxRecords=20, Marker=first["Marker"])
    assert [row["Message"] for row in second["Events"]] == [f"event {number}" for number in range(20, 31)]


@pytest.mark.parametrize("size", [1, 19, 101])
def test_page_sizes_out_of_range_are_refused(client: Any, size: int) -> None:
    for operation in (client.describe_update_actions, client.describe_service_updates, client.describe_events):
        assert code(operation, MaxRecords=size) == "InvalidParameterValue"


def test_a_marker_is_good_for_its_own_question_only(client: Any) -> None:
    marker = client.describe_update_actions(MaxRecords=20)["Marker"]
    assert code(client.describe_update_actions, Marker=marker, Engine="valkey") == "InvalidParameterValue"
    assert code(client.describe_update_actions, Marker="nonsense") == "InvalidParameterValue"


def test_unknown_names_give_the_modelled_faults(client: Any) -> None:
    faults = client.exceptions
    with pytest.raises(faults.ReplicationGroupNotFoundFault):
        client.describe_replication_groups(ReplicationGroupId="nobody")
    with pytest.raises(faults.CacheClusterNotFoundFault):
        client.describe_cache_clusters(CacheClusterId="nobody")
    with pytest.raises(faults.ServiceUpdateNotFoundFault):
        client.describe_service_updates(ServiceUpdateName="nothing")
    with pytest.raises(faults.ServiceUpdateNotFoundFault):
        client.batch_apply_update_action(ServiceUpdateName="nothing", ReplicationGroupIds=["group-01"])
    with pytest.raises(faults.ServiceUpdateNotFoundFault):
        client.batch_stop_update_action(ServiceUpdateName="nothing", ReplicationGroupIds=["group-01"])
    with pytest.raises(faults.ReplicationGroupNotFoundFault):
        client.test_failover(ReplicationGroupId="nobody", NodeGroupId="0001")
    with pytest.raises(faults.NodeGroupNotFoundFault):
        client.test_failover(ReplicationGroupId="group-01", NodeGroupId="0002")
    with pytest.raises(faults.TestFailoverNotAvailableFault):
        client.test_failover(ReplicationGroupId="group-03", NodeGroupId="0001")


def test_the_update_has_three_dates_that_are_told_apart(client: Any) -> None:
    (update,) = client.describe_service_updates(ServiceUpdateName=UPDATE)["ServiceUpdates"]
    now = SYSTEM.now()
    assert update["ServiceUpdateReleaseDate"] < now
    assert now < update["ServiceUpdateRecommendedApplyByDate"] < update["ServiceUpdateEndDate"]
    assert update["AutoUpdateAfterRecommendedApplyByDate"] is True
    assert update["ServiceUpdateType"] == "security-update"
    assert update["ServiceUpdateSeverity"] == "important"
    assert update["EstimatedUpdateTime"] == "30 minutes per node"
    assert update["Engine"] == "valkey"


def test_service_updates_are_filtered_by_status(client: Any) -> None:
    def names(*statuses: str) -> list[str]:
        rows = client.describe_service_updates(ServiceUpdateStatus=list(statuses))["ServiceUpdates"]
        return [row["ServiceUpdateName"] for row in rows]

    assert names("available") == [UPDATE]
    assert names("expired") == [OLD]
    assert names("cancelled") == []
    assert names("available", "expired") == [UPDATE, OLD]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"ServiceUpdateName": UPDATE}, GROUPS),
        ({"ServiceUpdateName": "nothing"}, 0),
        ({"ReplicationGroupIds": ["group-01", "group-99", "nobody"]}, 2),
        ({"CacheClusterIds": ["group-01-001"]}, 0),
        ({"Engine": "redis"}, 1),
        ({"ServiceUpdateStatus": ["expired"]}, 1),
        ({"UpdateActionStatus": ["not-applied"]}, GROUPS + 1),
        ({"UpdateActionStatus": ["complete", "stopped"]}, 0),
        ({"ServiceUpdateTimeRange": {"StartTime": datetime(2026, 1, 1, tzinfo=UTC)}}, GROUPS),
        ({"ServiceUpdateTimeRange": {"EndTime": datetime(2026, 1, 1, tzinfo=UTC)}}, 1),
        ({"ServiceUpdateName": UPDATE, "Engine": "redis"}, 0),
    ],
)
def test_update_actions_are_filtered(client: Any, filters: dict[str, Any], expected: int) -> None:
    assert len(client.describe_update_actions(**filters)["UpdateActions"]) == expected


def test_node_rows_come_only_if_asked_for(client: Any) -> None:
    question = {"ServiceUpdateName": UPDATE, "ReplicationGroupIds": ["group-01"]}
    (plain,) = client.describe_update_actions(**question)["UpdateActions"]
    assert "NodeGroupUpdateStatus" not in plain
    assert (plain["UpdateActionStatus"], plain["NodesUpdated"], plain["SlaMet"]) == ("not-applied", "0/2", "no")

    (detailed,) = client.describe_update_actions(**question, ShowNodeLevelUpdateStatus=True)["UpdateActions"]
    (node_group,) = detailed["NodeGroupUpdateStatus"]
    rows = {row["CacheClusterId"]: row for row in node_group["NodeGroupMemberUpdateStatus"]}
    assert set(rows) == {"group-01-001", "group-01-002"}
    assert all(row["NodeUpdateStatus"] == "not-applied" for row in rows.values())
    assert not any("NodeUpdateStartDate" in row or "NodeUpdateInitiatedBy" in row for row in rows.values())


def test_cache_nodes_come_only_if_asked_for(client: Any) -> None:
    (plain,) = client.describe_cache_clusters(CacheClusterId="group-01-001")["CacheClusters"]
    assert "CacheNodes" not in plain
    assert plain["ReplicationGroupId"] == "group-01"
    (row,) = client.describe_cache_clusters(CacheClusterId="group-01-002", ShowCacheNodeInfo=True)["CacheClusters"]
    (node,) = row["CacheNodes"]
    assert node["Endpoint"] == {"Address": "127.0.0.1", "Port": 6002}
    assert node["CustomerAvailabilityZone"] == row["PreferredAvailabilityZone"] == "eu-central-1b"
    assert client.describe_cache_clusters(ShowCacheClustersNotInReplicationGroups=True)["CacheClusters"] == []


def test_events_are_selected_by_source_and_time(cloud: Cloud, client: Any) -> None:
    world = cloud.world
    world.publish("cache-cluster", "group-01-001", "Recovering cache nodes 0001")
    world.publish("replication-group", "group-01", "Test Failover API called for node group 0001")
    now = SYSTEM.now()
    aged = [
        replace(event, date=now - timedelta(hours=hours))
        for event, hours in zip(world.view().events, (2, 400), strict=True)
    ]
    world._view = replace(world.view(), events=(aged[1], aged[0], *world.view().events))

    def messages(**question: Any) -> list[str]:
        return [row["Message"].split()[0] for row in client.describe_events(**question)["Events"]]

    assert messages() == ["Recovering", "Test"], "an hour is the default"
    assert messages(SourceType="replication-group") == ["Test"]
    assert messages(SourceIdentifier="group-01-001", SourceType="cache-cluster") == ["Recovering"]
    assert messages(SourceType="user") == []
    assert messages(Duration=180) == ["Recovering", "Recovering", "Test"]
    assert messages(StartTime=now - timedelta(days=30)) == ["Recovering", "Recovering", "Test"], "14 days are kept"
    assert messages(StartTime=now - timedelta(hours=3), EndTime=now - timedelta(hours=1)) == ["Recovering"]
    assert messages(StartTime=now - timedelta(hours=3), Duration=90) == ["Recovering"]
    assert messages(EndTime=now - timedelta(hours=2) + timedelta(minutes=5), Duration=10) == ["Recovering"]
    assert messages(StartTime=now + timedelta(seconds=-1), EndTime=now + timedelta(minutes=1)) == ["Recovering", "Test"]
    assert (
        code(client.describe_events, StartTime=now, EndTime=now - timedelta(hours=1)) == "InvalidParameterCombination"
    )


def test_a_batch_answers_what_it_did_and_what_it_did_not_at_once(client: Any, operators: dict[str, Idle]) -> None:
    answer = client.batch_apply_update_action(
        ServiceUpdateName=UPDATE,
        ReplicationGroupIds=["group-01", "nobody", "group-99", "group-03", "group-02"],
        CacheClusterIds=["group-01-001"],
    )
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    processed = {row["ReplicationGroupId"]: row["UpdateActionStatus"] for row in answer["ProcessedUpdateActions"]}
    assert processed == {"group-01": "waiting-to-start", "group-02": "waiting-to-start"}
    refused = {
        row.get("ReplicationGroupId") or row["CacheClusterId"]: row["ErrorType"]
        for row in answer["UnprocessedUpdateActions"]
    }
    assert refused == {
        "nobody": "ReplicationGroupNotFoundFault",
        "group-99": "UpdateActionNotFound",
        "group-03": "InvalidUpdateActionState",
        "group-01-001": "InvalidParameterCombination",
    }
    assert all(row["ErrorMessage"] for row in answer["UnprocessedUpdateActions"])
    assert [operator.told for operator in operators.values()] == [[UPDATE], [UPDATE]]


def test_applying_twice_starts_once(client: Any, operators: dict[str, Idle]) -> None:
    question = {"ServiceUpdateName": UPDATE, "ReplicationGroupIds": ["group-01"]}
    client.batch_apply_update_action(**question)
    again = client.batch_apply_update_action(**question)
    assert again["ProcessedUpdateActions"] == []
    (row,) = again["UnprocessedUpdateActions"]
    assert "waiting-to-start" in row["ErrorMessage"]
    assert operators["group-01"].told == [UPDATE]
    (action,) = client.describe_update_actions(**question, ShowNodeLevelUpdateStatus=True)["UpdateActions"]
    nodes = action["NodeGroupUpdateStatus"][0]["NodeGroupMemberUpdateStatus"]
    assert {(node["NodeUpdateStatus"], node["NodeUpdateInitiatedBy"]) for node in nodes} == {
        ("waiting-to-start", "customer")
    }


def test_a_group_that_is_busy_does_not_fail_over_and_is_not_updated(client: Any, operators: dict[str, Idle]) -> None:
    question = {"ServiceUpdateName": UPDATE, "ReplicationGroupIds": ["group-01"]}
    answer = client.test_failover(ReplicationGroupId="group-01", NodeGroupId="0001")
    assert answer["ReplicationGroup"]["Status"] == "modifying"
    with pytest.raises(client.exceptions.InvalidReplicationGroupStateFault):
        client.test_failover(ReplicationGroupId="group-01", NodeGroupId="0001")
    assert client.batch_apply_update_action(**question)["ProcessedUpdateActions"] == []
    assert operators["group-01"].told == ["TestFailover"]


def test_only_what_runs_can_be_stopped(client: Any) -> None:
    question = {"ServiceUpdateName": UPDATE, "ReplicationGroupIds": ["group-01"]}
    assert client.batch_stop_update_action(**question)["ProcessedUpdateActions"] == []
    client.batch_apply_update_action(**question)
    (row,) = client.batch_stop_update_action(**question)["ProcessedUpdateActions"]
    assert row["UpdateActionStatus"] == "stopping"
    assert client.batch_stop_update_action(**question)["ProcessedUpdateActions"] == []


@pytest.mark.parametrize("operation", ["batch_apply_update_action", "batch_stop_update_action"])
def test_a_batch_has_bounds(client: Any, operation: str) -> None:
    call = getattr(client, operation)
    too_many = [f"group-{number:02d}" for number in range(21)]
    assert code(call, ServiceUpdateName=UPDATE, ReplicationGroupIds=too_many) == "InvalidParameterValue"
    assert code(call, ServiceUpdateName=UPDATE) == "InvalidParameterValue"
