"""The runbook against a rotation of real nodes: our client, our reading of the nodes, the simulator's answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from patchpilot.clock import SYSTEM
from patchpilot.elasticache import cloudwatch, connect
from patchpilot.engine.journal import MemoryJournal
from patchpilot.engine.runner import Runner
from patchpilot.errors import NeedsOperator, Transient, Usage
from patchpilot.lab.laboratory import GROUP, REGION, Lab
from patchpilot.lab.roster import Roster
from patchpilot.phases import Desk, runbook
from patchpilot.postgres.journal import Run
from patchpilot.recovery.findings import Applied, Finding, Window
from patchpilot.report import Files
from patchpilot.settings import Aws, Runbook
from patchpilot.valkey import nodes
from patchpilot.valkey.nodes import Report
from patchpilot.workers import Fleet


class NothingStuck:
    """Recovery on a broker without tasks."""

    def survey(self, window: Window) -> tuple[Finding, ...]:
        return ()

    def recover(self, window: Window, *, run_id: str | None = None) -> tuple[Applied, ...]:
        return ()

    def applied(self, run_id: str) -> tuple[Applied, ...]:
        return ()

    def repeated_starts(self, age: timedelta) -> tuple[dict[str, str], ...]:
        return ()


class NoWorkers:
    """A broker without workers."""

    def look(self, queues: Collection[str] = ()) -> Fleet:
        return Fleet()

    def release(self, to: Mapping[str, str]) -> dict[str, str]:
        raise AssertionError(f"there is no worker, and canaries were to be sent to {to}")

    def tidy(self, sent: Mapping[str, str]) -> None:
        raise AssertionError("nothing was sent")


@pytest.fixture
def lab(lab_roster: Roster, tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path, roster=lab_roster, postgres=False, seconds_per_node=1.0, endpoint_lag_ms=200) as lab:
        yield lab


def test_a_whole_run_against_nodes_that_really_rotate(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    journal = MemoryJournal(SYSTEM)
    before = lab.replicas.primary.name
    aws = Aws(region=REGION, endpoint_url=lab.cloud.url)
    with connect(aws) as cloud, cloudwatch.connect(aws) as monitoring:
        desk = Desk(
            cluster="broker",
            group=GROUP,
            role="broker",
            cloud=cloud,
            monitoring=monitoring,
            workers=NoWorkers(),
            nodes=nodes.connect(lab.endpoint),
            recovery=NothingStuck(),
            reports=Files(journal, Run(journal.run_id, "lab", "broker", SYSTEM.now()), tmp_path / "reports"),
            schema=lambda: None,
            runbook=Runbook(grace=timedelta(seconds=1), poll_interval=timedelta(milliseconds=200)),
            window=Window(),
        )
        facts = Runner(runbook(desk), journal, SYSTEM).run().facts()

    actions = [json.loads(line)["action"] for line in lab.calls.read_text().splitlines()]
    assert actions.count("BatchApplyUpdateAction") == 1
    (failover,) = facts["watch"]["rotation"]["failovers"]
    assert (failover["old"], failover["to"]) == (before, lab.replicas.primary.name)
    assert failover["told_by"] == "events"
    assert {node["status"] for node in facts["watch"]["nodes"].values()} == {"complete"}
    not_passed = {
        check["name"]: check["evidence"] for check in facts["readiness"]["checks"] if check["verdict"] != "pass"
    }
    assert not_passed.keys() == {"workers"}, not_passed
    assert [claim["name"] for claim in facts["verify"]["claims"] if not claim["holds"]] == []
    messages = [event["message"] for event in facts["watch"]["events"]]
    assert messages.count("Finished recovery for cache nodes 0001") == 3
    report = json.loads(Path(facts["report"]["json"]).read_text())
    assert report["outcome"] == "done"
    assert {line["status"] for line in report["timeline"] if line["what"] == "update"} >= {"in-progress", "complete"}


def test_nodes_report_themselves_and_what_follows_them(lab: Lab) -> None:
    asked = nodes.connect(lab.endpoint)
    primary = asked.endpoint()
    assert (primary.role, primary.link_up) == ("primary", None)
    assert [replica.state for replica in primary.replicas] == ["online", "online"]
    for node in lab.replicas.replicas:
        report = asked.member(node.address.host, node.address.port)
        assert (report.role, report.link_up, report.replicas) == ("replica", True, ())
        assert report.replid == primary.replid
        assert report.silence is not None
    old = lab.replicas.primary
    lab.failover()
    assert lab.replicas.primary is not old
    assert asked.endpoint().role == "primary"
    assert asked.member(old.address.host, old.address.port).role == "replica"


def test_a_node_that_is_down_is_waited_for_and_names_its_address(lab: Lab) -> None:
    node = lab.replicas.replicas[0]
    node.stop(hard=True)
    with pytest.raises(Transient, match=f"{node.address.host}:{node.address.port} does not answer"):
        nodes.connect(lab.endpoint).member(node.address.host, node.address.port)


def test_a_node_that_refuses_the_login_is_a_persons_to_mend_and_the_password_is_kept(valkey: str) -> None:
    url = valkey.replace("redis://", "redis://pilot:hunter2@")
    with pytest.raises(NeedsOperator, match="refuses our login") as refusal:
        nodes.connect(url).endpoint()
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("url", ["", "broker.example:6379", "http://broker.example", "redis://"])
def test_what_is_no_url_of_a_node_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(Usage, match="not a URL like"):
        nodes.connect(url)


@pytest.mark.parametrize(
    ("info", "report"),
    [
        (
            {"role": "slave", "master_link_status": "down", "master_last_io_seconds_ago": -1, "slave_repl_offset": 7},
            Report("replica", 7, link_up=False, silence=None),
        ),
        (
            {"role": "master", "connected_slaves": 0, "master_repl_offset": 7, "master_replid": "r"},
            Report("primary", 7, "r"),
        ),
    ],
)
def test_info_is_read_as_the_server_documents_it(info: dict[str, object], report: Report) -> None:
    assert Report.of(info) == report
