"""ModifyReplicationGroup and ListAllowedNodeTypeModifications of the simulator: valid answers, and real rotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from patchpilot.lab.laboratory import GROUP, Lab
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from tests.contract.test_simulator_rotation import Checked

NODES = [f"{GROUP}-{number:03d}" for number in (1, 2)]


@pytest.fixture
def lab(lab_roster: Roster, tmp_path: Path) -> Iterator[Lab]:
    with Lab(
        tmp_path, postgres=False, roster=lab_roster, replicas=1, write_loss_ms=30, endpoint_lag_ms=30,
        seconds_per_node=0.3,
    ) as lab:  # fmt: skip
        yield lab


@pytest.fixture
def ask(lab: Lab, elasticache: Callable[..., Any]) -> Checked:
    return Checked(elasticache(lab.cloud.url), lab)


def group(ask: Checked) -> dict[str, Any]:
    [found] = ask("DescribeReplicationGroups", ReplicationGroupId=GROUP)["ReplicationGroups"]
    return dict(found)


def nodes(ask: Checked, key: str) -> dict[str, Any]:
    return {row["CacheClusterId"]: row[key] for row in ask("DescribeCacheClusters")["CacheClusters"]}


def refused(ask: Checked, **change: Any) -> str:
    with pytest.raises(ClientError) as refusal:
        ask("ModifyReplicationGroup", ReplicationGroupId=GROUP, ApplyImmediately=True, **change)
    return str(refusal.value.response["Error"]["Code"])


def test_an_engine_upgrade_rotates_the_nodes_and_fails_over_once(lab: Lab, ask: Checked) -> None:
    before = nodes(ask, "EngineVersion")
    asked = {"ReplicationGroupId": GROUP, "EngineVersion": "9.2", "ApplyImmediately": True}
    assert ask("ModifyReplicationGroup", **asked)["ReplicationGroup"]["Status"] == "modifying"
    assert refused(ask, EngineVersion="9.2") == "InvalidReplicationGroupState"
    until(lambda: group(ask)["Status"] == "available", seconds=60, what="the group was available")
    assert set(before.values()) == {"9.1"}
    assert nodes(ask, "EngineVersion") == dict.fromkeys(NODES, "9.2")
    assert lab.replicas.primary.name == NODES[1]
    events = [row["Message"] for row in ask("DescribeEvents", Duration=60)["Events"]]
    assert sum(message.startswith("Failover from") for message in events) == 2  # the node's and the group's
    assert refused(ask, EngineVersion="9.1") == "InvalidParameterCombination"
    assert refused(ask, EngineVersion="99") == "InvalidParameterCombination"
    assert refused(ask, Engine="redis", EngineVersion="7.1") == "InvalidParameterCombination"


def test_what_is_pending_is_shown_and_flushed_by_the_next_change(ask: Checked) -> None:
    ask("ModifyReplicationGroup", ReplicationGroupId=GROUP, EngineVersion="9.2", ApplyImmediately=False)
    assert group(ask)["Status"] == "available"
    assert nodes(ask, "PendingModifiedValues") == {node: {"EngineVersion": "9.2"} for node in NODES}
    larger = ask("ListAllowedNodeTypeModifications", ReplicationGroupId=GROUP)["ScaleUpModifications"]
    assert "cache.r7g.xlarge" in larger
    assert refused(ask, CacheNodeType="cache.t0.nano") == "InvalidParameterValue"
    ask("ModifyReplicationGroup", ReplicationGroupId=GROUP, CacheNodeType="cache.r7g.xlarge", ApplyImmediately=True)
    until(lambda: group(ask)["Status"] == "available", seconds=60, what="the group was available")
    assert group(ask)["CacheNodeType"] == "cache.r7g.xlarge"
    assert nodes(ask, "EngineVersion") == dict.fromkeys(NODES, "9.2")
    assert nodes(ask, "PendingModifiedValues") == {node: {} for node in NODES}
