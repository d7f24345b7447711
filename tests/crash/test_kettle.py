"""Crash the toy plan before and after each of its journal entries, in memory and on PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import pytest

from patchpilot.clock import Clock, FakeClock
from patchpilot.engine.journal import Journal, Kind, MemoryJournal, RunRecord
from patchpilot.engine.runner import Runner
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import open_run
from tests.crash.kettle import SETTLE, Kitchen, tea
from tests.crash.killing import Kill, KillingJournal, Side

Open = Callable[[Clock], Journal]


def in_memory() -> Open:
    kept: list[MemoryJournal] = []

    def reopen(clock: Clock) -> Journal:
        if not kept:
            kept.append(MemoryJournal(clock))
        return kept[0]

    return reopen


@pytest.fixture
def database(migrated: str) -> Iterator[Database]:
    opened = Database(migrated)
    yield opened
    opened.close()


def on_postgres(database: Database) -> Callable[[], Open]:
    """A run of its own for each journal asked for; every opening is a take-over."""
    numbers = itertools.count()

    def fresh() -> Open:
        cluster = f"kettle-{next(numbers)}"
        return lambda clock: open_run(database, "test", cluster, ttl=timedelta(0), clock=clock)

    return fresh


def boundaries() -> int:
    clock = FakeClock()
    journal = KillingJournal(MemoryJournal(clock))
    Runner(tea(Kitchen(clock)), journal, clock).run()
    return journal.written


def crash_each(fresh: Callable[[], Open]) -> int:
    """Kill the run once at every boundary, take it up again, and check what came of it. How many were covered."""
    covered = 0
    for at, side in itertools.product(range(1, boundaries() + 1), Side):
        clock, reopen = FakeClock(), fresh()
        kitchen = Kitchen(clock)
        with pytest.raises(Kill) as death:
            Runner(tea(kitchen), KillingJournal(reopen(clock), at, side), clock).run()
        journal = reopen(clock)
        Runner(tea(kitchen), journal, clock).run()
        check(kitchen, journal, str(death.value))
        covered += 1
    return covered


def check(kitchen: Kitchen, journal: Journal, death: str) -> None:
    record = RunRecord.of(journal.entries())
    assert record.finished, death
    assert (kitchen.clicks, kitchen.poured) == (1, {"hers", "his"}), death
    steep = [entry for entry in journal.entries() if entry.step == "steep" and entry.kind is Kind.INTENDED]
    assert len(steep) == 1, death
    assert record.facts()["steep"] == steep[0].data, death
    elapsed = record.finished.at - journal.entries()[0].at
    assert elapsed <= timedelta(minutes=6) + 2 * SETTLE, death


def test_every_boundary_in_memory() -> None:
    assert crash_each(in_memory) == 2 * boundaries() == 40


def test_every_boundary_on_postgresql(database: Database) -> None:
    assert crash_each(on_postgres(database)) == 2 * boundaries()


def test_every_pair_of_crashes_in_memory() -> None:
    for first, second in itertools.product(range(1, boundaries() + 1), repeat=2):
        clock, reopen = FakeClock(), in_memory()
        kitchen = Kitchen(clock)
        for at, side in ((first, Side.AFTER), (second, Side.BEFORE)):
            try:
                Runner(tea(kitchen), KillingJournal(reopen(clock), at, side), clock).run()
            except Kill:
                continue
        Runner(tea(kitchen), reopen(clock), clock).run()
        check(kitchen, reopen(clock), f"after {first}, then before {second}")


def test_a_kill_during_the_steeping_does_not_start_it_again() -> None:
    clock, reopen = FakeClock(), in_memory()
    kitchen = Kitchen(clock)
    with pytest.raises(Kill):
        Runner(tea(kitchen), KillingJournal(reopen(clock), steep_intent(), Side.AFTER), clock).run()
    until = datetime.fromisoformat(RunRecord.of(reopen(clock).entries()).steps["steep"].intent.data["until"])  # type: ignore[union-attr]
    clock.sleep(100)
    Runner(tea(kitchen), reopen(clock), clock).run()
    poured = next(entry for entry in reopen(clock).entries() if entry.step == "pour")
    assert poured.at == until


def steep_intent() -> int:
    clock = FakeClock()
    journal = MemoryJournal(clock)
    Runner(tea(Kitchen(clock)), journal, clock).run()
    return next(entry.seq for entry in journal.entries() if entry.step == "steep")
