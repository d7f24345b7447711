"""``patchpilot approve``."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from patchpilot.cli.asking import ReasonOption, Run, database_of, told
from patchpilot.cli.console import ConfigOption, Output, OutputOption, say
from patchpilot.cli.desk import Outfit
from patchpilot.cli.orders import ClusterNameOption
from patchpilot.clock import SYSTEM
from patchpilot.engine.requests import Ask, approval
from patchpilot.errors import Blocked, NothingToDo, PatchpilotError, ResumeLater, Usage
from patchpilot.phases.approve import Shown, plans_shown
from patchpilot.phases.notes import clock_time
from patchpilot.phases.order import Order
from patchpilot.phases.proposal import changes, propose, sentence
from patchpilot.postgres.connection import Database
from patchpilot.settings import Settings

JUST_NOW = timedelta(minutes=1)
"""For so long after the plan has changed, whoever approves it has to say which one is meant: it may have been read just
before."""


def approve(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="DIGEST", help="Only if this is what waits [default: the last plan shown]."),
    ] = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Approve what a run that was started with `--approve-before` is about to do.

    The approval is for the plan that the run has shown last, and stays good for exactly that plan until the run is
    over: after a refusal, give the same `patchpilot run` command again. If the world changes before the run has acted
    on it, the run waits for another one. Exit code 4 if the run has not come so far yet, 5 if the world has changed.
    """
    with database_of(config) as (settings, database):
        run = Run(settings, cluster, database)
        shown = _to_approve(run, plan)
        if not run.live:
            _refuse_another_world(settings, cluster, database, run, shown)
        request = run.ask(Ask.APPROVE, reason, shown.digest)
        what = f"approved plan {shown.digest}, as shown at {clock_time(shown.since)}: {sentence(shown.proposal)}"
        told(run, request, what, output, plan=dict(shown.proposal))


def _to_approve(run: Run, plan: str | None) -> Shown:
    """The plan that is waiting.

    :param plan: the one that is meant; None for the last one shown.
    """
    if not Order.of(run.record.order).approve_before:
        raise NothingToDo(f"run {run.id} needs no approval: it was started without --approve-before")
    reached = run.step("approve").reached
    if run.step("trigger").reached or (reached and not reached.data.get("needed", True)):
        raise NothingToDo(f"run {run.id} needs no approval any more: it has begun")
    shown = plans_shown(run.entries)
    if not shown:
        raise ResumeLater(f"run {run.id} has shown no plan yet: try again when it waits for an approval")
    last = shown[-1]
    if plan not in {None, last.digest}:
        raise Usage(
            f"what waits is plan {last.digest}, not {plan}{_since(shown, plan)}: see `patchpilot status {run.id}`"
        )
    if plan is None and len(shown) > 1 and SYSTEM.now() < last.since + JUST_NOW:
        different = changes(shown[-2].proposal, last.proposal)
        raise Blocked(
            f"the plan has changed a moment ago: {different}. What waits now is {sentence(last.proposal)}: approve it "
            f"with --plan {last.digest}"
        )
    if given := approval(run.requests, last.digest):
        again = "" if run.live else "; give the same `patchpilot run` command again"
        raise NothingToDo(f"plan {last.digest} of run {run.id} has been {given}, and that stays good for it{again}")
    return last


def _since(shown: tuple[Shown, ...], plan: str | None) -> str:
    """What has changed since ``plan`` was shown; empty if it never was."""
    earlier = next((each for each in reversed(shown) if each.digest == plan), None)
    return f" ({changes(earlier.proposal, shown[-1].proposal)})" if earlier else ""


def _refuse_another_world(settings: Settings, cluster: str, database: Database, run: Run, shown: Shown) -> None:
    """Nobody has looked since the process of the run ended: look now. The run will look again in any case.

    :raises Blocked: the world has changed since the plan was shown.
    """
    mine = {key: shown.proposal[key] for key in ("grace", "waived")}  # the command line of the run says these
    try:
        with Outfit(settings, cluster, database, {}) as outfit:
            desk = outfit.look(Order.of(run.record.order), "approve")
            different = changes(shown.proposal, {**propose(desk, SYSTEM.now(), shown.proposal["aim"]), **mine})
    except NothingToDo as reason:
        different = str(reason)
    except PatchpilotError as error:
        say(f"whether the world is still as it was shown could not be seen from here: {error}")
        return
    if different:
        raise Blocked(
            f"the world has changed since plan {shown.digest} was shown at {clock_time(shown.since)}: {different}. "
            "Give the same `patchpilot run` command again, and approve what it shows then"
        )
