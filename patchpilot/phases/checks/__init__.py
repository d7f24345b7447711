"""The checks of pre-flight: each looks at the same situation and gives a verdict with its evidence. Pure.

A check is a row of data, by topic: the group, the update, the calendar, the data, what watches it, what lives on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from patchpilot.phases.checks import calendar, clients, data, group, update, watching
from patchpilot.phases.checks.situation import Check, Row, Situation, Verdict
from patchpilot.phases.choice import Choice
from patchpilot.phases.order import Kind
from patchpilot.settings import Role

__all__ = ["CHECKS", "Check", "Row", "Situation", "Verdict", "blocking", "judge"]

CHECKS: tuple[Row, ...] = (*group.ROWS, *update.ROWS, *calendar.ROWS, *data.ROWS, *watching.ROWS, *clients.ROWS)

NO_WAIVERS: Mapping[str, str] = {}


def judge(situation: Situation, waivers: Mapping[str, str] = NO_WAIVERS) -> tuple[Check, ...]:
    """All checks, in order. What already runs, or is only observed, cannot be blocked: those become warnings.

    :param waivers: the checks whose verdict somebody answers for, and why they do.
    """
    rows = (row for row in CHECKS if _is_due(row, situation.choice))
    return tuple(_judged(row, situation, waivers.get(row.name, "")) for row in rows)


def _is_due(row: Row, choice: Choice) -> bool:
    is_upgrade = choice.operation is Kind.ENGINE_UPGRADE
    return (choice.is_update or not row.of_updates) and (is_upgrade or not row.of_upgrades)


def blocking(checks: tuple[Check, ...], role: Role) -> tuple[Check, ...]:
    """Those that forbid to go on."""
    stops = {Verdict.BLOCK, Verdict.UNKNOWN} if role == "broker" else {Verdict.BLOCK}
    return tuple(check for check in checks if check.verdict in stops and not check.waived)


def _judged(row: Row, situation: Situation, waiver: str) -> Check:
    verdict, evidence = row.look(situation)
    check = Check(row.name, verdict, evidence, row.why, "" if verdict is Verdict.PASS else row.mend)
    if verdict not in {Verdict.BLOCK, Verdict.UNKNOWN}:
        return check
    if beyond_us := situation.choice.beyond_us:
        return replace(check, verdict=Verdict.WARN, evidence=f"{evidence} ({beyond_us})")
    if waiver and (verdict is Verdict.UNKNOWN or row.waivable):
        return replace(check, waived=waiver)
    return replace(check, evidence=f"{evidence} (this cannot be waived)") if waiver else check
