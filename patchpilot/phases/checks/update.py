"""Checks of the operation, of the service update if it is one, and of what else AWS is doing. Pure."""

from __future__ import annotations

from patchpilot.elasticache.facts import IN_FLIGHT
from patchpilot.phases.checks.situation import Judgement, Row, Situation, Verdict, prefer, require, unknown
from patchpilot.phases.notes import clock_time


def _operation(at: Situation) -> Judgement:
    return Verdict.PASS, f"{at.choice.what} is {at.choice.status}"


def _version(at: Situation) -> Judgement:
    if isinstance(at.offered, str):
        return unknown(at.offered)
    engine, version = at.choice.aim["engine"], at.choice.aim["engine_version"]
    listed = ", ".join(at.offered) or "no version of it"
    return require(version in at.offered, f"{engine} {version}; AWS offers {listed}")


def _update(at: Situation) -> Judgement:
    what = "is adopted" if at.choice.adopted else "will be applied"
    return Verdict.PASS, f"{at.choice.action.update} is {at.choice.action.status} and {what}"


def _dates(at: Situation) -> Judgement:
    update = at.choice.update
    if update is None:
        missing = f"AWS does not list {at.choice.action.update} among the service updates"
        return unknown(at.updates if isinstance(at.updates, str) else missing)
    dates = "; ".join((
        f"recommended by {clock_time(update.recommended_by) if update.recommended_by else 'no date'}",
        f"cannot be applied after {clock_time(update.ends) if update.ends else 'no date'}",
        f"applied by AWS itself after the recommended date: {_yes_no(update.automatic)}",
    ))  # fmt: skip
    if update.ends and update.ends <= at.now:
        return Verdict.BLOCK, dates
    late = update.recommended_by is not None and update.recommended_by <= at.now
    return prefer(not late, f"{update.name}, severity {update.severity}: {dates}")


def _alone(at: Situation) -> Judgement:
    others = [a for a in at.actions if a.status in IN_FLIGHT and a.update != at.choice.action.update]
    return require(not others, ", ".join(f"{a.update} {a.status}" for a in others) or "no other update in flight")


def _region(at: Situation) -> Judgement:
    if isinstance(at.elsewhere, str):
        return unknown(at.elsewhere)
    others = [action for action in at.elsewhere if action.group != at.group.id]
    listed = ", ".join(f"{a.update} on {a.group or 'another cluster'} {a.status}" for a in others)
    return prefer(not others, listed or "no update in flight on any other cluster of this region")


def _yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not reported"}[value]


ROWS: tuple[Row, ...] = (
    Row("operation", _operation, "this is what the run is about", ""),
    Row("engine-version", _version, "AWS refuses a version that it does not offer, in the middle of the night",
        "say one that AWS offers: check --engine and --engine-version", of_upgrades=True),
    Row("update", _update, "this is the update that the run is about", "", of_updates=True),
    Row("update-dates", _dates, "after its end date an update cannot be applied; the other dates are deadlines",
        "aws elasticache describe-service-updates shows all three dates", of_updates=True),
    Row("update-alone", _alone, "two updates at once cannot be told apart in events and roles",
        "wait until the other one is complete"),
    Row("region-quiet", _region, "whoever is called tonight should have one patch to look at",
        "wait until the other ones are complete"),
)  # fmt: skip
