"""Plans and requests to runs, on a real PostgreSQL, and the commands that make requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from patchpilot.cli import asking
from patchpilot.cli.approving import approve
from patchpilot.cli.console import Output
from patchpilot.cli.report import Format, report
from patchpilot.cli.run import _Pilot
from patchpilot.cli.status import status
from patchpilot.engine.journal import Kind
from patchpilot.engine.requests import Ask, approval, hold, stop
from patchpilot.errors import NothingToDo
from patchpilot.phases.order import Kind as Do
from patchpilot.phases.order import Order, settle
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.postgres.holder import Holder
from patchpilot.postgres.journal import RunJournal, find_run, open_run
from patchpilot.settings import Cluster, Settings
from tests.integration.test_journal import Forgetful

KEY = "0123456789abcdef"
PROPOSAL = {
    "operation": "service-update", "what": "service update u", "group": "b", "primary": "b-001",
    "order": ["b-002", "b-001"],
}  # fmt: skip


@pytest.fixture
def database(migrated: str) -> Iterator[Database]:
    opened = Database(migrated)
    yield opened
    opened.close()


def begin(database: Database, order: Order | None = None) -> RunJournal:
    journal = open_run(database, "default", "broker", ttl=timedelta(hours=1))
    journal.append(Kind.STARTED, data={"order": (order or Order()).note()})
    return journal


def test_requests_come_back_in_order_with_who_asked_and_why(database: Database) -> None:
    journal = begin(database)
    requests.ask(database, journal.run_id, Ask.PAUSE, reason="lunch")
    requests.ask(database, journal.run_id, Ask.APPROVE, digest=KEY)
    asked = requests.requests(database, journal.run_id)
    assert [(each.ask, each.reason, each.digest) for each in asked] == [
        (Ask.PAUSE, "lunch", None), (Ask.APPROVE, "", KEY),
    ]  # fmt: skip
    assert {each.by for each in asked} == {requests.whoever()}
    assert Holder.here().host in asked[0].by
    assert asked[0].at <= asked[1].at
    assert hold(asked) == f"pause asked for by {requests.whoever()}: lunch"
    assert (stop(asked), approval(asked, KEY)) == (None, asked[1])
    assert approval(asked, "f" * 16) is None


def test_a_secret_in_a_reason_is_not_kept(database: Database) -> None:
    run_id = begin(database).run_id
    asked = requests.ask(database, run_id, Ask.STOP, reason="see postgresql://u:hunter2@h/db")
    assert requests.requests(database, run_id) == (asked,)
    assert asked.reason == "see postgresql://***@h/db"


def test_the_last_of_pause_and_resume_counts_and_a_stop_beats_both(database: Database) -> None:
    journal = begin(database)
    held = []
    for ask in (Ask.PAUSE, Ask.RESUME, Ask.PAUSE, Ask.STOP):
        requests.ask(database, journal.run_id, ask)
        held.append(hold(requests.requests(database, journal.run_id)) is not None)
    assert held == [True, False, True, False]


def test_a_request_whose_answer_was_lost_is_made_once(migrated: str) -> None:
    with Forgetful(migrated) as database:
        journal = begin(database)
        assert requests.ask(database, journal.run_id, Ask.STOP).ask is Ask.STOP
        assert len(requests.requests(database, journal.run_id)) == 1


def test_nothing_can_be_asked_of_a_run_that_is_over(database: Database) -> None:
    journal = begin(database)
    assert requests.unfinished(database, "default", "broker") == journal.run_id
    journal.append(Kind.FINISHED, data={"outcome": "done"})
    with pytest.raises(NothingToDo, match="is over"):
        requests.ask(database, journal.run_id, Ask.STOP)
    with pytest.raises(NothingToDo, match="no run of cluster 'broker' is under way"):
        requests.unfinished(database, "default", "broker")


@pytest.mark.parametrize("statement", ["DELETE FROM patchpilot.plan", "UPDATE patchpilot.run_request SET ask = 'stop'"])
def test_the_database_itself_refuses_to_change_what_was_asked(database: Database, statement: str) -> None:
    requests.ask(database, begin(database).run_id, Ask.STOP)
    requests.keep_plan(database, "default", "broker", KEY, {"what": "x"})
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        database.run(lambda connection: connection.execute(statement.encode()))


def test_a_plan_is_kept_for_its_cluster_and_says_which_run_carried_it_out(database: Database) -> None:
    content = {"what": "service update u", "grace": 300.0, "members": ["a", "b"]}
    for _ in range(2):
        requests.keep_plan(database, "default", "broker", KEY, content)
    assert requests.plan(database, "default", "broker", KEY) == {**content, "carried_out_by": None}
    assert requests.plan(database, "default", "other", KEY) is None
    assert requests.plan(database, "default", "broker", "f" * 16) is None

    journal = begin(database, Order(plan=KEY))
    journal.append(Kind.REACHED, "trigger", "trigger", {"held_to": KEY})
    assert requests.plan(database, "default", "broker", KEY)["carried_out_by"] is None  # type: ignore[index]
    journal.append(Kind.FINISHED, data={"outcome": "done"})
    assert requests.plan(database, "default", "broker", KEY)["carried_out_by"] == journal.run_id  # type: ignore[index]


def test_somebody_without_a_name_is_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert requests.whoever() == f"somebody on {Holder.here().host}"


@pytest.fixture
def config(tmp_path: Path, migrated: str) -> Path:
    path = tmp_path / "patchpilot.toml"
    path.write_text(
        f'[postgres]\ndsn = "{migrated}"\n[clusters.broker]\nrole = "broker"\nreplication_group = "b"\n'
        'endpoint = "redis://127.0.0.1:1/0"\n'
    )
    return path


def test_the_commands_say_at_once_when_they_can_have_no_effect(
    database: Database, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = begin(database, Order(approve_before="trigger"))
    with pytest.raises(NothingToDo, match="is not told to pause"):
        asking.resume("broker", config)
    journal.append(Kind.INTENDED, "trigger", "approve")
    journal.append(Kind.OBSERVED, "trigger", "approve", {"digest": KEY, "proposal": PROPOSAL})
    status(journal.run_id, config)
    assert f"waits for the approval of plan {KEY}: service update u" in capsys.readouterr().out
    approve("broker", config, KEY, "looks fine")
    asking.pause("broker", config)
    with pytest.raises(NothingToDo, match="is to pause already"):
        asking.pause("broker", config)
    asking.resume("broker", config)
    asking.stop("broker", config, "enough")
    with pytest.raises(NothingToDo, match="is to stop already"):
        asking.stop("broker", config)
    asked = [(each.ask, each.reason) for each in requests.requests(database, journal.run_id)]
    assert asked == [(Ask.APPROVE, "looks fine"), (Ask.PAUSE, ""), (Ask.RESUME, ""), (Ask.STOP, "enough")]
    capsys.readouterr()
    status(journal.run_id, config)
    shown = capsys.readouterr().out
    assert "looks fine" in shown
    assert "waits for the approval" not in shown
    status(journal.run_id, config, output=Output.JSON)
    assert [each["ask"] for each in json.loads(capsys.readouterr().out)["requests"]] == [
        "approve", "pause", "resume", "stop",
    ]  # fmt: skip


def test_what_aws_cannot_stop_is_not_asked_to_stop_unless_it_takes_too_long(database: Database, config: Path) -> None:
    journal = begin(database, Order(Do.ENGINE_UPGRADE, engine_version="9.2"))
    with pytest.raises(NothingToDo, match="needs no approval"):
        approve("broker", config)
    journal.append(Kind.INTENDED, "trigger", "trigger")
    journal.append(Kind.REACHED, "trigger", "trigger")
    with pytest.raises(NothingToDo, match=r"AWS offers no way to stop a running engine upgrade to 9\.2"):
        asking.stop("broker", config)
    journal.append(Kind.INTENDED, "watch", "watch")
    journal.append(Kind.CONTRADICTED, "watch", "watch", {"why": "it has not come to its end"})
    asking.stop("broker", config)  # it takes too long: the run may be able to give it up
    [asked] = requests.requests(database, journal.run_id)
    assert asked.ask is Ask.STOP


def test_what_is_over_is_not_asked_to_stop(database: Database, config: Path) -> None:
    journal = begin(database)
    journal.append(Kind.INTENDED, "grace", "grace")
    with pytest.raises(NothingToDo, match="is over: there is nothing to stop"):
        asking.stop("broker", config)
    assert requests.requests(database, journal.run_id) == ()


def test_the_report_of_a_run_is_printed_as_asked_for(
    database: Database, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = begin(database).run_id
    begins = {Format.TEXT: "# Patch of broker", Format.JSON: "{", Format.HTML: "<!doctype html>"}
    for output, beginning in begins.items():
        report(run_id, config, output=output)
        printed = capsys.readouterr().out
        assert printed.startswith(beginning)
        assert run_id in printed


def test_a_run_that_was_told_to_pause_is_listed_as_paused(database: Database) -> None:
    journal = begin(database)
    assert find_run(database, journal.run_id).state == "running"
    journal.append(Kind.PAUSED, "watch", "watch", {"why": "pause asked for"})
    assert find_run(database, journal.run_id).state == "paused"
    journal.append(Kind.RESUMED, "watch", "watch")
    assert find_run(database, journal.run_id).state == "running"


def test_a_run_that_is_held_to_a_plan_waits_as_that_says_however_it_is_taken_up(database: Database) -> None:
    """Not as the configuration says on the host where it is taken up: the plan would count as changed."""
    requests.keep_plan(database, "default", "broker", KEY, {"grace": 9.0})
    settings = Settings(clusters={"broker": Cluster(replication_group="b", role="broker")})

    def grace(order: Order, **waits: timedelta) -> float:
        pilot = _Pilot(settings, "broker", database, Output.TEXT, {}, waits)
        return pilot.waiting_as(order).runbook.grace.total_seconds()

    held = settle({}, Order(update="u", plan=KEY).note(), begun=False)
    assert grace(held) == 9
    assert grace(held, grace=timedelta(seconds=7)) == 7
    assert grace(Order()) == 300
