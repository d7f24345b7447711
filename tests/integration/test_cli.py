"""The command line: one clear line and an exit code for each way to get it wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import chord

from patchpilot.errors import Exit
from patchpilot.lab.processes import until
from tests.support.commands import environment, patchpilot
from tests.support.processes import Shop
from tests.support.shop import add, total


def config(directory: Path, dsn: str, endpoint: str, extra: str = "") -> Path:
    path = directory / "patchpilot.toml"
    path.write_text(
        f'[postgres]\ndsn = "{dsn}"\n[clusters.broker]\nrole = "broker"\nreplication_group = "b"\n'
        f'endpoint = "{endpoint}"\n[clusters.pages]\nrole = "cache"\nreplication_group = "p"\n{extra}'
    )
    return path


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["preflight"],
        ["plan"],
        ["approve"],
        ["status"],
        ["recover"],
        ["report"],
        ["db", "migrate"],
        ["lab", "up"],
    ],
)
def test_help_is_worth_reading(command: list[str]) -> None:
    done = patchpilot(*command, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 200
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], Exit.USAGE, "--cluster"),
        (["fly"], Exit.USAGE, "fly"),
        (["run", "--cluster", "brokr"], Exit.USAGE, "no cluster 'brokr'"),
        (["run", "--cluster", "broker", "--grace", "5"], Exit.USAGE, "--grace: '5' is not a duration"),
        (["preflight"], Exit.USAGE, "--cluster"),
        (["preflight", "--cluster", "brokr"], Exit.USAGE, "no cluster 'brokr'"),
        (["run", "--cluster", "broker", "--waive", "alarms"], Exit.USAGE, "each --waive needs a --reason"),
        (
            ["preflight", "--cluster", "broker", "--waive", "luck", "--reason", "x"],
            Exit.USAGE,
            "(checks: group-available,",
        ),
        (["recover", "--min-age", "soon"], Exit.USAGE, "--min-age: 'soon' is not a duration"),
        (["recover", "--min-age", "2h", "--max-age", "1h"], Exit.USAGE, "window is empty"),
        (["recover", "--cluster", "pages"], Exit.USAGE, "not a broker"),
        (["status", "no-such-run"], Exit.USAGE, "no-such-run"),
        (["report", "no-such-run"], Exit.USAGE, "no-such-run"),
        (["run", "--cluster", "broker", "--config", "nowhere.toml"], Exit.USAGE, "no such configuration file"),
        (["run", "--cluster", "broker", "--plan", "0123456789abcdef"], Exit.USAGE, "no plan 0123456789abcdef"),
        (["stop", "--cluster", "broker"], Exit.NOTHING_TO_DO, "no run of cluster 'broker' is under way"),
    ],
)
def test_a_wrong_word(tmp_path: Path, migrated: str, valkey: str, arguments: list[str], code: int, words: str) -> None:
    config(tmp_path, migrated, valkey)
    done = patchpilot(*arguments, cwd=tmp_path, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_unreachable_database_an_unreachable_broker_and_missing_tables(
    tmp_path: Path, dsn: str, migrated: str, valkey: str
) -> None:
    secret = "postgresql://u:hunter2@127.0.0.1:1/x"
    path = config(tmp_path, secret, valkey)
    done = patchpilot("recover", "--config", path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (Exit.RESUME_LATER, 1), done.stderr
    assert "PostgreSQL cannot be reached" in done.stderr
    assert "hunter2" not in done.stderr

    path = config(tmp_path, dsn, valkey)
    done = patchpilot("recover", "--config", path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (Exit.ERROR, 1), done.stderr
    assert "patchpilot db migrate" in done.stderr

    assert "0001" in patchpilot("db", "migrate", "--config", path).stderr
    assert "up to date" in patchpilot("db", "migrate", "--config", path).stderr


def test_a_report_that_cannot_be_written_does_not_change_how_a_run_ends(tmp_path: Path, migrated: str) -> None:
    path = config(tmp_path, migrated, "redis://127.0.0.1:1/0", '[aws]\nregion = "eu-central-1"\n')
    where = tmp_path / "reports"
    where.write_text("a file")
    run = ["run", "--cluster", "broker", "--time-budget", "0s", "--config", path]
    for more in ([], ["--output", "json"]):
        done = patchpilot(*run, *more, PATCHPILOT_REPORTS=str(where))
        lines = done.stderr.strip().splitlines()
        assert done.returncode == Exit.RESUME_LATER, done.stderr
        assert lines[-2].startswith(f"no report so far: cannot write {where}/"), done.stderr
        assert lines[-1].startswith("patchpilot: stopped in preflight/plan: the time budget is spent"), done.stderr
    assert json.loads(done.stdout)["report"] == {}


def test_a_broker_that_is_away_repairs_nothing(shop: Shop) -> None:
    add.s(1, 1).apply_async()
    path = config(shop.directory, shop.dsn, "redis://:hunter2@127.0.0.1:1/0")
    done = patchpilot("recover", "--min-age", "0s", "--config", path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (Exit.RESUME_LATER, 1), done.stderr
    assert "cannot be read" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("counting", ["valkey"], indirect=True)
def test_recover_says_what_it_would_do_and_does_it_once(shop: Shop) -> None:
    import redis

    result = chord([add.s(1, 1)], total.s()).apply_async()
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
    shop.worker()
    result.parent.get(timeout=30)
    path = config(shop.directory, shop.dsn, shop.broker)
    recover = ["recover", "--min-age", "0s", "--config", path]
    nothing = patchpilot("recover", "--config", path, "--output", "json")
    answer = json.loads(nothing.stdout)
    assert (answer["findings"], answer["applied"]) == ([], [])  # too young for the usual window
    planned: dict[str, Any] = {"findings": []}

    def found() -> bool:
        planned.update(json.loads(patchpilot(*recover, "--dry-run", "--output", "json").stdout))
        return bool(planned["findings"])

    until(found, seconds=60, what="the chord was found stuck")
    [finding] = planned["findings"]
    assert {key: finding[key] for key in ("kind", "id", "diagnosis", "remedy", "callback", "returned", "total")} == {
        "kind": "chord", "id": result.parent.id, "diagnosis": "part-return-lost", "remedy": "dispatch-callback",
        "callback": total.name, "returned": 1, "total": 1,
    }  # fmt: skip
    assert finding["reason"]
    assert finding["age_seconds"] >= 0
    text = patchpilot(*recover, "--dry-run")
    assert result.parent.id in text.stdout
    # Two at once, as real processes; both succeed, one of them does it.
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "patchpilot", *map(str, recover), "--output", "json"],
            env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    answers = [json.loads(command.communicate(timeout=60)[0]) for command in commands]
    assert [command.returncode for command in commands] == [0, 0]
    assert sum(len(answer["applied"]) for answer in answers) == 1
    assert result.get(timeout=30) == 2
    shop.stop()
    assert shop.ledger().count("total 2") == 1


@pytest.mark.parametrize("counting", ["valkey"], indirect=True)
def test_recover_killed_at_any_moment_strands_nothing(shop: Shop) -> None:
    """Killed at growing delays until one gets through; the claim it may have left behind is a lease."""
    import redis

    results = [chord([add.s(i, 1)], total.s(label=f"sum{i}")).apply_async() for i in range(12)]
    with redis.Redis.from_url(shop.broker) as broker:
        for result in results:
            broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
    shop.worker()
    for result in results:
        result.parent.get(timeout=30)
    path = config(shop.directory, shop.dsn, shop.broker, '[recovery]\nclaim_lease = "3s"\n')
    command = [
        sys.executable,
        "-m",
        "patchpilot",
        "recover",
        "--min-age",
        "0s",
        "--config",
        str(path),
        "--output",
        "json",
    ]

    def begun() -> bool:
        """Whether some callback was claimed or sent, by the ledger and by PostgreSQL."""
        from patchpilot.postgres.connection import Database

        with Database(shop.dsn) as database:
            return bool(database.fetch("SELECT 1 FROM patchpilot.chord WHERE state <> 'open'"))

    def stuck() -> bool:
        """Whether all of them have been stuck for long enough to be found."""
        done = subprocess.run([*command, "--dry-run"], env=environment(), check=True, stdout=subprocess.PIPE)
        return len(json.loads(done.stdout)["findings"]) == len(results)

    until(stuck, seconds=60, what="every chord was found stuck")
    killed = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until(begun, seconds=30, what="recovery had claimed a chord")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()

    def all_done() -> bool:
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=60)
        return all(f"sum{i} {i + 1}" in shop.ledger() for i in range(12))

    until(all_done, seconds=60, what="every callback had run")
    shop.stop()
    assert [shop.ledger().count(f"sum{i} {i + 1}") for i in range(12)] == [1] * 12


@pytest.mark.parametrize("counting", ["valkey"], indirect=True)
def test_a_dry_run_is_a_plan(shop: Shop) -> None:
    """What it says is done, and nothing else; what is no longer so is listed and left alone."""
    import redis

    path = config(shop.directory, shop.dsn, shop.broker)
    recover = ["recover", "--min-age", "0s", "--config", path, "--output", "json"]
    lost = [add.s(i, 0).apply_async(queue="nobody") for i in range(3)]
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete("nobody")
        planned = patchpilot(*recover, "--dry-run").stdout
        file = shop.directory / "plan.json"
        file.write_text(planned)
        assert {it["id"] for it in json.loads(planned)["findings"]} == {result.id for result in lost}
        # The world moves on: one more is lost, and one of the plan's is sent again by somebody else.
        add.s(9, 0).apply_async(queue="nobody")
        broker.delete("nobody")
        from patchpilot.postgres.connection import Database

        with Database(shop.dsn) as database:
            database.execute("DELETE FROM patchpilot.outbox WHERE task_id = %s", [lost[0].id])
        answer = json.loads(patchpilot(*recover, "--plan", file).stdout)
        assert {it["id"] for it in answer["applied"]} == {lost[1].id, lost[2].id}
        assert [(it["id"], it["now"]) for it in answer["changed"]] == [(lost[0].id, "gone")]
        assert broker.llen("nobody") == 2
        again = json.loads(patchpilot(*recover, "--plan", file).stdout)
        assert (again["applied"], len(again["changed"])) == ([], 3)
        text = patchpilot("recover", "--min-age", "0s", "--config", path, "--plan", file)
        assert "not as planned" in text.stderr
        (shop.directory / "other").mkdir()
        other = config(shop.directory / "other", shop.dsn, f"{shop.broker.rpartition('/')[0]}/7")
        done = patchpilot("recover", "--config", other, "--plan", file)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (Exit.USAGE, 1, "")
        assert "it was made for the broker localhost:" in done.stderr
        for wrong, words in (
            (planned.replace("republish", "none"), "not as it was printed"),
            ("{}", "is no plan"),
            ("nonsense", "is no plan"),
        ):
            file.write_text(wrong)
            done = patchpilot(*recover, "--plan", file)
            assert (done.returncode, len(done.stderr.strip().splitlines())) == (Exit.USAGE, 1), done.stderr
            assert words in done.stderr
        assert patchpilot(*recover, "--plan", "nowhere.json").returncode == Exit.USAGE
        assert json.loads(patchpilot(*recover, "--only", "chords,callbacks").stdout)["findings"] == []
        assert patchpilot(*recover, "--only", "chord").returncode == Exit.USAGE
        assert len(json.loads(patchpilot(*recover, "--only", "tasks").stdout)["applied"]) == 1
