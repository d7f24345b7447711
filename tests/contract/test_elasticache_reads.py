"""What pre-flight reads beyond the group and its updates: our clients over real HTTP against the lab's simulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from patchpilot.clock import SYSTEM
from patchpilot.elasticache import ElastiCache, cloudwatch, connect
from patchpilot.elasticache.cloudwatch import FREEABLE, LAG, MEMORY, Alarm, CloudWatch
from patchpilot.elasticache.facts import Snapshot
from patchpilot.errors import Refused
from patchpilot.lab import monitoring
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.launch import Address
from patchpilot.lab.world import Group, Member, World, lab_update
from patchpilot.lab.world import Snapshot as LabSnapshot
from patchpilot.settings import Aws

REGION = "eu-central-1"
TAKEN = datetime(2026, 3, 1, 5, 30, tzinfo=UTC)


def lab_group(name: str, **more: Any) -> Group:
    members = tuple(
        Member(f"{name}-{number:03d}", Address("127.0.0.1", 7000 + number), f"{REGION}{'abc'[number]}")
        for number in range(3)
    )
    return Group(name, Address("127.0.0.1", 7100), members, members[0].cluster_id, TAKEN, **more)


class Idle:
    """Is told to rotate nodes, and does not."""

    def rotate(self, update: str) -> None: ...

    def test_failover(self) -> None: ...


@pytest.fixture
def group_name() -> str:
    """moto keeps one CloudWatch for the whole process, so each test has a group of its own."""
    return f"g{SYSTEM.now():%H%M%S%f}"


@pytest.fixture
def cloud(tmp_path: Path, group_name: str) -> Iterator[Cloud]:
    world = World(region=REGION)
    snapshots = tuple(LabSnapshot(f"s-{number:02d}", TAKEN) for number in range(60))
    world.add_group(lab_group(group_name, snapshots=(*snapshots, LabSnapshot("now", TAKEN, "creating", "manual"))))
    world.add_group(lab_group("other", parameter_group="others"))
    world.add_update(lab_update(world.now()))
    with Cloud(world, {"other": Idle(), group_name: Idle()}, calls=tmp_path / "calls.jsonl") as cloud:
        yield cloud


@pytest.fixture
def clients(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ElastiCache, CloudWatch]]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    settings = Aws(region=REGION, endpoint_url=cloud.url)
    with connect(settings) as elasticache, cloudwatch.connect(settings) as watching:
        yield elasticache, watching


@pytest.fixture
def aws(clients: tuple[ElastiCache, CloudWatch]) -> ElastiCache:
    return clients[0]


@pytest.fixture
def watching(clients: tuple[ElastiCache, CloudWatch]) -> CloudWatch:
    return clients[1]


@pytest.fixture
def raw(cloud: Cloud) -> Iterator[Callable[[str], Any]]:
    """Plain boto3 clients of the simulator."""
    with ExitStack() as stack:

        def make(service: str) -> Any:
            client: Any = boto3.client(
                service, endpoint_url=cloud.url, region_name=REGION, aws_access_key_id="t", aws_secret_access_key="t"
            )
            stack.callback(client.close)
            return client

        yield make


def test_parameters_of_the_groups_own_parameter_group(aws: ElastiCache, group_name: str) -> None:
    (node, *_) = aws.nodes(aws.group(group_name))
    assert (node.parameter_group, node.parameters_applied) == ("lab-broker-parameters", "in-sync")
    parameters = aws.parameters(node.parameter_group)
    assert (parameters["maxmemory-policy"], parameters["reserved-memory-percent"]) == ("noeviction", "25")
    with pytest.raises(Refused, match=r"DescribeCacheParameters: CacheParameterGroupNotFound.*nobody"):
        aws.parameters("nobody")


def test_snapshots_of_one_group_over_pages_as_small_as_aws_has_them(aws: ElastiCache, group_name: str) -> None:
    found = aws.snapshots(group_name)
    assert len(found) == 61
    assert found[0] == Snapshot("s-00", "available", "automated", TAKEN)
    assert [each.source for each in found if each.status == "creating"] == ["manual"]
    assert aws.snapshots("other") == ()


def test_the_group_and_its_nodes_know_their_windows(aws: ElastiCache, group_name: str) -> None:
    group = aws.group(group_name)
    assert group.snapshot_window == "01:00-02:00"
    assert {node.maintenance_window for node in aws.nodes(group)} == {"sun:03:00-sun:04:00"}


def test_history_goes_back_two_weeks_and_knows_only_the_groups_own(
    aws: ElastiCache, cloud: Cloud, group_name: str
) -> None:
    world, now = cloud.world, SYSTEM.now()
    for source in (f"{group_name}-001", "other-001", group_name):
        world.publish("replication-group" if source == group_name else "cache-cluster", source, f"of {source}")
    aged = [replace(event, date=now - timedelta(days=days)) for event in world.view().events for days in (13, 15)]
    world._view = replace(world.view(), events=tuple(aged))
    found = aws.history(aws.group(group_name), now)
    assert [event.message for event in found] == [f"of {group_name}", f"of {group_name}-001"]


def test_what_is_in_flight_anywhere_in_the_region(aws: ElastiCache, group_name: str) -> None:
    assert aws.in_flight() == ()
    (update,) = aws.service_updates()
    aws.apply(update.name, "other")
    assert [(action.group, action.status) for action in aws.in_flight()] == [("other", "waiting-to-start")]


def test_alarms_that_watch_the_group_or_a_node_of_it(
    watching: CloudWatch, cloud: Cloud, raw: Callable[[str], Any], group_name: str
) -> None:
    nodes = [f"{group_name}-{number:03d}" for number in range(3)]
    assert watching.alarms({group_name, *nodes}) == ()
    monitoring.watch(cloud.url, REGION, cloud.world.account, group_name, nodes, SYSTEM)
    alarms = watching.alarms({group_name, *nodes})
    assert [(alarm.name, alarm.state, alarm.tells) for alarm in alarms] == [
        (f"{group_name}-{MEMORY}", "OK", True), (f"{group_name}-{LAG}", "OK", True),
    ]  # fmt: skip
    assert watching.alarms({"other", "other-001"}) == ()

    client = raw("cloudwatch")
    client.set_alarm_state(AlarmName=f"{group_name}-{LAG}", StateValue="ALARM", StateReason="rehearsed")
    client.disable_alarm_actions(AlarmNames=[f"{group_name}-{MEMORY}"])
    memory, lag = watching.alarms([nodes[2]])
    assert (memory.tells, lag.state, lag.reason) == (False, "ALARM", "rehearsed")


def test_an_alarm_on_an_expression_is_about_every_metric_in_it() -> None:
    metric = {"Metric": {"Dimensions": [{"Name": "CacheClusterId", "Value": "n-1"}, {"Name": "Else", "Value": "x"}]}}
    row = {"AlarmName": "a", "Metrics": [{"Id": "e", "Expression": "m"}, {"Id": "m", "MetricStat": metric}]}
    assert list(cloudwatch._watched(row)) == ["n-1"]
    assert Alarm.of(row) == Alarm("a", "", tells=False)


def test_metrics_of_every_node_that_has_some(
    watching: CloudWatch, cloud: Cloud, raw: Callable[[str], Any], group_name: str
) -> None:
    nodes = [f"{group_name}-001", f"{group_name}-002"]
    assert watching.metrics(nodes, SYSTEM.now()) == ()
    monitoring.watch(cloud.url, REGION, cloud.world.account, group_name, nodes[:1], SYSTEM)
    raw("cloudwatch").put_metric_data(Namespace="AWS/ElastiCache", MetricData=[
        {"MetricName": name, "Dimensions": [{"Name": "CacheClusterId", "Value": nodes[0]}],
         "Timestamp": SYSTEM.now() - timedelta(minutes=5), "Value": value}
        for name, value in ((LAG, 7.5), (FREEABLE, 42.0))
    ])  # fmt: skip
    found = {metric.name: metric for metric in watching.metrics(nodes, SYSTEM.now())}
    assert {metric.node for metric in found.values()} == {nodes[0]}
    assert {name: metric.worst for name, metric in found.items()} == {MEMORY: 1.0, LAG: 7.5, FREEABLE: 42.0}
    assert SYSTEM.now() - found[LAG].at < timedelta(minutes=2)


@pytest.mark.parametrize("operation", ["DescribeCacheParameters", "DescribeSnapshots"])
def test_the_simulators_answers_satisfy_botocores_model(cloud: Cloud, group_name: str, operation: str) -> None:
    asked = {"CacheParameterGroupName": "others"} if operation == "DescribeCacheParameters" else {"MaxRecords": 20}
    model = botocore.session.get_session().get_service_model("elasticache").operation_model(operation)
    answer = cloud.api.answer(operation, asked)
    assert all(answer[key] for key in answer)
    assert ParamValidator().validate(answer, model.output_shape).generate_report() == ""
    assert {"Marker"} & set(answer) == ({"Marker"} if operation == "DescribeSnapshots" else set())
    rows: Any = next(value for value in answer.values() if isinstance(value, list))
    known = set(
        next(shape for name, shape in model.output_shape.members.items() if answer.get(name) is rows).member.members
    )
    assert all(set(row) <= known for row in rows)


def test_filters_and_faults_of_the_new_operations(raw: Callable[[str], Any], group_name: str) -> None:
    client = raw("elasticache")
    assert len(client.describe_snapshots()["Snapshots"]) == 50
    assert [row["SnapshotName"] for row in client.describe_snapshots(SnapshotSource="user")["Snapshots"]] == ["now"]
    assert len(client.describe_snapshots(SnapshotName="s-07")["Snapshots"]) == 1
    assert client.describe_snapshots(CacheClusterId=f"{group_name}-001")["Snapshots"] == []
    with pytest.raises(client.exceptions.SnapshotNotFoundFault):
        client.describe_snapshots(SnapshotName="nothing")
    with pytest.raises(client.exceptions.CacheParameterGroupNotFoundFault):
        client.describe_cache_parameters(CacheParameterGroupName="nobody")
    with pytest.raises(ClientError, match="from 20 to 50"):
        client.describe_snapshots(MaxRecords=100)
    ours = client.describe_cache_parameters(CacheParameterGroupName="lab-broker-parameters", Source="user")[
        "Parameters"
    ]
    assert {row["ParameterName"] for row in ours} >= {"maxmemory-policy", "reserved-memory-percent"}
    assert client.describe_cache_parameters(CacheParameterGroupName="others", Source="system")["Parameters"] == []


def test_the_versions_of_an_engine(aws: ElastiCache) -> None:
    assert aws.engine_versions("redis") == ("6.2", "7.0", "7.1")
    assert aws.engine_versions("memcached") == ()


def test_the_calls_are_logged_like_all_others(aws: ElastiCache, cloud: Cloud, group_name: str) -> None:
    aws.snapshots(group_name)
    rows = [json.loads(line) for line in cloud.calls.read_text().splitlines()]
    assert {row["action"] for row in rows} == {"DescribeSnapshots"}
    assert rows[0]["parameters"] == {"ReplicationGroupId": group_name, "MaxRecords": 50}
