"""Waiting for somebody's word before the cluster is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from patchpilot.engine.journal import Entry
from patchpilot.engine.plan import Contradicted, Data, NotYet, Observation, Reached, Step, View
from patchpilot.engine.requests import approval, stop
from patchpilot.errors import Aborted
from patchpilot.phases.desk import Desk
from patchpilot.phases.proposal import digest, propose


@dataclass(frozen=True)
class Shown:
    """A plan that a run has shown to whoever may approve it."""

    digest: str
    proposal: Data
    since: datetime
    """When it was shown in place of another one, or as the first."""


def plans_shown(entries: Iterable[Entry]) -> tuple[Shown, ...]:
    """The plans that a run has shown, oldest first: a further one whenever the world had changed. Pure.

    :param entries: the run's journal, oldest entry first.
    """
    shown: list[Shown] = []
    for entry in entries:
        key = entry.data.get("digest") if entry.step == Approve.name else None
        if key and (not shown or shown[-1].digest != key):
            shown.append(Shown(key, entry.data["proposal"], entry.at))
    return tuple(shown)


class Approve(Step):
    """Somebody has approved what is about to be done, if the run was told to wait for that.

    An approval is for one proposal, and stays good for it as long as the run is not over: whoever takes the run up
    while nothing has changed, or has changed back, finds the approval that was given. If the world changes before the
    trigger, another one is needed.
    """

    name = "approve"
    title = "wait for an approval, if one was asked for"
    volatile = True

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def observe(self, view: View) -> Observation:
        if self._desk.order.approve_before is None:
            return Reached({"needed": False})
        requests = self._desk.requests()
        if request := stop(requests):
            return Contradicted(Aborted(f"ended before anything was started: {request}"))
        content = propose(self._desk, view.now, view.facts["readiness"]["aim"])
        key = digest(content)
        pending = {"proposal": content, "digest": key}
        if content["adopted"]:
            return Reached({"needed": False}, say=f"nothing to approve: {content['what']} is {content['status']}")
        if given := approval(requests, key):
            fact = {"needed": True, **pending, "by": given.by, "at": given.at.isoformat(), "reason": given.reason}
            return Reached(fact, say=f"{given} (plan {key})")
        return NotYet(
            f"waiting for `patchpilot approve --cluster {self._desk.cluster}`: {content['what']}, primary "
            f"{content['primary']} (plan {key})",
            seen=pending,
        )
