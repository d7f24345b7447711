"""Phase 6: recover what is stuck, until a survey finds nothing more that can be recovered."""

from __future__ import annotations

from patchpilot.engine.plan import Data, Effect, Observation, Phase, Step, View
from patchpilot.phases.cures import cure, recover
from patchpilot.phases.desk import Desk


class Recover(Phase):
    """Recover what is stuck."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("recover", "recover what is stuck", (RecoverAll(desk),))


class RecoverAll(Step):
    """Nothing curable is stuck.

    Established anew when a run is taken up again: after a failed verification that is what makes trying again worth it.
    """

    name = "recover"
    title = "recover what is stuck"
    effect = Effect.PUBLISH
    volatile = True

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        # Remedies are append-only and in order, so those of the first phase are the first ones.
        return cure(self._desk, view, already=len(view.facts["recover-beforehand"].get("applied", ())), patient=True)

    def act(self, view: View) -> Data:
        return recover(self._desk, view)
