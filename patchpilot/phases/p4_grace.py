"""Phase 4: leave Celery alone until it has healed what it can.

The deadline is absolute and on record: it is counted from the last failover, so a kill does not start it again and a
further failover does.
"""

from __future__ import annotations

from datetime import timedelta

from patchpilot.engine.plan import Data, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import length, moment, noted
from patchpilot.phases.p3_watch import rotated
from patchpilot.phases.rotation import Rotation
from patchpilot.phases.sight import look_around


class Grace(Phase):
    """Wait until clients have reconnected."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("grace", "give clients time to reconnect", (WaitOut(desk),))


class WaitOut(Step):
    """So much time has passed since the last failover."""

    name = "grace"
    title = "wait until clients have reconnected"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._last: Rotation | None = None

    def intend(self, view: View) -> Data:
        """The deadline, before the waiting begins."""
        watched = rotated(view.facts)
        return terms(Rotation.of(watched["rotation"]), watched["completed"], self._desk.runbook.grace)

    def observe(self, view: View) -> Observation:
        since = moment(view.facts["trigger"]["since"])
        sight = look_around(self._desk, view.now, since=since, actions=False, reports=True)
        before = Rotation.of((view.seen or view.intent)["rotation"])
        # What this process knows besides what is on record: when the nodes last said who the primary is.
        self._last = (self._last if self._last == before else before).follow(
            sight.group.primary, sight.events, view.now, sight.said, sight.behind
        )
        return look(view, self._last)


def terms(rotation: Rotation, completed: str, grace: timedelta) -> Data:
    """When the grace ends, and why then."""
    last = rotation.last
    begins = last.at if last else moment(completed)
    return {
        "deadline": noted(begins + grace),
        "grace": grace.total_seconds(),
        "because": f"failover to {last.to}" if last else "end of the rotation, which had no failover",
        "rotation": rotation.note(),
    }


def look(view: View, rotation: Rotation) -> Observation:
    """Whether the grace is over, or begins anew because there was a further failover. Pure.

    :param rotation: what is known of the rotation now.
    """
    known = view.seen or view.intent
    now_known = known
    if rotation != Rotation.of(known["rotation"]):
        now_known = terms(rotation, rotated(view.facts)["completed"], timedelta(seconds=view.intent["grace"]))
    deadline = moment(now_known["deadline"])
    if view.now >= deadline:
        return Reached({**now_known, "rearmed": len(rotation.failovers) - len(view.intent["rotation"]["failovers"])})
    why = f"recovery begins in {length(deadline - view.now)} ({now_known['because']})"
    return NotYet(why, until=deadline, seen=view.seen if now_known is known else now_known)
