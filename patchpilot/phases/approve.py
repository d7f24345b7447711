"""Waiting for somebody's word before the cluster is touched."""

from __future__ import annotations

from patchpilot.engine.plan import Contradicted, NotYet, Observation, Reached, Step, View
from patchpilot.engine.requests import approval, stop
from patchpilot.errors import Aborted
from patchpilot.phases.desk import Desk
from patchpilot.phases.proposal import digest, propose


class Approve(Step):
    """Somebody has approved what is about to be done, if the run was told to wait for that.

    An approval is for one proposal. If the world changes before the trigger, another one is needed; whoever takes the
    run up while nothing has changed finds the approval that was given.
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
