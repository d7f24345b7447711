"""``patchpilot preflight``, and the waivers that it shares with ``patchpilot run``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from patchpilot.cli.console import (
    ConfigOption,
    Output,
    OutputOption,
    emit,
    emit_json,
    emit_table,
    read_settings,
    say,
)
from patchpilot.cli.desk import Outfit
from patchpilot.cli.orders import (
    ClusterNameOption,
    EngineOption,
    EngineVersionOption,
    NodeTypeOption,
    OperationOption,
    ParameterGroupOption,
    UpdateOption,
)
from patchpilot.clock import SYSTEM
from patchpilot.engine.plan import View
from patchpilot.errors import NothingToDo, PatchpilotError, Usage
from patchpilot.phases.checks import CHECKS, Check, Situation, Verdict, blocking, judge
from patchpilot.phases.notes import noted
from patchpilot.phases.order import settle
from patchpilot.phases.p1_preflight import PATIENCE, read, refusal
from patchpilot.postgres.connection import Database

WaiveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--waive", metavar="CHECK",
        help="Go on although this check is unknown; for some checks, although it blocks. Needs a --reason; repeatable.",
    ),
]  # fmt: skip
ReasonOption = Annotated[
    list[str] | None,
    typer.Option("--reason", metavar="TEXT", help="Why; one for each --waive, in the same order. It goes on record."),
]


def preflight(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    operation: OperationOption = None,
    update: UpdateOption = None,
    engine: EngineOption = None,
    engine_version: EngineVersionOption = None,
    parameter_group: ParameterGroupOption = None,
    node_type: NodeTypeOption = None,
    waive: WaiveOption = None,
    reason: ReasonOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Say whether it is safe to patch a cluster now, check by check: what was found, why it matters, how to mend it.

    Reads only: it takes no lease, starts no run and changes nothing, so it may run at any time, beside a run too.
    Exit codes: 0 safe, 3 no service update applies, 5 blocked. A check that could not be made is unknown, and unknown
    blocks a broker unless it is waived by name, with a reason.
    """
    settings = read_settings(config)
    settings.cluster(cluster)
    asked = {
        "operation": operation, "update": update, "engine": engine, "engine_version": engine_version,
        "parameter_group": parameter_group, "node_type": node_type,
    }  # fmt: skip
    order, waivers = settle(asked, None, begun=False), read_waivers(waive, reason)
    with Database(settings.postgres_dsn()) as database, Outfit(settings, cluster, database, waivers) as outfit:
        desk = outfit.look(order, "preflight")
        now = SYSTEM.now()
        try:
            # One look, and no second one: what does not answer now is unknown now.
            situation = read(desk, View("", now, {}, since=now - PATIENCE))
        except NothingToDo as error:
            _show_nothing(cluster, error, output)
            raise
    checks = judge(situation, waivers)
    failed = blocking(checks, desk.role)
    _show(cluster, situation, checks, failed, output)
    if failed:
        raise refusal(failed)


def read_waivers(checks: Sequence[str] | None, reasons: Sequence[str] | None) -> dict[str, str]:
    """The waivers that were given, by check.

    :raises Usage: one is for no check, twice for the same, or has no reason.
    """
    checks, reasons = list(checks or ()), [" ".join(reason.split()) for reason in reasons or ()]
    known = [row.name for row in CHECKS]
    for name in checks:
        if name not in known:
            raise Usage(f"--waive: there is no check {name!r} (checks: {', '.join(known)})")
        if checks.count(name) > 1:
            raise Usage(f"--waive: {name!r} is given twice")
    if len(checks) != len(reasons) or not all(reasons):
        raise Usage("each --waive needs a --reason that says why it is safe to go on, in the same order")
    return dict(zip(checks, reasons, strict=True))


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
