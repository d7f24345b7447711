"""Phase 5: write down what is stuck, before anything is done about it."""

from __future__ import annotations

from patchpilot.engine.plan import Observation, Phase, Reached, Step, View
from patchpilot.phases.cures import counts, skipped, too_young
from patchpilot.phases.desk import Desk


class DryRun(Phase):
    """Find what is stuck."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("dry-run", "find what is stuck", (Survey(desk),))


class Survey(Step):
    """What is stuck is on record."""

    name = "dry-run"
    title = "find what is stuck, and change nothing"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        if self._desk.recovery is None:
            return Reached(skipped(self._desk))
        stuck = self._desk.recovery.survey(self._desk.window)
        return Reached({
            "findings": [finding.as_dict() for finding in stuck],
            "counts": counts(stuck),
            "young": [finding.as_dict() for finding in too_young(self._desk)],
        })  # fmt: skip
