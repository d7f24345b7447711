"""When a rotation has to be stopped: somebody asks for it, or a limit from the configuration is passed."""

from __future__ import annotations

from datetime import datetime

from patchpilot.elasticache.facts import UpdateStatus
from patchpilot.engine.plan import Data
from patchpilot.engine.requests import stop
from patchpilot.errors import PatchpilotError
from patchpilot.phases.desk import Desk, Gauge
from patchpilot.phases.operations import Sign, Standing
from patchpilot.recovery.findings import Finding
from patchpilot.settings import Metric


def reason_to_stop(desk: Desk, at: Standing, now: datetime) -> Data | None:
    """Why the rotation has to be stopped, and who says so; None if it has not."""
    if request := stop(desk.requests()):
        return {"why": str(request), "by": request.by}
    if at.sign is not Sign.RUNNING or at.status == UpdateStatus.STOPPING or not at.update:
        return None
    why = _too_much_stuck(desk) or _past_the_limit(desk, now)
    return {"why": why, "by": "patchpilot"} if why else None


def _too_much_stuck(desk: Desk) -> str:
    limit = desk.runbook.abort_stuck
    if limit is None or desk.recovery is None:
        return ""
    try:
        stuck = desk.recovery.survey(desk.window)
    except PatchpilotError:
        return ""  # in the middle of a failover nobody can say; the next look can
    number = count_chords(stuck)
    return f"{number} chords are stuck, more than runbook.abort_stuck = {limit}" if number > limit else ""


def count_chords(stuck: tuple[Finding, ...]) -> int:
    """How many chords are stuck, for want of a part or of their callback."""
    return sum(finding.kind in {"chord", "callback"} for finding in stuck)


def _past_the_limit(desk: Desk, now: datetime) -> str:
    metric, gauge = desk.runbook.abort_metric, desk.gauge
    if metric is None or gauge is None:
        return ""
    values = _read(gauge, now)
    return judge(metric, values)


def _read(gauge: Gauge, now: datetime) -> tuple[float, ...]:
    try:
        return gauge.newest(now)
    except PatchpilotError:
        return ()  # pre-flight could read it, so this passes


def judge(metric: Metric, values: tuple[float, ...]) -> str:
    """Why ``values``, newest first, are reason to stop; empty if they are not. Pure."""
    if len(values) < metric.points or not all(map(metric.is_past, values)):
        return ""
    limit = f"above {metric.above:g}" if metric.above is not None else f"below {metric.below:g}"
    shown = ", ".join(f"{value:g}" for value in values)
    return f"{metric.namespace} {metric.name} is {limit}: {shown}"
