"""Pre-flight and proof in the lab, as a user runs them: with an alarm that fires, and a worker that is blocked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis

from patchpilot.errors import Exit
from patchpilot.lab.roster import Roster
from patchpilot.postgres.connection import Database
from tests.conftest import shop_on
from tests.scenarios.test_pilot import Lab, lab
from tests.support.commands import patchpilot
from tests.support.processes import Shop
from tests.support.shop import hold

QUICK = {"PATCHPILOT_RUNBOOK__GRACE": "1s", "PATCHPILOT_RUNBOOK__VERIFY_TIMEOUT": "8s"}


@pytest.fixture
def it(lab_roster: Roster, tmp_path: Path) -> Iterator[Lab]:
    with lab(lab_roster, tmp_path / "lab", "--seconds-per-node", "0.5") as opened:
        yield opened


@pytest.fixture
def shop(it: Lab, lab_roster: Roster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    with shop_on(lab_roster, tmp_path, it.facts["endpoint"], it.facts["postgres"], monkeypatch) as opened:
        yield opened


def preflight(it: Lab, *options: str) -> tuple[int, dict[str, Any]]:
    done = patchpilot("preflight", "--cluster", "broker", "--config", it.config, "--output", "json", *options)
    return done.returncode, json.loads(done.stdout)


def verdicts(answer: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in answer["checks"] if check["verdict"] != "pass"}


def set_alarm(it: Lab, state: str) -> None:
    client: Any = boto3.client(
        "cloudwatch", endpoint_url=it.facts["elasticache"], region_name=it.facts["region"],
        aws_access_key_id="lab", aws_secret_access_key="lab",
    )  # fmt: skip
    with closing(client):
        client.set_alarm_state(AlarmName="lab-broker-ReplicationLag", StateValue=state, StateReason="rehearsed")


def canaries_left(it: Lab) -> list[str]:
    with Database(it.facts["postgres"]) as database, redis.Redis.from_url(it.facts["endpoint"]) as broker:
        rows = database.fetch("SELECT group_id FROM patchpilot.chord WHERE callback_name = 'patchpilot.canary'")
        rows += database.fetch(
            "SELECT task_id AS group_id FROM patchpilot.outbox WHERE task_name = 'patchpilot.canary'"
        )
        keys = [key.decode() for key in broker.scan_iter("*canary*")]
        return [row["group_id"] for row in rows] + keys


def test_pre_flight_by_itself_says_what_is_wrong_and_touches_nothing(it: Lab) -> None:
    code, answer = preflight(it)
    assert (code, answer["outcome"], answer["blocked"]) == (Exit.DONE, "ready", [])
    assert verdicts(answer) == {"workers": "warn"}, answer["checks"]
    assert all(check["evidence"] and check["why"] for check in answer["checks"])

    set_alarm(it, "ALARM")
    code, answer = preflight(it)
    assert (code, answer["outcome"], answer["blocked"]) == (Exit.BLOCKED, "blocked", ["alarms"])
    text = patchpilot("preflight", "--cluster", "broker", "--config", it.config)
    assert (text.returncode, text.stderr.count("\n")) == (Exit.BLOCKED, 1), text.stderr
    assert "alarms: lab-broker-ReplicationLag is firing: rehearsed" in text.stderr
    assert "to mend it: see to what is firing" in text.stdout
    code, answer = preflight(it, "--waive", "alarms", "--reason", "a rehearsal")
    assert (code, answer["blocked"]) == (Exit.DONE, [])
    assert [check["waived"] for check in answer["checks"] if check["name"] == "alarms"] == ["a rehearsal"]

    assert json.loads(patchpilot("status", "--config", it.config, "--output", "json").stdout) == {"runs": []}
    assert it.calls("BatchApplyUpdateAction") == 0
    with Database(it.facts["postgres"]) as database:
        assert database.fetch("SELECT FROM patchpilot.lease") == []


def test_a_worker_that_is_blocked_fails_the_verification_and_once_it_is_not_the_same_run_is_proven(
    it: Lab, shop: Shop
) -> None:
    gate = shop.directory / "gate"
    worker = shop.worker("-c", "1", SHOP_CHANNEL_RETRY="1")
    hold.s(1, str(gate)).apply_async()
    shop.await_line("hold began")
    run = ["run", "--cluster", "broker", "--config", it.config, "--output", "json"]
    failed = patchpilot(*run, cwd=it.directory, **QUICK)
    assert failed.returncode == Exit.VERIFICATION_FAILED, failed.stderr
    why = json.loads(failed.stdout)["why"]
    assert f"{worker.name}@" in why
    assert f"did not run the canary task and chord (1 of 1 processes busy: {hold.name} x1)" in why
    assert canaries_left(it) == []

    gate.touch()
    shop.await_line("hold ended")
    proven = patchpilot(*run, cwd=it.directory, **QUICK)
    assert proven.returncode == Exit.DONE, proven.stderr
    report = json.loads((it.directory / json.loads(proven.stdout)["report"]["json"]).read_text())
    claims = {claim["name"]: claim["evidence"] for claim in report["verification"]["claims"] if claim["holds"]}
    assert "chord came back from 1 of 1 workers" in claims["workers-consume"]
    assert {"workers-answer", "queues-drain", "alarms-quiet"} <= claims.keys()
    assert canaries_left(it) == []
    assert it.calls("BatchApplyUpdateAction") == 1
    code, answer = preflight(it)
    assert (code, answer["outcome"]) == (Exit.NOTHING_TO_DO, "nothing-to-do")
