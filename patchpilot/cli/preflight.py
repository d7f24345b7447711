"""``patchpilot preflight``."""

from __future__ import annotations

from typing import Any

from patchpilot.cli.console import Output, emit, emit_json, emit_table, say
from patchpilot.cli.desk import Outfit
from patchpilot.cli.orders import Command, ordering
from patchpilot.clock import SYSTEM
from patchpilot.engine.plan import View
from patchpilot.errors import NothingToDo, PatchpilotError
from patchpilot.phases.checks import Check, Situation, Verdict, blocking, judge
from patchpilot.phases.notes import noted
from patchpilot.phases.p1_preflight import PATIENCE, read, refusal
from patchpilot.postgres.record import Record


@ordering
def preflight(command: Command) -> None:
    """Say whether it is safe to patch a cluster now, check by check: what was found, why it matters, how to mend it.

    Reads only: it takes no lease, starts no run and changes nothing, so it may run at any time, beside a run too.
    Exit codes: 0 safe, 3 no service update applies, 5 blocked. A check that could not be made is unknown, and unknown
    blocks a broker unless it is waived by name, with a reason.
    """
    order, output = command.order, command.output
    with Record(command.settings.postgres_dsn()) as database, Outfit.of(command, database) as outfit:
        desk = outfit.look(order, "preflight")
        now = SYSTEM.now()
        try:
            # One look, and no second one: what does not answer now is unknown now.
            situation = read(desk, View("", now, {}, since=now - PATIENCE))
        except NothingToDo as error:
            _show_nothing(command.cluster, error, output)
            raise
    checks = judge(situation, command.waivers)
    failed = blocking(checks, desk.role)
    _show(command.cluster, situation, checks, failed, output)
    if failed:
        raise refusal(failed)


def _show(cluster: str, at: Situation, checks: tuple[Check, ...], failed: tuple[Check, ...], output: Output) -> None:
    if output is Output.JSON:
        emit_json({
            "cluster": cluster, "group": at.group.id, "role": at.role,
            "outcome": "blocked" if failed else "ready",
            "operation": at.choice.operation, "what": at.choice.what,
            "update": at.choice.action.update or None, "adopted": at.choice.adopted,
            "checks": noted(checks), "blocked": [check.name for check in failed],
        })  # fmt: skip
        return
    emit_table(("CHECK", "VERDICT", "EVIDENCE"), [(it.name, _verdict(it), it.evidence) for it in checks])
    for check in checks:
        if check.verdict is not Verdict.PASS:
            emit("")
            emit(f"{check.name}: {check.why}")
            emit(f"  to mend it: {check.mend}" if not check.waived else f"  waived: {check.waived}")
    if not failed:
        say(f"safe: {at.choice.what}")


def _verdict(check: Check) -> str:
    return f"{check.verdict}, waived" if check.waived else str(check.verdict)


def _show_nothing(cluster: str, error: PatchpilotError, output: Output) -> None:
    if output is Output.JSON:
        answer: dict[str, Any] = {"cluster": cluster, "outcome": "nothing-to-do", "why": str(error)}
        emit_json({**answer, "checks": [], "blocked": []})
