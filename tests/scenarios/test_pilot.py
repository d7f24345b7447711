"""The pilot in the lab, as a user runs it: killed, stopped, doubled, blocked."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier

from patchpilot.errors import Exit
from patchpilot.lab.processes import Identity, until
from patchpilot.lab.roster import Roster
from tests.support.commands import Running, patchpilot


@dataclass(frozen=True)
class Lab:
    directory: Path
    facts: dict[str, Any]

    @property
    def config(self) -> str:
        return str(self.facts["config"])

    def calls(self, action: str) -> int:
        """How often the ElastiCache API was called with ``action``, by the simulator's own log."""
        lines = Path(self.facts["calls"]).read_text().splitlines()
        return sum(json.loads(line)["action"] == action for line in lines)

    def plant_secrets(self) -> None:
        """Passwords in both addresses; the lab's servers take any."""
        text = Path(self.config).read_text()
        text = text.replace("patchpilot@", "patchpilot:hunter2@", 1).replace(
            '/patchpilot"', '/patchpilot?sslpassword=hunter2"', 1
        )
        Path(self.config).write_text(text.replace("redis://", "redis://default:hunter2@", 1))

    def records(self) -> list[str]:
        """Every row of the record that a run or a person has written."""
        with psycopg.connect(self.facts["postgres"]) as connection:
            return [
                str(row)
                for table in ("run_entry", "run_request", "plan", "remedy", "lease")
                for row in connection.execute(
                    SQL("SELECT to_jsonb(t)::text FROM patchpilot.{} t").format(Identifier(table))
                )
            ]

    def reports(self) -> list[str]:
        """The text of every report."""
        return [path.read_text() for path in self.directory.glob("reports/*/report.*")]

    def run(self, *options: str) -> Running:
        return Running("run", "--cluster", "broker", "--config", self.config, *options, cwd=self.directory)


@contextmanager
def lab(roster: Roster, directory: Path, *options: str) -> Iterator[Lab]:
    supervisor: Identity | None = None
    done = patchpilot("lab", "up", "--dir", directory, *options)
    try:
        assert done.returncode == 0, done.stderr
        facts = json.loads((directory / "lab.json").read_text())
        # The lab outlives its command; it must not outlive this session, however that ends.
        supervisor = roster.add("supervisor", Roster(Path(facts["state"])).processes["supervisor"].pid)
        yield Lab(directory, facts)
    finally:
        down = patchpilot("lab", "down", "--dir", directory)
        assert down.returncode == 0, down.stderr
        if supervisor is not None:
            roster.drop(supervisor)


def test_killed_in_mid_watch_it_is_taken_up_and_the_update_is_applied_once(lab_roster: Roster, tmp_path: Path) -> None:
    with lab(lab_roster, tmp_path / "lab", "--seconds-per-node", "2") as it:
        first = it.run()
        first.await_word("watch/")
        rival = patchpilot("run", "--cluster", "broker", "--config", it.config, cwd=it.directory)
        assert rival.returncode == Exit.LOCK_HELD
        assert f"pid {first.process.pid}" in rival.stderr.replace("process", "pid")
        assert len(rival.stderr.strip().splitlines()) == 1
        until(lambda: it.calls("BatchApplyUpdateAction") == 1, seconds=30, what="the update was applied")
        first.process.send_signal(signal.SIGKILL)
        assert first.end()[0] == -signal.SIGKILL
        second = it.run("--output", "json")
        code, output = second.end()
        assert code == Exit.DONE, second.said
        assert any("resuming from watch/" in line for line in second.said), second.said
        assert it.calls("BatchApplyUpdateAction") == 1
        answer = json.loads(output)
        report = json.loads(Path(it.directory / answer["report"]["json"]).read_text())
        assert (report["run_id"], report["outcome"]) == (answer["run_id"], "done")
        assert Path(it.directory / answer["report"]["markdown"]).read_text().startswith("# ")
        # There is nothing left to patch; that is no failure, and has a code of its own.
        third = patchpilot("run", "--cluster", "broker", "--config", it.config, cwd=it.directory)
        assert third.returncode == Exit.NOTHING_TO_DO, third.stderr
        listed = json.loads(patchpilot("status", "--config", it.config, "--output", "json").stdout)
        assert sorted(run["state"] for run in listed["runs"]) == ["done", "nothing-to-do"]
        again = patchpilot("report", answer["run_id"], "--config", it.config, "--output", "json")
        assert json.loads(again.stdout)["run_id"] == answer["run_id"]


def test_stopped_in_the_grace_it_goes_on_from_there_without_starting_the_grace_again(
    lab_roster: Roster, tmp_path: Path
) -> None:
    with lab(lab_roster, tmp_path / "lab", "--seconds-per-node", "0.5") as it:
        spent = patchpilot("run", "--cluster", "broker", "--config", it.config, "--time-budget", "0s", cwd=it.directory)
        assert (spent.returncode, it.calls("BatchApplyUpdateAction")) == (Exit.RESUME_LATER, 0), spent.stderr
        it.plant_secrets()
        waived = ("--waive", "snapshot", "--reason", "see redis://:hunter2@h/0")
        first = it.run("--grace", "9s", *waived)
        first.await_word("recovery begins in")
        first.process.send_signal(signal.SIGTERM)
        code, _ = first.end()
        assert code == Exit.RESUME_LATER
        assert "the same command goes on" in " ".join(first.said)
        for ask in ("pause", "resume"):
            words = ("--reason", "sslpassword=hunter2", "--cluster", "broker", "--config", it.config)
            asked = patchpilot(ask, *words, "--output", "json")
            assert (asked.returncode, "hunter2" in asked.stdout + asked.stderr) == (Exit.DONE, False), asked.stderr
        second = it.run("--grace", "9s")
        code, output = second.end()
        assert code == Exit.DONE, second.said
        assert any("resuming from grace/" in line for line in second.said), second.said
        [run] = json.loads(patchpilot("status", "--config", it.config, "--output", "json").stdout)["runs"]
        journal = json.loads(patchpilot("status", run["run_id"], "--config", it.config, "--output", "json").stdout)
        grace = [entry["data"] for entry in journal["entries"] if entry["phase"] == "grace"]
        assert len({data["deadline"] for data in grace if "deadline" in data}) == 1, grace
        assert it.calls("BatchApplyUpdateAction") == 1
        told = [*first.said, *second.said, output, json.dumps(journal), *it.records(), *it.reports()]
        assert [text for text in told if "hunter2" in text] == []
        kept = "".join(it.records())
        assert "see redis://***@h/0" in kept
        assert "sslpassword=***" in kept


def test_without_a_replica_that_follows_pre_flight_blocks(lab_roster: Roster, tmp_path: Path) -> None:
    with lab(lab_roster, tmp_path / "lab", "--replicas", "1") as it:
        found = json.loads(patchpilot("lab", "status", "--dir", it.directory, "--output", "json").stdout)
        [replica] = [row["pid"] for row in found["processes"].values() if row.get("role") == "replica"]
        os.kill(replica, signal.SIGKILL)
        done = patchpilot("run", "--cluster", "broker", "--config", it.config, "--output", "json", cwd=it.directory)
        assert done.returncode == Exit.BLOCKED, done.stderr
        assert json.loads(done.stdout)["outcome"] == "blocked"
        assert it.calls("BatchApplyUpdateAction") == 0
        assert patchpilot("lab", "status", "--dir", it.directory).returncode == Exit.ERROR
