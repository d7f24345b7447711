"""Crash the real runbook before and after each of its journal entries, and take it up again each time."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Entry, Journal, Kind, MemoryJournal, RunRecord
from patchpilot.engine.runner import Runner
from patchpilot.errors import LeaseLost, NothingToDo, ResumeLater, Transient
from patchpilot.phases import runbook
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import RunJournal, open_run
from patchpilot.recovery.findings import Window
from tests.crash.killing import Kill, KillingJournal, Side
from tests.crash.world import RUNBOOK, World, desk, stuck

Substance = dict[str, Any]
At = int | tuple[Kind, str]

SETTLE = RUNBOOK.settle.total_seconds()


class Rehearsal:
    """One run in one world, in as many processes as it takes."""

    def __init__(self, directory: Path, *, stale: float = 0) -> None:
        self.clock = FakeClock()
        self.world = World(self.clock, stale=stale)
        self.world.stick(stuck("old-chord"))
        self.directory = directory
        self.runbook, self.window = RUNBOOK, Window()
        memory = MemoryJournal(self.clock)
        self.reopen: Callable[[], Journal] = lambda: memory

    @property
    def journal(self) -> Journal:
        """The run's journal, as a new process opens it."""
        return self.reopen()

    def run(self, at: At = 0, side: Side = Side.BEFORE, stop: threading.Event | None = None) -> KillingJournal:
        """One process, which dies at its ``at``-th entry."""
        journal = KillingJournal(self.journal, at, side)
        plan = runbook(desk(self.world, journal, self.directory, runbook=self.runbook, window=self.window))
        Runner(plan, journal, self.clock, stop=stop).run()
        return journal

    def crash(self, at: At = 0, side: Side = Side.BEFORE) -> str:
        """One process that has to die. Where it did."""
        with pytest.raises(Kill) as death:
            self.run(at, side)
        return str(death.value)

    def entries(self, step: str, kind: Kind) -> list[Entry]:
        return [entry for entry in self.journal.entries() if entry.step == step and entry.kind is kind]

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(next(self.directory.glob("*/report.json")).read_text())
        return report


def substance(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says, less the times, which a crash moves, and less how often the run was interrupted."""
    remedies = {
        key: sorted((row["kind"], row["id"], row.get("remedy")) for row in report["remedies"][key])
        for key in report["remedies"]
    }
    return {
        "outcome": report["outcome"],
        "about": [report[key] for key in ("cluster", "group", "role", "environment")],
        "update": [report["update"][key] for key in ("name", "status", "how", "initiated_by", "sla_met", "ends")],
        "nodes": [(row["node"], row["status"], row["initiated_by"]) for row in report["nodes"]],
        "failovers": [(row["old"], row["to"], row["told_by"]) for row in report["failovers"]],
        "grace": [report["grace"][key] for key in ("seconds", "because", "rearmed")],
        "findings": (report["findings"]["counts"], sorted(row["id"] for row in report["findings"]["items"])),
        "remedies": remedies,
        "claims": [(claim["name"], claim["holds"]) for claim in report["verification"]["claims"]],
        # What was stuck before the patch may have been recovered before the crash: then it is not stuck any more.
        "checks": [
            (check["name"], check["verdict"]) for check in report["preflight"]["checks"] if check["name"] != "chords"
        ],
        "phases": [(phase["name"], phase["state"]) for phase in report["phases"]],
    }


def deadline_after_last_failover(report: dict[str, Any], grace: timedelta = RUNBOOK.grace) -> bool:
    last = max(datetime.fromisoformat(row["at"]) for row in report["failovers"])
    return datetime.fromisoformat(report["grace"]["deadline"]) == last + grace


def check(rehearsal: Rehearsal, undisturbed: dict[str, Any], death: str) -> None:
    """The one thing that every crash test asserts."""
    record = RunRecord.of(rehearsal.journal.entries())
    assert record.finished, death
    assert record.finished.data == {"outcome": "done"}, death
    assert len(rehearsal.world.applied) == 1, death
    report = rehearsal.report()
    assert substance(report) == undisturbed, death
    assert deadline_after_last_failover(report, rehearsal.runbook.grace), death
    assert len(rehearsal.entries("grace", Kind.INTENDED)) == 1, death
    assert rehearsal.world.canaries == {}, death
    recovered = [remedy.id for _, remedy in rehearsal.world.remedies]
    assert len(recovered) == len(set(recovered)), death


def boundaries(directory: Path, stale: float = 0) -> int:
    """How many entries a run writes that nothing disturbs."""
    return Rehearsal(directory / f"calm-{stale}", stale=stale).run().written


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Substance:
    """What the report of a run says that nothing disturbs."""
    rehearsal = Rehearsal(tmp_path_factory.mktemp("calm"))
    rehearsal.run()
    return substance(rehearsal.report())


def test_the_undisturbed_run_is_the_one_we_think_it_is(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    rehearsal.run()
    said = substance(rehearsal.report())
    assert said["outcome"] == "done"
    assert said["update"][2:4] == ["applied", ["customer"]]
    assert said["failovers"] == [("shop-broker-001", "shop-broker-002", "events")]
    assert said["findings"] == ({"chord/callback-lost": 1, "chord/half-published": 1}, ["chord-1", "odd-1"])
    assert said["remedies"]["before"] == [("chord", "old-chord", "dispatch-callback")]
    assert said["remedies"]["after"] == [("chord", "chord-1", "dispatch-callback")]
    assert said["remedies"]["left"] == [("chord", "odd-1", "none")]
    assert all(holds for _, holds in said["claims"])
    assert len(said["claims"]) == 10
    assert {state for _, state in said["phases"]} == {"done"}
    report = rehearsal.report()
    assert [row["what"] for row in report["timeline"][:2]] == ["group", "node shop-broker-001"]
    assert (rehearsal.directory / report["run_id"] / "report.md").read_text().startswith("# Patch of broker (test)")


@pytest.mark.parametrize("stale", [0, SETTLE - 20], ids=["prompt answers", "answers that lag behind"])
def test_every_boundary(tmp_path: Path, calm: Substance, stale: float) -> None:
    count = boundaries(tmp_path, stale)
    died: list[str] = []
    for at, side in itertools.product(range(1, count + 1), Side):
        rehearsal = Rehearsal(tmp_path / f"{at}-{side}", stale=stale)
        death = rehearsal.crash(at, side)
        rehearsal.run()
        check(rehearsal, calm, death)
        died.append(death)
    assert len(died) == 2 * count
    plan = runbook(desk(rehearsal.world, rehearsal.journal, tmp_path))
    assert {f"{phase.name}/{step.name}" for phase, step in plan.steps()} < {death.split(" in ")[1] for death in died}


@pytest.mark.slow
@pytest.mark.matrix
def test_every_boundary_on_postgresql(tmp_path: Path, migrated: str, calm: Substance) -> None:
    count = brief(tmp_path / "calm").run().written
    with closing(Database(migrated)) as database:
        for at in range(1, count):
            rehearsal = brief(tmp_path / str(at))
            reopen_on(database, f"crash-{at}", rehearsal)
            death = rehearsal.crash(at, Side.AFTER)
            assert reopen_on(database, f"crash-{at}", rehearsal).token == 2
            rehearsal.run()
            check(rehearsal, {**calm, "grace": [60.0, *calm["grace"][1:]]}, death)


def test_killed_after_its_last_entry_the_same_command_says_that_it_is_done_and_the_next_finds_nothing_to_do(
    tmp_path: Path, migrated: str
) -> None:
    with closing(Database(migrated)) as database:
        rehearsal = brief(tmp_path)
        first = reopen_on(database, "over", rehearsal)
        rehearsal.crash((Kind.FINISHED, ""), Side.AFTER)
        database.execute("UPDATE patchpilot.run SET finished_at = now()")  # as if the clock were not a fake one
        again = reopen_on(database, "over", rehearsal)
        assert (again.run_id, again.token) == (first.run_id, 2)
        assert rehearsal.run().written == 0
        again.release()
        assert reopen_on(database, "over", rehearsal).run_id != first.run_id
        with pytest.raises(NothingToDo, match="elasticache-20260101-001 is complete"):
            rehearsal.run()
    assert len(rehearsal.world.applied) == 1


def brief(directory: Path) -> Rehearsal:
    """A shorter rotation, because on PostgreSQL each renewal of the lease is a commit."""
    rehearsal = Rehearsal(directory)
    rehearsal.world.per_node = timedelta(seconds=30)
    rehearsal.runbook = RUNBOOK.model_copy(update={"grace": timedelta(minutes=1)})
    rehearsal.window = Window(min_age=timedelta(seconds=20))
    return rehearsal


def reopen_on(database: Database, cluster: str, rehearsal: Rehearsal) -> RunJournal:
    """Take the lease, as a new process does, and let the rehearsal go on with it."""
    journal = open_run(database, "test", cluster, ttl=timedelta(0), clock=rehearsal.clock)
    rehearsal.reopen = lambda: journal
    return journal


@pytest.mark.slow
@pytest.mark.matrix
def test_pairs_of_crashes(tmp_path: Path, calm: Substance) -> None:
    """A crash anywhere, then one at each of the first entries of the process that takes the run up, then a third."""
    stale = SETTLE - 20
    for first, second in itertools.product(range(1, boundaries(tmp_path, stale) + 1), range(1, 4)):
        rehearsal = Rehearsal(tmp_path / f"{first}-{second}", stale=stale)
        death = rehearsal.crash(first, Side.AFTER)
        for side in Side:
            try:
                rehearsal.run(second, side)
            except Kill as again:
                death += f", then {again}"
        rehearsal.run()
        check(rehearsal, calm, death)


CALLS = (
    "update_actions", "service_updates", "group", "events", "apply", "applied", "endpoint", "survey", "recover",
    "alarms", "look", "release", "released",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_death_in_the_middle_of_any_call(tmp_path: Path, calm: Substance, seed: int) -> None:
    """Not at the journal but out in the world: before an answer, or after the effect with the answer lost."""
    dice = random.Random(seed)
    rehearsal = Rehearsal(tmp_path, stale=dice.choice([0, 5, SETTLE - 20]))
    rehearsal.world.dice = random.Random(seed)
    for call in CALLS:
        once = {"apply", "applied", "recover", "service_updates", "release", "released"}
        looks = 0 if call in once else dice.randrange(60)
        rehearsal.world.surprises[call] = [*([_nothing] * looks), Kill(call)]
    deaths = []
    for _ in range(3 * len(CALLS)):
        try:
            rehearsal.run()
            break
        except Kill as death:
            deaths.append(str(death))
    assert {"apply", "applied", "recover", "service_updates", "release", "released"} <= set(deaths)
    check(rehearsal, calm, ", ".join(deaths))


def _nothing() -> None:
    pass


@pytest.mark.parametrize("stale", [0, SETTLE - 20])
@pytest.mark.parametrize("accident", [lambda: Transient("answer lost"), lambda: Kill("killed")], ids=["lost", "killed"])
def test_the_request_was_made_and_its_answer_lost(
    tmp_path: Path, calm: Substance, stale: float, accident: Callable[[], BaseException]
) -> None:
    rehearsal = Rehearsal(tmp_path, stale=stale)
    rehearsal.world.surprises["applied"] = [accident()]
    try:
        rehearsal.run()
    except Kill:
        rehearsal.run()
    check(rehearsal, calm, "answer lost")
    assert len(rehearsal.entries("trigger", Kind.ACTING)) == 1


def test_the_request_was_never_made_and_is_made_once_the_settling_time_is_over(tmp_path: Path, calm: Substance) -> None:
    rehearsal = Rehearsal(tmp_path)
    rehearsal.world.surprises["apply"] = [Kill("before the call")]
    rehearsal.crash()
    rehearsal.run()
    check(rehearsal, calm, "before the call")
    attempts = rehearsal.entries("trigger", Kind.ACTING)
    assert rehearsal.world.applied == [attempts[1].at]
    assert RUNBOOK.settle <= attempts[1].at - attempts[0].at <= RUNBOOK.settle + timedelta(seconds=15)


def test_the_request_was_never_made_and_is_made_however_late_the_run_is_taken_up(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    rehearsal.world.surprises["apply"] = [Kill("before the call")]
    rehearsal.crash()
    rehearsal.clock.sleep(2 * RUNBOOK.stall.total_seconds())
    resumed = rehearsal.clock.now()
    rehearsal.run()
    assert rehearsal.world.applied == [resumed]


@pytest.fixture
def in_grace(tmp_path: Path) -> Rehearsal:
    """A run that was killed when its grace had just begun, with about ten minutes of it left."""
    rehearsal = Rehearsal(tmp_path)
    assert rehearsal.crash((Kind.INTENDED, "grace"), Side.AFTER) == "after intended in grace/grace"
    assert timedelta(minutes=8) < deadline(rehearsal) - rehearsal.clock.now() < timedelta(minutes=11)
    return rehearsal


def deadline(rehearsal: Rehearsal) -> datetime:
    """As it is on record when the grace begins."""
    return datetime.fromisoformat(rehearsal.entries("grace", Kind.INTENDED)[0].data["deadline"])


def ended(rehearsal: Rehearsal) -> datetime:
    return rehearsal.entries("grace", Kind.REACHED)[0].at


def test_a_kill_during_the_grace_does_not_start_it_again(in_grace: Rehearsal) -> None:
    in_grace.clock.sleep(180)
    in_grace.run()
    assert ended(in_grace) == deadline(in_grace)
    assert in_grace.report()["grace"]["rearmed"] == 0


def test_without_a_failover_the_grace_counts_from_the_end_of_the_rotation_however_late_it_is_taken_up(
    tmp_path: Path,
) -> None:
    rehearsal = Rehearsal(tmp_path)
    rehearsal.world.fails_over = False
    rehearsal.crash((Kind.REACHED, "watch"), Side.AFTER)
    complete = rehearsal.clock.now()
    rehearsal.clock.sleep(600)
    rehearsal.run()
    assert deadline(rehearsal) == ended(rehearsal) == complete + RUNBOOK.grace
    assert rehearsal.report()["failovers"] == []


def test_a_grace_that_ended_while_nobody_was_there_is_over_at_once(in_grace: Rehearsal) -> None:
    in_grace.clock.sleep(3600)
    resumed = in_grace.clock.now()
    in_grace.run()
    assert ended(in_grace) == resumed


@pytest.mark.parametrize("told", [True, False], ids=["by an event", "by the roles alone"])
@pytest.mark.parametrize("watched", [True, False], ids=["while watching", "while nobody was there"])
def test_a_further_failover_starts_the_grace_again(in_grace: Rehearsal, told: bool, watched: bool) -> None:
    in_grace.world.tells_of_failovers = told
    in_grace.world.after(timedelta(minutes=3), lambda: in_grace.world.fail_over("shop-broker-003"))
    at = in_grace.clock.now() + timedelta(minutes=3)
    if not watched:
        in_grace.clock.sleep(240)
        # Without an event the failover counts from when it was first seen.
        at = at if told else in_grace.clock.now()
    in_grace.run()
    late = timedelta() if told else timedelta(seconds=15)
    assert at + RUNBOOK.grace <= ended(in_grace) <= at + RUNBOOK.grace + late
    report = in_grace.report()
    assert report["grace"]["rearmed"] == 1
    assert report["grace"]["because"] == "failover to shop-broker-003"
    assert [row["told_by"] for row in report["failovers"]] == ["events", "events" if told else "roles"]
    assert deadline_after_last_failover(report)


def test_a_kill_after_the_grace_began_again_changes_nothing(in_grace: Rehearsal) -> None:
    in_grace.world.after(timedelta(minutes=3), lambda: in_grace.world.fail_over("shop-broker-003"))
    at = in_grace.clock.now() + timedelta(minutes=3)
    assert in_grace.crash((Kind.OBSERVED, "grace"), Side.AFTER) == "after observed in grace/grace"
    in_grace.clock.sleep(60)
    in_grace.run()
    assert ended(in_grace) == at + RUNBOOK.grace


def test_asked_to_stop_it_stops_within_a_poll_and_goes_on_later(tmp_path: Path, calm: Substance) -> None:
    rehearsal, stop = Rehearsal(tmp_path), threading.Event()
    asked = rehearsal.clock.now() + timedelta(minutes=5)
    rehearsal.clock.after(300, stop.set)
    with pytest.raises(ResumeLater, match="watch/watch: asked to stop"):
        rehearsal.run(stop=stop)
    assert rehearsal.clock.now() - asked <= RUNBOOK.poll_interval
    rehearsal.run()
    check(rehearsal, calm, "stopped")
    (interruption,) = rehearsal.report()["interruptions"]
    assert (interruption["how"], interruption["resumed_in"]) == ("stopped", "watch/watch")


def test_whoever_lost_the_lease_does_nothing_more(tmp_path: Path, calm: Substance) -> None:
    for at in range(1, boundaries(tmp_path) + 1):
        rehearsal = Rehearsal(tmp_path / str(at))
        journal = KillingJournal(rehearsal.journal, at, Side.BEFORE, LeaseLost)
        with pytest.raises(LeaseLost):
            Runner(runbook(desk(rehearsal.world, journal, rehearsal.directory)), journal, rehearsal.clock).run()
        assert journal.written == at - 1
        # An effect without an entry before it that announces it would show here.
        assert len(rehearsal.world.applied) == len(rehearsal.entries("trigger", Kind.ACTING))
        acting = len(rehearsal.entries("recover-beforehand", Kind.ACTING)) + len(
            rehearsal.entries("recover", Kind.ACTING)
        )
        assert len(rehearsal.world.remedies) == acting
        rehearsal.run()
        check(rehearsal, calm, f"lost the lease at {at}")


def test_a_report_names_every_interruption(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    rehearsal.crash((Kind.ACTED, "trigger"), Side.BEFORE)
    rehearsal.crash((Kind.REACHED, "watch"), Side.BEFORE)
    rehearsal.run()
    told = [(row["how"], row["after"], row["resumed_in"]) for row in rehearsal.report()["interruptions"]]
    assert told == [
        ("killed", "acting trigger/trigger", "trigger/trigger"),
        ("killed", "observed watch/watch", "watch/watch"),
    ]
