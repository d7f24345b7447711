"""Whatever becomes of the owner of some servers, nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchpilot.errors import Corrupt
from patchpilot.lab.processes import Identity, end, until
from patchpilot.lab.roster import Roster, replace
from patchpilot.lab.watchdog import Watchdog

PATIENCE = 15.0

OWNER = """
import sys, threading
from pathlib import Path
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.lab.watchdog import Watchdog

directory = Path(sys.argv[1])
roster = Roster(directory / "roster.json")
with Watchdog(roster):
    postgres = Postgres(directory, roster=roster)
    if sys.argv[2:] == ["postgres"]:
        postgres.start()
    node = ValkeyNode("node", directory, roster=roster)
    node.start()
    print("up", flush=True)
    sys.stdin.readline()
    node.stop()
    postgres.discard()
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def deaf() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not hear SIGTERM."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def owner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that owns a Valkey and, if the test's parameter says so, a PostgreSQL."""
    argv = [sys.executable, "-c", OWNER, str(tmp_path), *getattr(request, "param", [])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


@pytest.mark.parametrize("owner", [["postgres"]], indirect=True)
def test_servers_and_files_are_gone_after_the_owner_was_killed(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    processes = Roster(path).processes
    directories = [Path(directory) for directory in json.loads(path.read_text(encoding="utf-8"))["directories"]]
    assert set(processes) == {"watchdog", "postgres", "node"}
    assert all(identity.alive for identity in processes.values())
    assert directories
    assert all(directory.exists() for directory in directories)

    owner.kill()

    until(lambda: not processes["watchdog"].alive, seconds=PATIENCE, what="the watchdog had done its work")
    assert not any(identity.alive for identity in processes.values())
    assert not any(directory.exists() for directory in directories)


def test_without_its_watchdog_an_owner_still_cleans_up(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    processes = Roster(path).processes
    processes["watchdog"].send(signal.SIGKILL)

    owner.communicate("enough\n", timeout=PATIENCE)

    assert owner.returncode == 0
    assert not any(identity.alive for identity in processes.values())
    assert Roster(path).processes == {}


def test_a_dismissed_watchdog_touches_nothing(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    roster = Roster(tmp_path / "roster.json")
    with Watchdog(roster):
        roster.add("sleeper", sleeper.pid)
        watchdog = roster.processes["watchdog"]
    assert not watchdog.alive
    assert sleeper.poll() is None
    assert set(roster.processes) == {"sleeper"}


def test_a_roster_cleans_what_an_earlier_process_wrote_down(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "roster.json"
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    (directory / "file").touch()
    first = Roster(path)
    first.add("sleeper", sleeper.pid)
    first.add_directory(directory)

    Roster(path).clean()

    assert sleeper.wait(PATIENCE) == -signal.SIGTERM
    assert not directory.exists()
    assert not path.exists()


def test_a_recycled_process_id_is_left_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "roster.json"
    row = {"name": "long gone", "pid": sleeper.pid, "started": "at another time", "signal": int(signal.SIGKILL)}
    replace(path, json.dumps({"processes": [row], "directories": []}))
    Roster(path).clean()
    assert sleeper.poll() is None


def test_a_roster_does_not_end_the_process_that_cleans(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "roster.json")
    roster.add("me", os.getpid(), signal.SIGKILL)
    roster.clean()
    assert not roster.path.exists()


def test_who_does_not_hear_is_killed_in_the_end(deaf: subprocess.Popen[bytes]) -> None:
    end([(Identity.of(deaf.pid), signal.SIGTERM)], patience=0.3)
    assert deaf.wait(PATIENCE) == -signal.SIGKILL


def test_a_zombie_counts_as_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        until(lambda: not Identity.of(process.pid).alive, seconds=PATIENCE, what="it was a zombie")
        os.kill(process.pid, 0)


def test_a_file_that_is_no_roster_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_text('{"processes": 7}', encoding="utf-8")
    with pytest.raises(Corrupt, match="not a lab's list"):
        Roster(path)


def test_only_the_owner_may_read_what_is_written(tmp_path: Path) -> None:
    replace(tmp_path / "secret", "text")
    replace(tmp_path / "secret", "other text")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
