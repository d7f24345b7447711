"""A rotation as a client of the API sees it: every answer valid, statuses and events in the order that AWS has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import redis

from patchpilot.lab.laboratory import GROUP, Lab
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from tests.support.answers import problems

UPDATE = "elasticache-valkey-9-1-3-update-20261101"
QUESTION: dict[str, Any] = {"ServiceUpdateName": UPDATE, "ReplicationGroupIds": [GROUP]}
FIRST, SECOND, THIRD = (f"{GROUP}-{number:03d}" for number in (1, 2, 3))
PATIENCE = 30.0


@pytest.fixture
def lab(lab_roster: Roster, tmp_path: Path) -> Iterator[Lab]:
    """Three nodes and the API; no PostgreSQL, which a rotation does not need."""
    with Lab(
        tmp_path,
        postgres=False,
        roster=lab_roster,
        write_loss_ms=60,
        endpoint_lag_ms=60,
        seconds_per_node=0.4,
    ) as lab:
        yield lab


@pytest.fixture
def client(lab: Lab, elasticache: Callable[..., Any]) -> Any:
    return elasticache(lab.cloud.url)


class Checked:
    """A client that holds every answer, and what the simulator wanted to answer, against botocore's model."""

    def __init__(self, client: Any, lab: Lab) -> None:
        self._client = client
        self._wanted: Mapping[str, Any] = {}
        answer = lab.cloud.api.answer

        def remember(operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
            wanted = answer(operation, params)
            self._wanted = wanted
            return wanted

        lab.cloud.api.answer = remember  # type: ignore[method-assign]

    def __call__(self, operation: str, **parameters: Any) -> dict[str, Any]:
        method = next(name for name, api in self._client.meta.method_to_api_mapping.items() if api == operation)
        got: dict[str, Any] = getattr(self._client, method)(**parameters)
        del got["ResponseMetadata"]
        assert problems(operation, got) == []
        assert problems(operation, self._wanted) == []
        assert got == self._wanted, "nothing gets lost on the wire"
        return got


def action(client: Any) -> Any:
    (row,) = client.describe_update_actions(**QUESTION, ShowNodeLevelUpdateStatus=True)["UpdateActions"]
    return row


def nodes(row: Any) -> dict[str, str]:
    members = row["NodeGroupUpdateStatus"][0]["NodeGroupMemberUpdateStatus"]
    return {member["CacheClusterId"]: member["NodeUpdateStatus"] for member in members}


def roles(client: Any) -> dict[str, str]:
    (group,) = client.describe_replication_groups(ReplicationGroupId=GROUP)["ReplicationGroups"]
    return {member["CacheClusterId"]: member["CurrentRole"] for member in group["NodeGroups"][0]["NodeGroupMembers"]}


def events(client: Any) -> list[tuple[str, str]]:
    return [(row["SourceIdentifier"], row["Message"]) for row in client.describe_events()["Events"]]


def recovery(node: str) -> list[tuple[str, str]]:
    return [(node, "Recovering cache nodes 0001"), (node, "Finished recovery for cache nodes 0001")]


def failover(old: str, new: str) -> list[tuple[str, str]]:
    text = f"Failover from primary node {old} to replica node {new} completed"
    return [(new, text), (GROUP, text)]


def await_status(client: Any, *statuses: str) -> None:
    until(lambda: action(client)["UpdateActionStatus"] in statuses, seconds=PATIENCE, what=f"it was {statuses}")


def runs(values: list[Any]) -> list[Any]:
    """The values without immediate repetitions."""
    return [value for value, _ in groupby(values)]


def test_every_answer_at_every_stage_is_valid(lab: Lab, client: Any) -> None:
    call = Checked(client, lab)
    seen: list[tuple[str, str, str]] = []

    def look() -> str:
        rows = call("DescribeUpdateActions", ShowNodeLevelUpdateStatus=True)["UpdateActions"]
        call("DescribeUpdateActions", **QUESTION)
        (group,) = call("DescribeReplicationGroups")["ReplicationGroups"]
        call("DescribeReplicationGroups", ReplicationGroupId=GROUP)
        clusters = call("DescribeCacheClusters", ShowCacheNodeInfo=True)["CacheClusters"]
        call("DescribeCacheClusters", CacheClusterId=FIRST)
        call("DescribeServiceUpdates")
        call("DescribeEvents", Duration=60)
        assert {row["CacheClusterId"] for row in clusters} == set(group["MemberClusters"])
        primaries = [m for m in group["NodeGroups"][0]["NodeGroupMembers"] if m["CurrentRole"] == "primary"]
        assert len(primaries) == 1
        seen.append((rows[0]["UpdateActionStatus"], group["Status"], rows[0]["NodesUpdated"]))
        return seen[-1][0]

    look()
    call("BatchApplyUpdateAction", ServiceUpdateName=UPDATE, ReplicationGroupIds=[GROUP, "nobody"])
    call("BatchApplyUpdateAction", **QUESTION)
    until(lambda: look() == "complete", seconds=PATIENCE, what="the rotation was complete")
    call("BatchStopUpdateAction", **QUESTION)
    call("TestFailover", ReplicationGroupId=GROUP, NodeGroupId="0001")
    assert lab.rotation.join()
    look()

    statuses = runs([status for status, _, _ in seen])
    assert [s for s in statuses if s != "waiting-to-start"] == ["not-applied", "in-progress", "complete"]
    assert runs([done for _, _, done in seen]) == ["0/3", "1/3", "2/3", "3/3"]
    assert runs([status for _, status, _ in seen]) == ["available", "modifying", "available"]


def test_a_rotation_does_replicas_first_then_fails_over_then_does_the_old_primary(lab: Lab, client: Any) -> None:
    before = {name: node.identity for name, node in lab.replicas.nodes.items()}
    assert roles(client) == {FIRST: "primary", SECOND: "replica", THIRD: "replica"}
    stages: list[tuple[str, ...]] = []

    def done() -> bool:
        row = action(client)
        stages.append(tuple(nodes(row).values()))
        return bool(row["UpdateActionStatus"] == "complete")

    client.batch_apply_update_action(**QUESTION)
    until(done, seconds=PATIENCE, what="the rotation was complete")

    new = lab.replicas.primary.name
    assert events(client) == [*recovery(SECOND), *recovery(THIRD), *failover(FIRST, new), *recovery(FIRST)]
    assert roles(client) == {name: "primary" if name == new else "replica" for name in (FIRST, SECOND, THIRD)}
    after = {name: node.identity for name, node in lab.replicas.nodes.items()}
    assert all(before[name] != after[name] for name in before), "every process is a new one"
    assert {node.replication().follows for node in lab.replicas.replicas} == {lab.replicas.primary.address}
    assert all(node.replication().link_up for node in lab.replicas.replicas)
    assert stages[-1] == ("complete", "complete", "complete")
    for earlier, later in pairwise(runs(stages)):
        assert sum(old != new for old, new in zip(earlier, later, strict=True)) in (1, 2)
        assert later.count("in-progress") <= 1, "one node at a time"
    (row,) = client.describe_update_actions(**QUESTION, ShowNodeLevelUpdateStatus=True)["UpdateActions"]
    assert row["SlaMet"] == "yes"
    for member in row["NodeGroupUpdateStatus"][0]["NodeGroupMemberUpdateStatus"]:
        assert member["NodeUpdateInitiatedDate"] <= member["NodeUpdateStartDate"] <= member["NodeUpdateEndDate"]


def test_the_endpoint_in_the_answers_stays_and_leads_to_the_primary(lab: Lab, client: Any) -> None:
    def endpoint() -> dict[str, Any]:
        (group,) = client.describe_replication_groups(ReplicationGroupId=GROUP)["ReplicationGroups"]
        answer: dict[str, Any] = group["NodeGroups"][0]["PrimaryEndpoint"]
        return answer

    before = endpoint()
    lab.failover()
    after = endpoint()
    assert before == after == {"Address": lab.replicas.link.address.host, "Port": lab.replicas.link.address.port}
    (group,) = client.describe_replication_groups(ReplicationGroupId=GROUP)["ReplicationGroups"]
    (primary,) = [m for m in group["NodeGroups"][0]["NodeGroupMembers"] if m["CurrentRole"] == "primary"]
    with redis.Redis(host=after["Address"], port=after["Port"]) as connection:
        assert connection.info("server")["tcp_port"] == primary["ReadEndpoint"]["Port"]
    zones = [member["PreferredAvailabilityZone"] for member in group["NodeGroups"][0]["NodeGroupMembers"]]
    assert len(set(zones)) == len(zones)


def test_a_test_failover_has_its_chain_of_events(lab: Lab, client: Any) -> None:
    done = lab.failover()
    called = [(GROUP, "Test Failover API called for node group 0001")]
    assert events(client) == [*called, *failover(done.old, done.new), *recovery(done.old)]
    assert action(client)["UpdateActionStatus"] == "not-applied"


def test_a_stopped_rotation_finishes_its_node_and_can_be_resumed(lab: Lab, client: Any) -> None:
    client.batch_apply_update_action(**QUESTION)
    until(lambda: nodes(action(client))[SECOND] == "in-progress", seconds=PATIENCE, what="the first node was reached")

    client.batch_stop_update_action(**QUESTION)
    assert action(client)["UpdateActionStatus"] == "stopping"
    assert client.batch_apply_update_action(**QUESTION)["ProcessedUpdateActions"] == []
    await_status(client, "stopped")

    assert nodes(action(client)) == {FIRST: "stopped", SECOND: "complete", THIRD: "stopped"}
    assert events(client) == recovery(SECOND)
    assert client.describe_replication_groups()["ReplicationGroups"][0]["Status"] == "available"
    assert roles(client)[FIRST] == "primary"

    (row,) = client.batch_apply_update_action(**QUESTION)["ProcessedUpdateActions"]
    assert row["UpdateActionStatus"] == "waiting-to-start"
    await_status(client, "complete")
    new = lab.replicas.primary.name
    assert events(client) == [*recovery(SECOND), *recovery(THIRD), *failover(FIRST, new), *recovery(FIRST)]


def test_a_rotation_that_is_stopped_before_it_begins_touches_no_node(lab: Lab, client: Any) -> None:
    lab.rotation.seconds_per_node = 3.0
    client.batch_apply_update_action(**QUESTION)
    client.batch_stop_update_action(**QUESTION)
    await_status(client, "stopped")
    assert events(client) == []
    assert set(nodes(action(client)).values()) == {"stopped"}


def test_a_rotation_keeps_what_was_written_before_it_and_after_it(lab: Lab, client: Any) -> None:
    with redis.Redis.from_url(lab.endpoint) as connection:
        connection.set("before", 1)
    client.batch_apply_update_action(**QUESTION)
    await_status(client, "complete")
    with redis.Redis.from_url(lab.endpoint, decode_responses=True) as connection:
        connection.set("after", 1)
        assert set(connection.keys("*")) == {"before", "after"}
    assert len(lab.rotation.failovers) == 1


def test_a_lab_goes_down_in_the_middle_of_a_rotation(lab: Lab, client: Any) -> None:
    lab.rotation.seconds_per_node = 600
    client.batch_apply_update_action(**QUESTION)
    lab.stop()
    assert lab.rotation.join(seconds=0)
    assert not any(node.running for node in lab.replicas.nodes.values())
