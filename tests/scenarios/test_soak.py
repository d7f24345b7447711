"""The pilot in the lab, killed at random moments again and again, for real: `make soak-kill`."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from patchpilot.errors import Exit
from patchpilot.lab.roster import Roster
from tests.scenarios.test_pilot import Lab, lab
from tests.support.commands import patchpilot

KILLS = 24
"""In all. As many labs are started as it takes."""

MOST_LABS = 12

SCENARIOS = (None, "stale-answers", "second-failover", "lost-answer", "vanishing", "failover-in-grace")
"""In turn. In each of them the update has to be asked for once."""

LONGEST = 3.0
"""Seconds that a process lives at most once it has the run."""


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_each_run_ends_well_and_the_update_is_applied_once(
    lab_roster: Roster, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    dice, kills = random.Random(seed), 0
    for number, scenario in zip(range(MOST_LABS), itertools.cycle(SCENARIOS), strict=False):
        options = ["--scenario", scenario] if scenario else []
        with lab(lab_roster, tmp_path / f"lab-{number}", "--seconds-per-node", "4", *options) as it:
            kills += soak(it, dice)
            assert_ended_well(it, f"seed {seed}, lab {number}, scenario {scenario}")
        if kills >= KILLS:
            break
    assert kills >= KILLS


def soak(it: Lab, dice: random.Random) -> int:
    """Kill the pilot until it is too quick for that. How often it was."""
    for kills in itertools.count():
        pilot = it.run()
        if dice.random() < 0.8:  # else at any moment, before it has done anything as well
            pilot.await_word("run ")
        try:
            pilot.process.wait(dice.uniform(0, LONGEST))
        except subprocess.TimeoutExpired:
            pilot.process.send_signal(signal.SIGKILL)
        code, _ = pilot.end()
        if code != -signal.SIGKILL:
            # Nothing is left to be patched if it was killed between its last entry and its last word.
            assert code in {Exit.DONE, Exit.NOTHING_TO_DO}, pilot.said
            return kills
    raise AssertionError("unreachable")


def assert_ended_well(it: Lab, which: str) -> None:
    listed = json.loads(patchpilot("status", "--config", it.config, "--output", "json").stdout)
    [run] = [run["run_id"] for run in listed["runs"] if run["state"] == "done"]
    report = json.loads(patchpilot("report", run, "--config", it.config, "--output", "json").stdout)
    assert report["outcome"] == "done", which
    assert report["verification"]["claims"], which
    assert all(claim["holds"] for claim in report["verification"]["claims"]), which
    assert {row["status"] for row in report["nodes"]} == {"complete"}, which
    assert it.calls("BatchApplyUpdateAction") == 1, which
