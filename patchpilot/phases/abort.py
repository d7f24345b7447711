"""When a rotation has to be stopped: somebody asks for it, or a limit from the configuration is passed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from patchpilot.elasticache.facts import UpdateStatus
from patchpilot.engine.plan import Data
from patchpilot.engine.requests import stop
from patchpilot.errors import PatchpilotError
from patchpilot.phases.desk import Desk
from patchpilot.phases.operations import Sign, Standing
from patchpilot.recovery.findings import Finding
from patchpilot.settings import Metric


@dataclass(frozen=True)
class Limits:
    """Whether the rotation has to be stopped."""

    stop: Data | None = None
    """Why, and who says so; None if it has not."""
    unread: tuple[str, ...] = ()
    """What could not be read: the limits on it are not watched at the moment."""


def limits(desk: Desk, at: Standing, now: datetime, since: datetime) -> Limits:
    """Ask whoever may stop the rotation, and look at what has a limit.

    :param since: when the rotation began: what was measured before is not its doing.
    """
    if request := stop(desk.requests()):
        return Limits({"why": str(request), "by": request.by})
    if at.sign is not Sign.RUNNING or at.status == UpdateStatus.STOPPING or not at.update:
        return Limits()
    unread = []
    for limit in (_too_much_stuck, _past_the_limit):
        try:
            if why := limit(desk, now, since):
                return Limits({"why": why, "by": "patchpilot"})
        except PatchpilotError as error:
            unread.append(str(error))
    return Limits(unread=tuple(unread))


def _too_much_stuck(desk: Desk, _now: datetime, _since: datetime) -> str:
    limit = desk.runbook.abort_stuck
    if limit is None or desk.recovery is None:
        return ""
    number = count_chords(desk.recovery.survey(desk.window))
    return f"{number} chords are stuck, more than runbook.abort_stuck = {limit}" if number > limit else ""


def count_chords(stuck: tuple[Finding, ...]) -> int:
    """How many chords are stuck, for want of a part or of their callback."""
    return sum(finding.kind in {"chord", "callback"} for finding in stuck)


def _past_the_limit(desk: Desk, now: datetime, since: datetime) -> str:
    metric, gauge = desk.runbook.abort_metric, desk.gauge
    return "" if metric is None or gauge is None else judge(metric, gauge.newest(now, since))


def judge(metric: Metric, values: tuple[float, ...]) -> str:
    """Why ``values``, newest first, are reason to stop; empty if they are not. Pure."""
    if len(values) < metric.points or not all(map(metric.is_past, values)):
        return ""
    limit = f"above {metric.above:g}" if metric.above is not None else f"below {metric.below:g}"
    shown = ", ".join(f"{value:g}" for value in values)
    return f"{metric.namespace} {metric.name} is {limit}: {shown}"
