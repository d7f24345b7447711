"""Recovering until nothing curable is left: what the first and the sixth phase have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta

from patchpilot.engine.plan import Attempt, Data, NotYet, Observation, Reached, View
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import length, noted
from patchpilot.recovery.findings import Finding

FRUITLESS = 5
"""How many rounds may cure nothing before the rest is left to the verification. Each thing is cured in one round,
unless the broker is lost again meanwhile, or a person has to mend something first."""


def cure(desk: Desk, view: View, *, already: int = 0, patient: bool = False) -> Observation:
    """Ask to recover while something curable is stuck.

    :param already: how many of the run's remedies belong to an earlier phase.
    :param patient: wait for what looks stuck but is too young to be sure of: a chord whose last part returned well
        after the failover, say. Otherwise the run could end, proven, a minute before that chord is found stuck.
    """
    if desk.recovery is None:
        return Reached(skipped(desk))
    stuck = desk.recovery.survey(desk.window)
    curable = [finding for finding in stuck if finding.curable]
    if curable and _fruitless(view.attempts) < FRUITLESS:
        return _round(desk, view, curable)
    young = _waited_for(desk, view) if patient and not curable else []
    if young:
        why = f"{len(young)} look stuck, but for less than {length(desk.window.min_age)}: waiting until that is sure"
        return NotYet(why, seen={"young": young})
    return Reached({
        "applied": noted([applied.as_dict() for applied in desk.recovery.applied(view.run_id)[already:]]),
        "left": [finding.as_dict() for finding in stuck],
        "rounds": len(view.attempts),
    })  # fmt: skip


def recover(desk: Desk, view: View) -> Data:
    """One round of recovery, on record as this run's."""
    applied = desk.recovery.recover(desk.window, run_id=view.run_id) if desk.recovery else ()
    return {"applied": len(applied)}


def skipped(desk: Desk) -> dict[str, str]:
    """The fact of a step that a cluster of this role does not need."""
    return {"skipped": f"cluster {desk.cluster} is a {desk.role}: it holds no tasks to recover"}


def counts(stuck: Iterable[Finding]) -> dict[str, int]:
    """How many of each kind and diagnosis."""
    found = [f"{finding.kind}/{finding.diagnosis}" for finding in stuck]
    return {name: found.count(name) for name in sorted(set(found))}


def _round(desk: Desk, view: View, curable: Sequence[Finding]) -> Observation:
    """At once, or a little later if the last round cured nothing."""
    again = view.attempts[-1].at + desk.runbook.poll_interval if _fruitless(view.attempts) else view.now
    why = f"{len(curable)} stuck"
    return NotYet(why, act=True, seen=view.seen) if view.now >= again else NotYet(why, until=again, seen=view.seen)


def _fruitless(attempts: Sequence[Attempt]) -> int:
    """How many of the last rounds cured nothing, as far as is known."""
    number = 0
    for attempt in reversed(attempts):
        if attempt.outcome and attempt.outcome["applied"]:
            break
        number += 1
    return number


def too_young(desk: Desk) -> tuple[Finding, ...]:
    """What looks as if it could be cured, but not for long enough to be sure."""
    if desk.recovery is None or not desk.window.min_age:
        return ()
    looks = desk.recovery.survey(replace(desk.window, min_age=timedelta()))
    return tuple(finding for finding in looks if finding.curable and finding.age < desk.window.min_age)


def _waited_for(desk: Desk, view: View) -> list[str]:
    """What is too young and looked stuck from the first: each is old enough in time, or well again.

    On a broker at work something always looks stuck for a moment, so what comes up later is not waited for.
    """
    young = sorted(finding.id for finding in too_young(desk))
    return [name for name in young if name in view.seen.get("young", young)]
