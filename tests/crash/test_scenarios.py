"""The crash matrix: every scenario, with the pilot killed before and after each entry of its journal."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from patchpilot.engine.journal import Kind
from patchpilot.lab import scenario as scenarios
from tests.crash.killing import Kill, Side
from tests.crash.matrix import End, Rehearsal

Cell = tuple[int, Side]

SAMPLE = 3
"""How many cells of each scenario are part of `make test`. They are other ones in each run of it."""

AWAY = 45.0
"""Seconds for which nobody is there after a kill: longer than the whole rotation."""

every_scenario = pytest.mark.parametrize("name", scenarios.known())


def undisturbed(name: str, directory: Path) -> tuple[End, list[str], int]:
    """How the scenario ends if nobody is killed; how each command ended; how many entries were written."""
    rehearsal = Rehearsal(scenarios.read(scenarios.find(name)), directory / f"calm-{name}")
    ends = rehearsal.settle()
    written = len(rehearsal.journal.entries())
    assert triggers(rehearsal) <= 1
    return rehearsal.end(), ends, written


def triggers(rehearsal: Rehearsal) -> int:
    """How many requests to apply the update reached AWS, whatever it made of them and whoever heard of it."""
    return len(rehearsal.world.aws.requests)


def cells(written: int) -> Iterator[Cell]:
    return itertools.product(range(1, written + 1), Side)


def crash(name: str, directory: Path, cell: Cell, away: float = 0) -> tuple[Rehearsal, str]:
    """Kill a run there, and take it up again ``away`` seconds later; where it died."""
    rehearsal = Rehearsal(scenarios.read(scenarios.find(name)), directory / f"{cell[0]}-{cell[1]}-{away:g}")
    with pytest.raises(Kill) as death:
        rehearsal.settle(*cell)
    rehearsal.clock.sleep(away)
    rehearsal.settle()
    assert triggers(rehearsal) <= 1, death.value
    return rehearsal, f"{name}: killed {death.value} (entry {cell[0]}), away for {away:g} s"


@every_scenario
def test_an_undisturbed_run_ends_as_the_scenario_says(tmp_path: Path, name: str) -> None:
    _, ends, _ = undisturbed(name, tmp_path)
    assert ends[0] == scenarios.read(scenarios.find(name)).ends


@every_scenario
def test_some_crashes_of_each_scenario(tmp_path: Path, name: str) -> None:
    calm, _, written = undisturbed(name, tmp_path)
    for cell in random.sample(list(cells(written)), SAMPLE):
        rehearsal, death = crash(name, tmp_path, cell)
        assert rehearsal.end() == calm, death


def test_a_kill_after_a_refusal_leads_to_no_second_request(tmp_path: Path) -> None:
    """AWS has started it all the same, and does not show that yet when the run is taken up again."""
    name = "unprocessed-but-started-late"
    rehearsal = Rehearsal(scenarios.read(scenarios.find(name)), tmp_path / "calm")
    rehearsal.settle()
    [refused] = [it.seq for it in rehearsal.journal.entries() if it.kind is Kind.ACTED and it.step == "trigger"]
    crash(name, tmp_path, (refused, Side.AFTER))


@pytest.mark.slow
@pytest.mark.matrix
@every_scenario
def test_every_crash_ends_as_if_there_had_been_none(tmp_path: Path, name: str) -> None:
    calm, _, written = undisturbed(name, tmp_path)
    for cell in cells(written):
        rehearsal, death = crash(name, tmp_path, cell)
        assert rehearsal.end() == calm, death


@pytest.mark.slow
@pytest.mark.matrix
@every_scenario
def test_every_crash_that_nobody_notices_for_a_while_leaves_nothing_undone(tmp_path: Path, name: str) -> None:
    """The report may tell another story then: what nobody saw cannot be told. The world has to be the same.

    Unless nobody had looked at it before: who comes when AWS has updated by itself finds nothing to do.
    """
    calm, _, written = undisturbed(name, tmp_path)
    for cell in cells(written):
        rehearsal, death = crash(name, tmp_path, cell, AWAY)
        end = rehearsal.end()
        if (end.outcome or {}).get("outcome") == "nothing-to-do" and not rehearsal.looked:
            assert triggers(rehearsal) == 0, death
            continue
        assert replace(end, report=calm.report) == calm, death
