"""Plans, approvals, stops and the other kinds of operation in the lab, as a user gives the commands."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import boto3

from patchpilot.cli import asking
from patchpilot.errors import Exit
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from tests.scenarios.test_pilot import Lab, lab
from tests.support.commands import patchpilot


def command(it: Lab, *words: str) -> Any:
    return patchpilot(*words, "--cluster", "broker", "--config", it.config, cwd=it.directory)


def planned(it: Lab) -> dict[str, Any]:
    done = command(it, "plan", "--output", "json")
    assert done.returncode == Exit.DONE, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def fail_over(it: Lab) -> None:
    """Somebody fails the group over by hand, and it comes to rest."""
    client = boto3.client(
        "elasticache", endpoint_url=it.facts["elasticache"], region_name=it.facts["region"],
        aws_access_key_id="lab", aws_secret_access_key="lab",
    )  # fmt: skip
    group = it.facts["replication_group"]
    client.test_failover(ReplicationGroupId=group, NodeGroupId="0001")

    def rests() -> bool:
        [found] = client.describe_replication_groups(ReplicationGroupId=group)["ReplicationGroups"]
        return bool(found["Status"] == "available")

    until(rests, seconds=60, what="the group was available again")
    client.close()


def test_planned_approved_and_stopped_by_hand(lab_roster: Roster, tmp_path: Path) -> None:
    with lab(lab_roster, tmp_path / "lab", "--seconds-per-node", "3", "--replicas", "2") as it:
        old = planned(it)
        assert old["order"][-1] == old["primary"]
        fail_over(it)
        refused = command(it, "run", "--plan", old["digest"])
        assert refused.returncode == Exit.BLOCKED, refused.stderr
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("patchpilot: ")]
        new = planned(it)
        assert f"primary was {old['primary']}, is {new['primary']}" in line
        assert it.calls("BatchApplyUpdateAction") == 0

        first = it.run("--plan", new["digest"], "--approve-before", "trigger")
        first.await_word("waiting for `patchpilot approve")
        first.process.send_signal(signal.SIGKILL)
        first.end()
        second = it.run("--output", "json")  # what it was asked to do is on record
        second.await_word("waiting for `patchpilot approve")
        assert it.calls("BatchApplyUpdateAction") == 0
        assert command(it, "approve", "--plan", new["digest"]).returncode == Exit.DONE
        second.await_word("0/3 nodes done")
        asking.stop("broker", Path(it.config), "enough")  # in this process: a command takes a while to start
        code, output = second.end()
        assert code == Exit.ABORTED, second.said
        assert (it.calls("BatchApplyUpdateAction"), it.calls("BatchStopUpdateAction")) == (1, 1)
        answer = json.loads(output)
        report = json.loads((it.directory / answer["report"]["json"]).read_text())
        assert (answer["outcome"], report["outcome"]) == ("aborted", "aborted")
        assert report["operation"]["held_to"] == new["digest"]
        assert report["operation"]["approved_by"]
        assert "enough" in report["abort"]["why"]
        assert {row["status"] for row in report["nodes"]} <= {"complete", "stopped"}
        assert all(claim["holds"] for claim in report["verification"]["claims"])


def test_an_engine_upgrade_on_game_day(lab_roster: Roster, tmp_path: Path) -> None:
    with lab(lab_roster, tmp_path / "lab", "--seconds-per-node", "0.5", "--replicas", "1") as it:
        upgrade = ("run", "--operation", "engine-upgrade", "--engine-version", "9.2", "--output", "json")
        done = command(it, *upgrade)
        assert done.returncode == Exit.DONE, done.stderr
        report = json.loads((it.directory / json.loads(done.stdout)["report"]["json"]).read_text())
        assert report["operation"]["what"] == "engine upgrade valkey 9.2"
        assert len(report["failovers"]) == 1
        assert it.calls("ModifyReplicationGroup") == 1
        assert command(it, *upgrade).returncode == Exit.NOTHING_TO_DO
