"""Phase 2: start the update, once.

``BatchApplyUpdateAction`` has no idempotency token and AWS does not say what applying twice does. So: look first, apply
only from ``not-applied``, ``stopped`` or ``scheduled``, and after an interrupted call give AWS a settling time to show
what it did before concluding that it did nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from patchpilot.elasticache.facts import APPLICABLE, IN_FLIGHT, UpdateAction, UpdateStatus
from patchpilot.engine.plan import Attempt, Contradicted, Data, Effect, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.errors import NeedsOperator, NothingToDo, Unsafe
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import clock_time, noted
from patchpilot.settings import Runbook

ACKNOWLEDGED = 10
"""How many settling times AWS has to show an update that it has accepted: nothing is risked by waiting for that."""


class Trigger(Phase):
    """Start the update."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("trigger", "start the update", (Apply(desk),))


class Apply(Step):
    """The update runs, whoever started it."""

    name = "trigger"
    title = "start the update, unless it runs already"
    effect = Effect.OBSERVABLE

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def intend(self, view: View) -> Data:
        """The baseline: what was so before anything was done."""
        group = self._desk.cloud.group(self._desk.group)
        action = find(self._desk, _update(view))
        return {
            "update": _update(view),
            "status": action.status if action else None,
            "nodes": noted(action.nodes) if action else [],
            "primary": group.primary,
            "members": [member.node for member in group.members],
        }

    def observe(self, view: View) -> Observation:
        return look(view, find(self._desk, view.intent["update"]), self._desk.runbook)

    def act(self, view: View) -> Data:
        update = view.intent["update"]
        answer = self._desk.cloud.apply(update, self._desk.group)
        if answer.unprocessed is not None:
            return {"refused": f"{answer.unprocessed.error_type}: {answer.unprocessed.error_message}"}
        return {"status": answer.status}


def find(desk: Desk, update: str) -> UpdateAction | None:
    """The update action, or None while AWS does not list it: unknown then, neither done nor undone."""
    return next((action for action in desk.cloud.update_actions(desk.group) if action.update == update), None)


def look(view: View, action: UpdateAction | None, runbook: Runbook) -> Observation:
    """What to make of the update action. Pure."""
    if action is None:
        return _wait(view, runbook.stall, "AWS does not list the update for this group at the moment")
    if action.status in IN_FLIGHT or action.status == UpdateStatus.COMPLETE:
        return Reached(_started(view, action))
    if action.status == UpdateStatus.SCHEDULING:
        return _wait(view, runbook.stall, "AWS is scheduling the update by itself")
    if action.status == UpdateStatus.NOT_APPLICABLE:
        return Contradicted(_superseded(view, action))
    if action.status not in APPLICABLE:
        return Contradicted(Unsafe(f"AWS reports the update as {action.status!r}, which this version does not know"))
    return _not_started(view, action, runbook)


def _not_started(view: View, action: UpdateAction, runbook: Runbook) -> Observation:
    last = view.attempts[-1] if view.attempts else None
    if last is None or (last.refused and last.at < view.since):
        return NotYet(f"{action.update} is {action.status}", act=True)
    if last.refused:
        return _after_refusal(view, last, runbook.settle)
    if last.interrupted:
        if view.now < last.at + runbook.settle:
            return NotYet(f"{_tried(last)}; does AWS show it?", until=last.at + runbook.settle)
        return _wait(view, runbook.stall, f"{_tried(last)} and AWS shows nothing of it", act=True)
    if view.now < last.at + ACKNOWLEDGED * runbook.settle:
        return NotYet(f"AWS accepted the update and still shows it as {action.status}")
    return Contradicted(Unsafe(
        f"AWS accepted {action.update} at {clock_time(last.at)} and still shows it as {action.status}: look at the "
        "group in the console; once the update runs, or has been applied by hand, run the same command again"
    ))  # fmt: skip


def _after_refusal(view: View, last: Attempt, settle: timedelta) -> Observation:
    """Somebody else may have been quicker: then AWS shows it soon."""
    refusal = (last.outcome or {}).get("refused", "")
    if view.now < last.at + settle:
        return NotYet(f"AWS refused ({refusal}); does it run all the same?", until=last.at + settle)
    return Contradicted(NeedsOperator(f"AWS refuses to start the update: {refusal}"))


def _wait(view: View, bound: timedelta, why: str, *, act: bool = False) -> Observation:
    """Go on as long as ``bound`` allows, since the step began or since it last gave up."""
    began = max(filter(None, (view.intended_at, view.contradicted_at)), default=view.since)
    if view.now < began + bound:
        return NotYet(why, act=act)
    return Contradicted(Unsafe(f"{why}; so it has been since {clock_time(began)}: look at the group in the console"))


def _superseded(view: View, action: UpdateAction) -> NothingToDo | Unsafe:
    why = f"{action.update} no longer applies to this group; a newer update may have superseded it"
    if any(not attempt.refused for attempt in view.attempts):
        return Unsafe(f"{why}, after it was triggered: look at the group in the console")
    return NothingToDo(why)


def _started(view: View, action: UpdateAction) -> Data:
    tried = [attempt for attempt in view.attempts if not attempt.refused]
    return {
        "update": action.update,
        "how": "applied" if tried else "adopted",
        "attempts": len(tried),
        "initiated_by": sorted({node.initiated_by for node in action.nodes if node.initiated_by}),
        "since": noted(_began(view, action)),
        "primary": view.intent["primary"],
        "members": view.intent["members"],
        "status": action.status,
    }


def _began(view: View, action: UpdateAction) -> datetime:
    """From when on events may belong to this update."""
    if view.attempts:
        return view.attempts[0].at
    dates = [date for node in action.nodes for date in (node.initiated, node.started) if date]
    return min([*dates, view.now])


def _tried(attempt: Attempt) -> str:
    return f"the request of {clock_time(attempt.at)} was interrupted"


def _update(view: View) -> str:
    update: str = view.facts["readiness"]["action"]["update"]
    return update
