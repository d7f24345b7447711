"""`lab up` leaves a lab running, `lab down` leaves nothing, whoever was killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from patchpilot.errors import NeedsOperator, Unsafe, Usage
from patchpilot.lab.background import LabInfo, down, status, up
from patchpilot.lab.processes import Identity, until
from patchpilot.lab.programs import PostgresHome
from patchpilot.lab.roster import Roster
from patchpilot.settings import load

UPDATE = "elasticache-valkey-9-1-3-update-20261101"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory for a lab, which is down again after the test whatever happened."""
    yield tmp_path / "lab"
    down(tmp_path / "lab")


def identities(info: LabInfo) -> dict[str, Identity]:
    return Roster(Path(info.state)).processes


def assert_nothing_is_left(directory: Path, processes: dict[str, Identity]) -> None:
    until(lambda: not any(i.alive for i in processes.values()), seconds=5, what="everything was gone")
    left = {path.name for path in directory.iterdir()}
    assert left <= {".lock", "logs", "calls.jsonl"}
    mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(directory).encode() in _read(path)]
    assert mine == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_up_says_where_everything_is_and_down_stops_it(directory: Path, elasticache: Callable[..., Any]) -> None:
    info = up(directory, replicas=2, seconds_per_node=0.2, write_loss_ms=50, endpoint_lag_ms=50)

    facts = json.loads((directory / "lab.json").read_text(encoding="utf-8"))
    assert facts["endpoint"] == info.endpoint
    assert facts["endpoint"].startswith("redis://127.0.0.1:")
    assert (facts["replication_group"], facts["region"]) == ("lab-broker", "eu-central-1")
    assert LabInfo.load(directory) == info
    with psycopg.connect(facts["postgres"]) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert (directory / "lab.json").stat().st_mode & 0o777 == 0o600

    settings = load(Path(facts["config"]))
    assert settings.environment == "lab"
    assert settings.postgres_dsn() == facts["postgres"]
    assert settings.endpoint("broker") == facts["endpoint"]
    assert settings.cluster("broker").replication_group == "lab-broker"
    assert settings.aws.endpoint_url == facts["elasticache"]
    assert settings.aws.credentials_file is not None
    assert settings.aws.credentials_file.stat().st_mode & 0o777 == 0o600

    state = status(directory)
    assert state["running"]
    assert state["leads_to"] == "lab-broker-001"
    roles = {name: row["role"] for name, row in state["processes"].items() if "role" in row}
    assert roles == {"lab-broker-001": "primary", "lab-broker-002": "replica", "lab-broker-003": "replica"}
    json.dumps(state)

    client = elasticache(facts["elasticache"])
    client.batch_apply_update_action(ReplicationGroupIds=["lab-broker"], ServiceUpdateName=UPDATE)
    until(lambda: _action(client)["UpdateActionStatus"] == "complete", seconds=30, what="the rotation was complete")
    state = status(directory)
    assert state["running"]
    assert state["processes"][state["leads_to"]]["role"] == "primary"
    assert state["leads_to"] != "lab-broker-001"
    calls = [json.loads(line) for line in Path(facts["calls"]).read_text(encoding="utf-8").splitlines()]
    applied = [call for call in calls if call["action"] == "BatchApplyUpdateAction"]
    assert [call["parameters"]["ReplicationGroupIds"] for call in applied] == [["lab-broker"]]

    processes = identities(info)
    down(directory)
    assert_nothing_is_left(directory, processes)
    assert "lab-broker-003.log" in {path.name for path in (directory / "logs").iterdir()}
    down(directory)
    assert status(directory) == {"running": False, "processes": {}, "leads_to": None}
    with pytest.raises(Usage, match="patchpilot lab up"):
        LabInfo.load(directory)


def _action(client: Any) -> Any:
    return client.describe_update_actions()["UpdateActions"][0]


@pytest.mark.parametrize(
    "victims",
    [
        ["supervisor"],
        ["postgres", "lab-broker-001", "watchdog"],
        ["watchdog", "supervisor", "postgres", "lab-broker-001", "lab-broker-002"],
    ],
    ids=" + ".join,
)
def test_down_works_whoever_was_killed_before(directory: Path, victims: list[str]) -> None:
    info = up(directory, replicas=1)
    processes = identities(info)
    for victim in victims:
        processes[victim].send(signal.SIGKILL)
    until(lambda: not any(processes[v].alive for v in victims), seconds=5, what="the victims were dead")
    assert not status(directory)["running"]

    down(directory)

    assert_nothing_is_left(directory, processes)


def test_a_lab_in_use_is_not_started_twice_and_a_dead_one_is_replaced(directory: Path) -> None:
    first = up(directory, replicas=1)
    with pytest.raises(Unsafe, match="patchpilot lab down"):
        up(directory)
    processes = identities(first)
    for name in ("watchdog", "supervisor"):
        processes[name].send(signal.SIGKILL)
    until(lambda: not processes["supervisor"].alive, seconds=5, what="the supervisor was dead")
    assert processes["postgres"].alive

    second = up(directory, replicas=1)

    assert not any(identity.alive for identity in processes.values())
    assert second.postgres != first.postgres
    with redis.Redis.from_url(second.endpoint) as client:
        assert client.ping()


def test_preparation_comes_before_the_facts_and_its_failure_takes_the_lab_down(directory: Path) -> None:
    seen: dict[str, Any] = {}

    def fail(dsn: str) -> None:
        with psycopg.connect(dsn) as connection:
            seen["answer"] = connection.execute("SELECT 1").fetchone()
        seen["facts"] = (directory / "lab.json").exists()
        seen["processes"] = Roster(directory / "state.json").processes
        # Another command that comes now does not get in the way.
        with pytest.raises(Unsafe, match="at work"):
            down(directory)
        raise Usage("no such migration")

    with pytest.raises(Usage, match="no such migration"):
        up(directory, replicas=1, prepare=fail)

    assert (seen["answer"], seen["facts"]) == ((1,), False)
    assert_nothing_is_left(directory, seen["processes"])


def test_a_lab_that_cannot_start_says_why(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_broken_package(directory.parent)))
    with pytest.raises(NeedsOperator, match="broken on purpose"):
        up(directory)
    assert_nothing_is_left(directory, {})


def _broken_package(parent: Path) -> Path:
    package = parent / "path" / "moto"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('broken on purpose')", encoding="utf-8")
    return package.parent


def test_nonsense_is_refused_before_anything_is_touched(directory: Path) -> None:
    with pytest.raises(Usage, match="at least one replica"):
        up(directory, replicas=0)
    with pytest.raises(Usage, match="negative"):
        up(directory, write_loss_ms=-1)
    assert not directory.exists()
    down(directory)
    assert not directory.exists()


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Usage, match="cannot be used"):
        up(tmp_path / "file")


AS_SOMEBODY_ELSE = """
import encodings.idna, os, sys
from pathlib import Path
import psycopg, redis
from patchpilot.lab.laboratory import Lab

os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[2]))
os.chdir("/")
with Lab(Path(sys.argv[1]), replicas=1, write_loss_ms=10, endpoint_lag_ms=10, seconds_per_node=0.1) as lab:
    lab.failover()
    with psycopg.connect(lab.dsn) as connection, redis.Redis.from_url(lab.endpoint) as client:
        print(connection.execute("SELECT 1").fetchone()[0], client.set("key", 1), os.getuid())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="everybody else is not root anyway")
def test_a_lab_runs_as_somebody_else_than_root(lab_roster: Roster, tmp_path: Path) -> None:
    # One process that drops its privileges once it has its modules: its interpreter may be out of others' reach.
    home = PostgresHome(tmp_path, roster=lab_roster)
    account = home.account
    assert account is not None
    directory = home.make_directory()
    argv = [sys.executable, "-c", AS_SOMEBODY_ELSE, str(directory), str(account.uid), str(account.gid)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["1", "True", str(account.uid)]
        assert {path.owner() for path in (directory / "logs").iterdir()} == {account.name}
    finally:
        home.remove()
