"""What a scenario does to real nodes: further failovers, replicas that do not follow, updates that AWS starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from patchpilot.errors import Usage
from patchpilot.lab import scenario as scenarios
from patchpilot.lab.laboratory import GROUP, Lab
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.world import LAB_UPDATE, Milestone

QUESTION: dict[str, Any] = {"ServiceUpdateName": LAB_UPDATE, "ReplicationGroupIds": [GROUP]}
FIRST, SECOND, THIRD = (f"{GROUP}-{number:03d}" for number in (1, 2, 3))
PATIENCE = 60.0

Played = Callable[[str], tuple[Lab, Any]]


@pytest.fixture
def played(lab_roster: Roster, tmp_path: Path, elasticache: Callable[..., Any]) -> Iterator[Played]:
    """Starts a lab that plays what the test says; gives it and a client of it."""
    with ExitStack() as stack:

        def start(text: str) -> tuple[Lab, Any]:
            path = tmp_path / "scenario.toml"
            path.write_text(f'title = "a test"\n{text}', encoding="utf-8")
            lab = stack.enter_context(
                Lab(
                    tmp_path, scenario=scenarios.read(path), postgres=False, roster=lab_roster,
                    write_loss_ms=20, endpoint_lag_ms=20, seconds_per_node=0.3,
                )
            )  # fmt: skip
            return lab, elasticache(lab.cloud.url)

        yield start


def action(client: Any) -> Any:
    [row] = client.describe_update_actions(**QUESTION, ShowNodeLevelUpdateStatus=True)["UpdateActions"]
    return row


def rows(client: Any, member: str) -> set[str]:
    return {row[member] for row in action(client)["NodeGroupUpdateStatus"][0]["NodeGroupMemberUpdateStatus"]}


def await_status(client: Any, status: str) -> None:
    until(lambda: action(client)["UpdateActionStatus"] == status, seconds=PATIENCE, what=f"the update was {status}")


def failovers(client: Any) -> list[str]:
    events = client.describe_events(SourceType="replication-group")["Events"]
    return [row["Message"] for row in events if row["Message"].startswith("Failover")]


def test_a_further_failover_in_mid_rotation_and_one_after_it(played: Played) -> None:
    lab, client = played('[[failover]]\nsince = "failover"\n[[failover]]\nsince = "complete"\nafter = "500ms"')
    client.batch_apply_update_action(**QUESTION)
    await_status(client, "complete")
    until(lambda: len(lab.rotation.failovers) == 3, seconds=PATIENCE, what="there were three failovers")
    until(
        lambda: client.describe_replication_groups()["ReplicationGroups"][0]["Status"] == "available",
        seconds=PATIENCE, what="the group was available",
    )  # fmt: skip
    lab.rotation.join()
    done = lab.rotation.failovers
    assert [failover.new for failover in done[:2]] == [failover.old for failover in done[1:]]
    assert failovers(client) == [
        f"Failover from primary node {each.old} to replica node {each.new} completed" for each in done
    ]
    assert {node.replication().follows for node in lab.replicas.replicas} == {lab.replicas.primary.address}
    assert all(node.replication().link_up for node in lab.replicas.replicas)


def test_a_replica_that_does_not_follow_is_available_to_aws_and_is_not_promoted(played: Played) -> None:
    lab, client = played(f'[[unsynced]]\nnode = 2\nlasting = "{PATIENCE:g}s"')
    client.batch_apply_update_action(**QUESTION)
    await_status(client, "complete")
    assert lab.replicas.primary.name == THIRD
    [row] = client.describe_cache_clusters(CacheClusterId=SECOND)["CacheClusters"]
    assert row["CacheClusterStatus"] == "available"
    apart = lab.replicas.nodes[SECOND].replication()
    assert (apart.primary, apart.link_up) == (False, False)
    [primary] = [failover.new for failover in lab.rotation.failovers]
    assert primary == THIRD
    # Its time comes.
    lab.rotation.choreography._nodes.synchronise(SECOND)
    until(lambda: lab.replicas.nodes[SECOND].replication().link_up, seconds=PATIENCE, what="it followed")


def test_aws_starts_the_update_before_the_request_arrives(played: Played) -> None:
    lab, client = played('[by_system]\nsince = "asked"')
    [refused] = client.batch_apply_update_action(**QUESTION)["UnprocessedUpdateActions"]
    assert "waiting-to-start" in refused["ErrorMessage"]
    assert rows(client, "NodeUpdateInitiatedBy") == {"system"}
    await_status(client, "complete")
    assert len(lab.rotation.failovers) == 1


def test_aws_schedules_the_update_and_starts_it(played: Played) -> None:
    lab, client = played('[by_system]\nscheduling = "300ms"\nscheduled = "300ms"')
    seen: list[str] = []
    until(
        lambda: bool(seen.append(action(client)["UpdateActionStatus"]) or seen[-1] == "complete"),  # type: ignore[func-returns-value]
        seconds=PATIENCE, what="the update was complete",
    )  # fmt: skip
    order = ["not-applied", "scheduling", "scheduled", "waiting-to-start", "in-progress", "complete"]
    assert list(dict.fromkeys(seen)) == [status for status in order if status in seen]
    assert rows(client, "NodeUpdateInitiatedBy") == {"system"}
    assert lab.world.reached(Milestone.ASKED) is None


def test_an_update_is_superseded_in_mid_flight(played: Played) -> None:
    lab, client = played('[superseded]\nsince = "applied"\nafter = "300ms"\nby = "the-next-one"')
    client.batch_apply_update_action(**QUESTION)
    await_status(client, "not-applicable")
    lab.rotation.join()
    assert rows(client, "NodeUpdateStatus") <= {"complete", "stopped"}
    assert client.describe_replication_groups()["ReplicationGroups"][0]["Status"] == "available"
    question = {**QUESTION, "ServiceUpdateName": "the-next-one"}
    assert client.batch_apply_update_action(**question)["ProcessedUpdateActions"]
    until(
        lambda: client.describe_update_actions(**question)["UpdateActions"][0]["UpdateActionStatus"] == "complete",
        seconds=PATIENCE, what="the next one was complete",
    )  # fmt: skip
    assert action(client)["UpdateActionStatus"] == "not-applicable"


def test_a_scenario_about_a_node_that_is_not_there_is_refused(lab_roster: Roster, tmp_path: Path) -> None:
    (tmp_path / "far.toml").write_text('title = "x"\n[[unsynced]]\nnode = 3', encoding="utf-8")
    with pytest.raises(Usage, match="about node 3, and the lab has only 2"):
        Lab(tmp_path, replicas=1, roster=lab_roster, scenario=scenarios.read(tmp_path / "far.toml"))
