"""One scenario, one run, in as many processes as it takes; and what counts as the same end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Journal, Kind, MemoryJournal, RunRecord
from patchpilot.engine.runner import Runner
from patchpilot.errors import Exit, PatchpilotError
from patchpilot.lab.scenario import Scenario
from patchpilot.phases import runbook
from patchpilot.postgres.journal import Run
from patchpilot.recovery.findings import Window
from patchpilot.report import build
from tests.crash.killing import KillingJournal, Side
from tests.crash.simulated import SimulatedWorld, lab_settings
from tests.crash.world import desk

MOST_COMMANDS = 6
"""How often the command is given until it says the same twice. Nothing here takes more than three."""

AWHILE = 180.0
"""Seconds after which whatever the scenario has begun is over, in a lab where a node takes three."""


class Rehearsal:
    """One run in the world of one scenario."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self.clock = FakeClock()
        self.world = SimulatedWorld(self.clock, scenario)
        self.settings = lab_settings(scenario)
        self.directory = directory
        self.journal: Journal = MemoryJournal(self.clock)

    def run(self, at: int = 0, side: Side = Side.BEFORE) -> str:
        """Give the command once; it dies at its ``at``-th entry. How it ended, in the words of the exit codes."""
        journal = KillingJournal(self.journal, at, side)
        window = Window(self.settings.recovery.min_age, self.settings.recovery.max_age)
        plan = runbook(desk(self.world, journal, self.directory, runbook=self.settings.runbook, window=window))
        try:
            Runner(plan, journal, self.clock).run()
        except PatchpilotError as error:
            return error.exit_code.name.lower().replace("_", "-")
        return Exit.DONE.name.lower()

    def settle(self, at: int = 0, side: Side = Side.BEFORE) -> list[str]:
        """Give the command until it is done, or ends in the same way twice. How it ended each time.

        :param at: die at this entry of the journal, whichever command writes it.
        :raises Kill: then.
        """
        ends: list[str] = []
        while not self.finished and (len(ends) < 2 or ends[-1] != ends[-2]):
            assert len(ends) < MOST_COMMANDS, ends
            ends.append(self.run(max(at - len(self.journal.entries()), 0), side))
        return ends

    @property
    def finished(self) -> bool:
        return RunRecord.of(self.journal.entries()).finished is not None

    @property
    def looked(self) -> bool:
        """Whether pre-flight had found it safe to go on, whoever looked."""
        return any(it.kind is Kind.REACHED and it.step == "readiness" for it in self.journal.entries())

    def end(self) -> End:
        """How things stand, once AWS has finished what it does as well."""
        self.clock.sleep(AWHILE)
        record = RunRecord.of(self.journal.entries())
        view = self.world.account.view()
        return End(
            outcome=dict(record.finished.data) if record.finished else None,
            primary=self.world.paper.primary,
            actions={key: (each.status, [row.status for row in each.nodes]) for key, each in view.actions.items()},
            recovered=sorted(remedy.id for _, remedy in self.world.remedies),
            stuck=sorted(self.world.stuck),
            report=substance(
                build(self.journal.entries(), Run(self.journal.run_id, "test", "broker", self.clock.now()))
            ),
        )


def substance(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says, less the times, which a crash moves, and less how often the run was interrupted."""
    # Not how it came to run: whoever was killed before the answer was on record cannot know whose request it was.
    update, grace, proof = (report[key] or {} for key in ("update", "grace", "verification"))
    remedies = report["remedies"].items()
    return {
        "outcome": report["outcome"],
        "update": [update.get(key) for key in ("name", "status", "initiated_by", "sla_met")],
        "nodes": [(row["node"], row.get("status")) for row in report["nodes"]],
        "failovers": [(row["old"], row["to"]) for row in report["failovers"]],
        "grace": [grace.get(key) for key in ("seconds", "because", "rearmed")],
        "remedies": {key: sorted((row["id"], row.get("remedy")) for row in rows) for key, rows in remedies},
        "claims": [(claim["name"], claim["holds"]) for claim in proof.get("claims", ())],
        "phases": [(phase["name"], phase["state"]) for phase in report["phases"]],
    }


@dataclass(frozen=True)
class End:
    """What must not depend on where a run was killed."""

    outcome: dict[str, Any] | None
    """What its last entry says; None if it has none."""
    primary: str
    actions: dict[Any, Any]
    recovered: list[str]
    stuck: list[str]
    report: dict[str, Any]
