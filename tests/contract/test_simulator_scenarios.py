"""Scenarios as data: what may be in a file, what each of them does to the API's answers, and that those stay valid."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from pydantic import BaseModel

from patchpilot.clock import SYSTEM, FakeClock
from patchpilot.errors import Exit, Usage
from patchpilot.lab import scenario as scenarios
from patchpilot.lab.api import Fault
from patchpilot.lab.background import LabInfo, configuration
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.launch import Address
from patchpilot.lab.scenario import Scenario
from patchpilot.lab.world import LAB_UPDATE, Group, Member, World, lab_update
from tests.crash.simulated import SimulatedWorld
from tests.crash.world import GROUP, NAMES
from tests.support.answers import problems
from tests.support.commands import patchpilot

QUESTION: dict[str, Any] = {"ServiceUpdateName": LAB_UPDATE, "ReplicationGroupIds": [GROUP]}


def scenario(directory: Path, text: str) -> Scenario:
    path = directory / "scenario.toml"
    path.write_text(f'title = "a test"\n{text}', encoding="utf-8")
    return scenarios.read(path)


# The files.


@pytest.mark.parametrize("name", scenarios.known())
def test_a_scenario_that_comes_with_patchpilot_is_one(name: str) -> None:
    assert scenarios.read(scenarios.find(name)).title


def test_the_readme_explains_every_key() -> None:
    text = (scenarios.FOLDER / "README.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))

    def keys(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
            table = next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)
            assert explained & {name, f"[{name}]", f"[[{name}]]"}, f"{name} is not explained"
            if table is not None:
                keys(table)

    keys(Scenario)
    for example in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        assert Scenario.model_validate(tomllib.loads(example))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('titel = "x"', "titel: unknown key; there are by_system, ends, event,"),
        ("", "title: is missing"),
        ('title = "x', "not valid TOML"),
        ('title = "x"\n[[stale]]\nlagg = "2s"', "stale[0].lagg: unknown key; there are after, flicker, lag,"),
        ('title = "x"\n[[stale]]\nlag = 2', "stale[0].lag: 2 is not a duration; write it like 300ms"),
        ('title = "x"\n[stale]\nlag = "2s"', "stale: is a list of tables: write [[stale]]"),
        ('title = "x"\n[[by_system]]', "by_system: is a table: write [by_system]"),
        ('title = "x"\n[[stale]]\noperation = "DescribeAlarms"\nlag = "2s"', "no operation 'DescribeAlarms'"),
        ('title = "x"\n[[failing]]\noperation = "GetX"\ncode = "x"', "ElastiCache has no operation 'GetX'"),
        ('title = "x"\n[[stale]]\noperation = "DescribeX"\nlag = "2s"', "ElastiCache has no operation 'DescribeX'"),
        (
            'title = "x"\n[[failing]]\ncode = "T"\nrate = 2.0',
            "failing[0].rate: Input should be less than or equal to 1",
        ),
        ('title = "x"\n[[failover]]\nsince = "never"', "failover[0].since: Input should be 'start', 'asked',"),
        ('title = "x"\n[[stall]]\nnode = 2\n[[stall]]\nnode = 2', "[[stall]] names a node twice"),
        ('title = "x"\n[update]\nends = "soon"', "update.ends: 'soon' is not a duration"),
        (
            'title = "x"\n[[override]]\noperation = "DescribeEvents"\nvalues = { "Events.Massage" = "x" }',
            "an answer of DescribeEvents has no 'Events.Massage'",
        ),
        (
            'title = "x"\n[[override]]\noperation = "DescribeEvents"\nvalues = { "Events.Message" = 3 }',
            "'Events.Message' in an answer of DescribeEvents is a string, not 3",
        ),
        (
            'title = "x"\n[[override]]\noperation = "DescribeEvents"\nvalues = { "Events" = "x" }',
            "'Events' in an answer of DescribeEvents is a list: name a member of it",
        ),
        (
            'title = "x"\n[[override]]\noperation = "Describe*"\nvalues = { "Events" = "x" }',
            "an override is about one operation, not 'Describe*'",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Usage) as refusal:
        scenarios.read(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_scenario_is_found_by_its_name_or_its_path(tmp_path: Path) -> None:
    assert scenarios.find("tiny-pages") == scenarios.FOLDER / "tiny-pages.toml"
    assert scenarios.find("mine.toml") == Path.cwd() / "mine.toml"
    assert scenarios.find(f"{tmp_path}/mine") == tmp_path / "mine"
    with pytest.raises(Usage, match=r"no scenario 'tiny': say one of bad-day, .*or the path of a file"):
        scenarios.find("tiny")
    with pytest.raises(Usage, match="no such scenario file"):
        scenarios.read(tmp_path / "mine.toml")


def test_the_command_line_lists_them_and_refuses_what_is_none(tmp_path: Path) -> None:
    listed = json.loads(patchpilot("lab", "scenarios", "--output", "json").stdout)
    assert {row["name"] for row in listed} == set(scenarios.known())
    directory = tmp_path / "lab"
    (tmp_path / "far.toml").write_text('title = "x"\n[[stall]]\nnode = 4', encoding="utf-8")
    for wrong, said in (("nonsense", "no scenario 'nonsense'"), ("far.toml", "about node 4, and the lab has only 3")):
        done = patchpilot("lab", "up", "--dir", directory, "--scenario", wrong, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (Exit.USAGE, 1), done.stderr
        assert said in done.stderr
    assert not directory.exists()


def test_a_pilot_in_a_lab_waits_for_longer_than_its_aws_lags_behind(tmp_path: Path) -> None:
    facts = dict.fromkeys(LabInfo.__dataclass_fields__, "x")
    lagging = scenario(tmp_path, '[[stale]]\nlag = "20s"')
    assert 'settle = "23s"' in configuration(facts, tmp_path, lagging)
    assert 'settle = "3s"' in configuration(facts, tmp_path, scenarios.CALM)


# Every answer, in every scenario, from before the request until well after the rotation.


@pytest.mark.parametrize("name", scenarios.known())
def test_every_answer_is_valid(name: str) -> None:
    clock = FakeClock()
    world = SimulatedWorld(clock, scenarios.read(scenarios.find(name)))

    def ask(operation: str, **params: Any) -> None:
        with suppress(Fault):
            assert problems(operation, world.api.answer(operation, params)) == []

    for second in range(40):
        if second in (2, 9):
            ask("BatchApplyUpdateAction", **QUESTION)
        ask("DescribeUpdateActions", ShowNodeLevelUpdateStatus=True)
        ask("DescribeUpdateActions", **QUESTION)
        ask("DescribeReplicationGroups")
        ask("DescribeCacheClusters", ShowCacheNodeInfo=True)
        ask("DescribeServiceUpdates")
        ask("DescribeEvents", Duration=60)
        ask("DescribeSnapshots")
        ask("DescribeCacheParameters", CacheParameterGroupName="lab-broker-parameters")
        ask("ListAllowedNodeTypeModifications", ReplicationGroupId=GROUP)
        clock.sleep(1)
    ask("BatchStopUpdateAction", **QUESTION)
    ask("TestFailover", ReplicationGroupId=GROUP, NodeGroupId="0001")
    clock.sleep(20)
    ask("ModifyReplicationGroup", ReplicationGroupId=GROUP, EngineVersion="9.2", ApplyImmediately=True)


# What each table does, over the wire.


class Idle:
    """An operator that never gets round to anything."""

    def rotate(self, update: str) -> None: ...

    def test_failover(self) -> None: ...

    def modify(self, target: object) -> None: ...


@pytest.fixture
def simulator(tmp_path: Path, elasticache: Callable[..., Any]) -> Any:
    """Starts a simulator that plays what the test says; gives the cloud and a client of it."""
    with ExitStack() as stack:

        def start(text: str) -> tuple[Cloud, Any]:
            world = World()
            members = tuple(Member(name, Address("127.0.0.1", 7000), "zone-a") for name in NAMES)
            world.add_group(Group(GROUP, Address("127.0.0.1", 7000), members, NAMES[0], world.now()))
            world.add_update(lab_update(world.now()))
            played = scenario(tmp_path, text)
            cloud = stack.enter_context(Cloud(world, {GROUP: Idle()}, calls=tmp_path / "calls", scenario=played))
            return cloud, elasticache(cloud.url)

        yield start


def fails(call: Callable[..., Any], **params: Any) -> tuple[str, int, int]:
    """The error's code, its HTTP status, and how often the SDK tried again."""
    with pytest.raises(ClientError) as caught:
        call(**params)
    about = caught.value.response["ResponseMetadata"]
    return caught.value.response["Error"]["Code"], about["HTTPStatusCode"], about["RetryAttempts"]


def status(client: Any) -> str:
    return str(client.describe_update_actions(**QUESTION)["UpdateActions"][0]["UpdateActionStatus"])


def test_a_code_that_the_sdk_does_not_retry_arrives_at_once(simulator: Any) -> None:
    _, client = simulator('[[failing]]\noperation = "Describe*"\ncode = "APICallRateForCustomerExceeded"\ncalls = 1')
    assert fails(client.describe_events) == ("APICallRateForCustomerExceeded", 400, 0)
    assert client.describe_events()["Events"] == []


def test_a_code_that_the_sdk_retries_passes_unseen(simulator: Any) -> None:
    _, client = simulator('[[failing]]\noperation = "DescribeEvents"\ncode = "Throttling"\nskip = 1\ncalls = 1')
    assert client.describe_events()["ResponseMetadata"]["RetryAttempts"] == 0
    assert client.describe_events()["ResponseMetadata"]["RetryAttempts"] == 1


def test_what_moto_answers_fails_as_well(simulator: Any) -> None:
    _, client = simulator(
        '[[failing]]\ncode = "ExpiredToken"\nstatus = 403\nmessage = "The token is expired"\ncalls = 2'
    )
    assert fails(client.describe_users) == ("ExpiredToken", 403, 0)
    assert fails(client.describe_replication_groups) == ("ExpiredToken", 403, 0)
    assert client.describe_users()["Users"]


def test_an_answer_is_lost_after_the_call_took_effect(simulator: Any) -> None:
    _, client = simulator(
        '[[failing]]\noperation = "BatchApply*"\ncode = "InternalFailure"\nstatus = 500\ntook_effect = true\nskip = 1'
    )
    other = {**QUESTION, "ReplicationGroupIds": ["nobody"]}
    assert client.batch_apply_update_action(**other)["UnprocessedUpdateActions"]
    assert status(client) == "not-applied"
    assert fails(client.batch_apply_update_action, **QUESTION)[:2] == ("InternalFailure", 500)
    assert status(client) == "waiting-to-start"


@pytest.mark.parametrize(("took_effect", "then"), [("false", "not-applied"), ("true", "waiting-to-start")])
def test_a_request_is_left_unprocessed(simulator: Any, took_effect: str, then: str) -> None:
    _, client = simulator(
        f'[[refusal]]\nerror_type = "Odd"\nerror_message = "No."\ntook_effect = {took_effect}\ncalls = 1'
    )
    answer = client.batch_apply_update_action(**QUESTION, CacheClusterIds=["somebody"])
    assert answer["ProcessedUpdateActions"] == []
    about = {"ServiceUpdateName": LAB_UPDATE, "ErrorType": "Odd", "ErrorMessage": "No."}
    assert answer["UnprocessedUpdateActions"] == [
        {"ReplicationGroupId": GROUP, **about},
        {"CacheClusterId": "somebody", **about},
    ]
    assert status(client) == then


def test_answers_lag_behind_and_the_truth_is_known_to_what_changes_it(simulator: Any) -> None:
    _, client = simulator('[[stale]]\noperation = "DescribeUpdateActions"\nlag = "1h"')
    assert client.batch_apply_update_action(**QUESTION)["ProcessedUpdateActions"]
    assert status(client) == "not-applied"
    [group] = client.describe_replication_groups()["ReplicationGroups"]
    assert group["Status"] == "modifying", "this operation does not lag"
    [refused] = client.batch_apply_update_action(**QUESTION)["UnprocessedUpdateActions"]
    assert "waiting-to-start" in refused["ErrorMessage"]


def test_pages_are_as_small_as_can_be_and_hold_everything(simulator: Any) -> None:
    cloud, client = simulator("page_size = 1")
    for number in range(5):
        cloud.world.publish("replication-group", GROUP, f"event {number}")
    pages = list(client.get_paginator("describe_events").paginate(PaginationConfig={"PageSize": 100}))
    assert [[row["Message"] for row in page["Events"]] for page in pages] == [[f"event {n}"] for n in range(5)]


def test_the_update_is_not_listed_for_a_while(simulator: Any) -> None:
    _, client = simulator('[[gap]]\nsince = "applied"\nskip = 1\ncalls = 2')
    assert status(client) == "not-applied"
    client.batch_apply_update_action(**QUESTION)
    listed = [len(client.describe_update_actions()["UpdateActions"]) for _ in range(4)]
    assert listed == [1, 0, 0, 1]


def test_events_are_told_late_or_never(simulator: Any) -> None:
    cloud, client = simulator(
        '[[event]]\nlike = "Failover *"\nsource = "shop-*r"\nmissing = true\n[[event]]\nlike = "Rec*"\nlate = "1h"'
    )
    for kind, source, message in (
        ("replication-group", GROUP, "Failover from here to there"),
        ("cache-cluster", NAMES[0], "Failover from here to there"),
        ("cache-cluster", NAMES[0], "Recovering"),
        ("cache-cluster", NAMES[0], "Finished recovery"),
    ):
        cloud.world.publish(kind, source, message)
    told = [(row["SourceIdentifier"], row["Message"].split()[0]) for row in client.describe_events()["Events"]]
    assert told == [(NAMES[0], "Failover"), (NAMES[0], "Finished")]


def test_members_of_an_answer_have_other_values(simulator: Any) -> None:
    _, client = simulator(
        '[[override]]\noperation = "DescribeReplicationGroups"\ncalls = 1\n'
        'values = { "ReplicationGroups.AutomaticFailover" = "enabling", '
        '"ReplicationGroups.PendingModifiedValues.PrimaryClusterId" = "x", '
        '"ReplicationGroups.NodeGroups.NodeGroupMembers.CurrentRole" = "replica" }'
    )
    first, second = (client.describe_replication_groups()["ReplicationGroups"][0] for _ in range(2))
    assert (first["AutomaticFailover"], second["AutomaticFailover"]) == ("enabling", "enabled")
    assert first["PendingModifiedValues"] == {"PrimaryClusterId": "x"}
    assert {member["CurrentRole"] for member in first["NodeGroups"][0]["NodeGroupMembers"]} == {"replica"}
    assert first["MultiAZ"] == "enabled"


def test_an_update_that_has_ended_is_not_applied(simulator: Any) -> None:
    cloud, client = simulator("")
    over = lab_update(SYSTEM.now() - timedelta(days=100))
    cloud.world.add_update(over)
    [refused] = client.batch_apply_update_action(**QUESTION)["UnprocessedUpdateActions"]
    assert "cannot be applied any more" in refused["ErrorMessage"]


# What each does in time, on a fake clock.


def playing(directory: Path, text: str) -> SimulatedWorld:
    """A world in which the update has just been applied."""
    world = SimulatedWorld(FakeClock(), scenario(directory, text))
    world.api.answer("BatchApplyUpdateAction", QUESTION)
    return world


def story(world: SimulatedWorld) -> list[str]:
    """What the events tell, in short."""
    told = [event for event in world.account.view().events if event.source_type == "cache-cluster"]
    return [f"{event.message.split()[0]} {event.source[-1]}" for event in told]


def done(world: SimulatedWorld) -> str:
    [row] = world.account.view().actions.values()
    return f"{row.status} {row.updated}"


CALM = ["Recovering 2", "Finished 2", "Recovering 3", "Finished 3", "Failover 2", "Recovering 1", "Finished 1"]


def test_nothing_goes_wrong(tmp_path: Path) -> None:
    world = playing(tmp_path, "")
    world.clock.sleep(9)
    assert done(world) == "in-progress 2"
    world.clock.sleep(2)
    assert (done(world), story(world)) == ("complete 3", CALM)


def test_with_flicker_an_answer_may_be_older_than_the_one_before(tmp_path: Path) -> None:
    world = playing(tmp_path, '[[stale]]\nlag = "4s"\nflicker = true')
    shown = []
    for _ in range(160):
        world.clock.sleep(0.1)
        [row] = world.api.answer("DescribeUpdateActions", QUESTION)["UpdateActions"]
        shown.append(int(row["NodesUpdated"][0]))
    assert shown[-1] == 3
    assert shown != sorted(shown)
    assert set(shown) == {0, 1, 2, 3}


def test_a_node_stalls(tmp_path: Path) -> None:
    world = playing(tmp_path, '[[stall]]\nnode = 3\nlasting = "10m"')
    world.clock.sleep(600)
    assert (done(world), story(world)) == ("in-progress 1", CALM[:3])
    assert world.paper.down == {NAMES[2]}
    world.clock.sleep(20)
    assert (done(world), story(world)) == ("complete 3", CALM)


def test_a_node_stalls_for_ever(tmp_path: Path) -> None:
    world = playing(tmp_path, "[[stall]]\nnode = 2")
    world.clock.sleep(100_000)
    assert (done(world), story(world)) == ("in-progress 0", CALM[:1])


def test_a_second_failover_happens_in_mid_rotation(tmp_path: Path) -> None:
    world = playing(tmp_path, '[[failover]]\nsince = "failover"\nafter = "500ms"')
    world.clock.sleep(20)
    assert done(world) == "complete 3"
    assert story(world) == [*CALM[:6], "Failover 3", "Recovering 2", "Finished 2", "Finished 1"]
    assert world.paper.primary == NAMES[2]


def test_a_failover_before_the_rotation_leaves_no_need_for_one(tmp_path: Path) -> None:
    world = playing(tmp_path, '[[failover]]\nsince = "applied"')
    world.clock.sleep(20)
    assert done(world) == "complete 3"
    assert [each for each in story(world) if each.startswith("Failover")] == ["Failover 2", "Failover 1"]


def test_a_failover_waits_for_a_replica_to_promote(tmp_path: Path) -> None:
    world = playing(tmp_path, '[[failover]]\nsince = "complete"\n[[unsynced]]\nnode = 1\n[[unsynced]]\nnode = 3')
    world.clock.sleep(60)
    assert (done(world), world.failovers) == ("complete 3", 1)
    world.paper.synchronise(NAMES[2])
    world.clock.sleep(5)
    assert (world.failovers, world.paper.primary) == (2, NAMES[2])
    assert world.account.view().groups[GROUP].status == "available"


def test_a_replica_synchronises_later_than_aws_says(tmp_path: Path) -> None:
    world = playing(tmp_path, '[[unsynced]]\nnode = 2\nlasting = "20s"')
    world.clock.sleep(12)
    assert (done(world), world.paper.apart, world.paper.primary) == ("complete 3", {NAMES[1]}, NAMES[2])
    world.clock.sleep(10)
    assert world.paper.apart == set()


def test_aws_schedules_and_starts_by_itself_unless_somebody_was_quicker(tmp_path: Path) -> None:
    text = '[by_system]\nafter = "1s"\nscheduling = "2s"\nscheduled = "2s"'
    world = SimulatedWorld(FakeClock(), scenario(tmp_path, text))
    seen = []
    for _ in range(20):
        world.clock.sleep(1)
        seen.append(done(world).split()[0])
    assert list(dict.fromkeys(seen)) == ["scheduling", "scheduled", "waiting-to-start", "in-progress", "complete"]
    [row] = world.account.view().actions.values()
    assert {node.initiated_by for node in row.nodes} == {"system"}
    world = playing(tmp_path, text)
    world.clock.sleep(20)
    [row] = world.account.view().actions.values()
    assert (row.status, {node.initiated_by for node in row.nodes}) == ("complete", {"customer"})
    assert world.failovers == 1


def test_other_operations_have_their_milestones(tmp_path: Path) -> None:
    text = '[[failover]]\nsince = "complete"\nafter = "1s"\n[[stale]]\nsince = "applied"\nlag = "1h"'
    for operation, params in (
        ("ModifyReplicationGroup", {"EngineVersion": "9.2", "ApplyImmediately": True}),
        ("TestFailover", {"NodeGroupId": "0001"}),
    ):
        world = SimulatedWorld(FakeClock(), scenario(tmp_path, text))
        world.api.answer(operation, {"ReplicationGroupId": GROUP, **params})
        world.clock.sleep(1)
        [group] = world.api.answer("DescribeReplicationGroups", {})["ReplicationGroups"]
        assert (group["Status"], world.account.view().groups[GROUP].status) == ("available", "modifying")
        world.clock.sleep(30)
        assert world.failovers == 2
        assert world.account.view().groups[GROUP].status == "available"


def test_a_superseded_update_is_left_where_it_is(tmp_path: Path) -> None:
    world = playing(tmp_path, '[superseded]\nsince = "applied"\nafter = "4s"\nby = "the-next-one"')
    world.clock.sleep(60)
    old, new = world.account.view().actions.values()
    assert (old.status, [row.status for row in old.nodes]) == ("not-applicable", ["stopped", "complete", "complete"])
    assert (new.update, new.status) == ("the-next-one", "not-applied")
    assert (world.account.view().groups[GROUP].status, world.failovers) == ("available", 0)
