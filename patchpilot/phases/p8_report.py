"""Phase 8: write the report.

It is a pure function of the journal before this phase, so it can be made again at any time and comes out the same.
"""

from __future__ import annotations

from patchpilot.engine.plan import Data, Effect, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.phases.desk import Desk


class Report(Phase):
    """Write the report."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("report", "write the report", (WriteReport(desk),))


class WriteReport(Step):
    """The report's files say what the journal says."""

    name = "report"
    title = "write report.json, report.md and report.html"
    effect = Effect.PUBLISH

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        files = self._desk.reports.current()
        return Reached(files) if files else NotYet("not written yet", act=True)

    def act(self, view: View) -> Data:
        return self._desk.reports.write()
