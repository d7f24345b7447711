"""Checks of CloudWatch: who is told when something goes wrong, and whether something does already. Pure."""

from __future__ import annotations

from patchpilot.elasticache.cloudwatch import FREEABLE, LAG, MEMORY, RECENT, AlarmState, Metric
from patchpilot.phases.abort import judge
from patchpilot.phases.checks.data import BUSY, MOST_SILENCE
from patchpilot.phases.checks.situation import Judgement, Row, Situation, Verdict, prefer, unknown
from patchpilot.phases.notes import length

LEAST_FREE = 100 * 1024 * 1024
"""Bytes of memory that a node's system should have left."""


def _alarms(at: Situation) -> Judgement:
    if isinstance(at.alarms, str):
        return unknown(at.alarms)
    if not at.alarms:
        return Verdict.WARN, "no alarm watches this group or any of its nodes"
    firing = [alarm for alarm in at.alarms if alarm.state == AlarmState.ALARM]
    if firing:
        return Verdict.BLOCK, "; ".join(f"{alarm.name} is firing: {alarm.reason}" for alarm in firing)
    faults = [f"{alarm.name} is {alarm.state}" for alarm in at.alarms if alarm.state != AlarmState.OK]
    faults += [f"{alarm.name} tells nobody" for alarm in at.alarms if not alarm.tells]
    quiet = f"{len(at.alarms)} alarm(s), all quiet: {', '.join(alarm.name for alarm in at.alarms)}"
    return prefer(not faults, "; ".join(faults) or quiet)


def _metrics(at: Situation) -> Judgement:
    if at.metrics is None:
        return Verdict.PASS, "not read: aws.metrics is false"
    if isinstance(at.metrics, str):
        return unknown(at.metrics)
    if not at.metrics:
        return Verdict.WARN, f"CloudWatch has no data point of the last {length(RECENT)}"
    bad = [metric for metric in at.metrics if _is_bad(metric)]
    ordered = sorted(bad or at.metrics, key=lambda metric: (metric.node, metric.name))
    return prefer(not bad, "; ".join(f"{metric.node} {_said(metric)}" for metric in ordered))


def _limit(at: Situation) -> Judgement:
    if at.limit is None:
        return Verdict.PASS, "runbook.abort_metric is not set"
    if isinstance(at.measured, str):
        return unknown(at.measured)
    if past := judge(at.limit, at.measured):
        return Verdict.BLOCK, past
    enough = len(at.measured) >= at.limit.points
    shown = ", ".join(f"{value:g}" for value in at.measured) or "no value"
    return prefer(enough, f"{at.limit.namespace} {at.limit.name}: {shown} (points = {at.limit.points})")


def _is_bad(metric: Metric) -> bool:
    match metric.name:
        case name if name == MEMORY:
            return metric.worst >= BUSY
        case name if name == LAG:
            return metric.worst > MOST_SILENCE
        case name if name == FREEABLE:
            return metric.worst < LEAST_FREE
    return False


def _said(metric: Metric) -> str:
    if metric.name == FREEABLE:
        return f"{metric.name} {metric.worst / 1024 / 1024:.0f} MiB"
    return f"{metric.name} {metric.worst:g}" + (" %" if metric.name == MEMORY else " s")


ROWS: tuple[Row, ...] = (
    Row("metrics", _metrics, "a node that lags or runs out of memory now does so more during the patch",
        "wait for a quieter hour, or find out why"),
    Row("abort-metric", _limit, "what is past its limit before the patch stops it half-way, and for another reason",
        "find out why, or change runbook.abort_metric: a waiver does not keep it from stopping the rotation",
        waivable=True),
    Row("alarms", _alarms, "somebody should be told when the patch goes wrong, and nothing should be wrong before it",
        "see to what is firing; give the group's alarms an action, and enable it", waivable=True),
)  # fmt: skip
