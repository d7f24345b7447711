"""``patchpilot run``: the pilot."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any

import typer

from patchpilot import phases, report
from patchpilot.cli.console import Output, duration, emit, emit_json, say, stop_signals
from patchpilot.cli.desk import Outfit
from patchpilot.cli.orders import POSTGRES_BUDGET, Command, GraceOption, ordering
from patchpilot.clock import SYSTEM
from patchpilot.dsn import mask
from patchpilot.engine.journal import RunRecord
from patchpilot.engine.requests import hold
from patchpilot.engine.runner import Progress, Runner
from patchpilot.errors import Exit, LeaseLost, PatchpilotError, Usage
from patchpilot.phases.order import Order, settle
from patchpilot.phases.proposal import aim_of
from patchpilot.postgres import journal as journals
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import RunJournal
from patchpilot.postgres.record import Record
from patchpilot.settings import Settings

Asked = Mapping[str, str | None]
"""The options that say what to do, by the names of :class:`patchpilot.phases.order.Order`."""


@ordering
def run(
    command: Command,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="DIGEST", help="Do what `patchpilot plan` said; refuse if that has changed."),
    ] = None,
    approve_before: Annotated[
        str | None,
        typer.Option("--approve-before", metavar="trigger", help="Wait there for `patchpilot approve`."),
    ] = None,
    grace: GraceOption = None,
    time_budget: Annotated[
        str | None,
        typer.Option("--time-budget", metavar="DURATION", help="Checkpoint and exit with code 4 after this long."),
    ] = None,
) -> int:
    """Patch one cluster: check, recover, trigger, watch, wait, dry-run, recover, verify, report.

    Every step is journalled in PostgreSQL before and after it takes effect. The run may be killed at any instruction:
    the same command takes it up where it was, and the operation is started once. Ctrl-C and SIGTERM stop it at the
    next checkpoint, with exit code 4. One run per cluster: a second one exits at once with code 6. `patchpilot stop`,
    `pause`, `resume` and `approve` reach it from any host.
    """
    command = replace(command, asked={**command.asked, "plan": plan, "approve_before": approve_before})
    waits = {
        name: duration(text, timedelta(), f"--{name.replace('_', '-')}")
        for name, text in (("grace", grace), ("time_budget", time_budget))
        if text is not None
    }
    # What does not fit together is refused before anything is touched.
    settings, cluster = command.with_grace(grace).settings, command.cluster
    _ = command.order
    with (
        Record(settings.postgres_dsn(), budget=POSTGRES_BUDGET) as database,
        stop_signals("stopping at the next checkpoint; the same command goes on from there") as stop,
    ):
        planned = {} if plan is None else _planned(database, settings.environment, cluster, plan)
        given = {name: value for name, value in command.asked.items() if value is not None}
        pilot = _Pilot(settings, cluster, database, command.output, command.waivers, waits)
        return pilot.fly({**aim_of(planned), **given}, stop)


def _planned(database: Database, environment: str, cluster: str, plan: str) -> dict[str, Any]:
    """The plan with this digest: a digest that nobody knows is refused before a run is made for it."""
    found = requests.plan(database, environment, cluster, plan)
    if found is None:
        raise Usage(f"there is no plan {plan} for cluster {cluster!r}: make one with `patchpilot plan`")
    return found


class _Pilot:
    """One invocation of the run command.

    :param waits: the waiting times that the command line gives, in place of those of the settings.
    """

    def __init__(
        self, settings: Settings, cluster: str, database: Database, output: Output, waivers: Mapping[str, str],
        waits: Mapping[str, timedelta],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._waivers = waivers
        self._waits = waits
        self._cluster = cluster
        self._database = database
        self._output = output

    def fly(self, asked: Asked, stop: threading.Event) -> int:
        """Take the run up, or begin one, and drive it. Returns the exit code."""
        with journals.open_run(self._database, self._settings.environment, self._cluster) as journal, ExitStack() as on:
            order = self._order(asked, journal)
            settings = self.waiting_as(order)
            outfit = on.enter_context(Outfit(settings, self._cluster, self._database, self._waivers))
            files = report.Files(journal, journals.find_run(self._database, journal.run_id), settings.reports)
            runner = Runner(
                phases.runbook(outfit.desk(order, files, journal.run_id)), journal, SYSTEM, stop=stop,
                budget=settings.runbook.time_budget, notify=_Narrator(), order=order.note(),
                hold=lambda: hold(requests.requests(self._database, journal.run_id)),
            )  # fmt: skip
            try:
                record = runner.run()
            except PatchpilotError as error:
                self._stopped(journal.run_id, files, error)
                raise
            return self._ended(journal.run_id, record)

    def _order(self, asked: Asked, journal: RunJournal) -> Order:
        """What the run is about, and that it is one that was begun before."""
        record = RunRecord.of(journal.entries())
        begun = any(not attempt.refused for attempt in record.step("trigger").attempts)
        begun = begun or record.step("trigger").reached is not None
        order = settle(asked, record.order if record.started else None, begun=begun)
        again = ", taken up again" if record.started else ""
        say(f"run {journal.run_id} of cluster {self._cluster!r}: {order.title}{again}")
        return order

    def waiting_as(self, order: Order) -> Settings:
        """The settings, with the waiting times of the command line; else of the plan that the run is held to."""
        settings, waits = self._settings, dict(self._waits)
        if order.plan is not None and "grace" not in waits:
            planned = _planned(self._database, settings.environment, self._cluster, order.plan)
            waits["grace"] = timedelta(seconds=planned["grace"])
        return settings.model_copy(update={"runbook": settings.runbook.model_copy(update=waits)})

    def _ended(self, run_id: str, record: RunRecord) -> int:
        """Say how it ended, and where the report is."""
        end = record.finished.data if record.finished else {}
        outcome = str(end.get("outcome", "done"))
        paths = next((fact for fact in reversed(record.facts().values()) if "markdown" in fact), {})
        found = {key: paths[key] for key in report.KINDS if key in paths}
        why = end.get("why") or (record.facts().get("watch", {}).get("abort") or {}).get("why")
        if self._output is Output.JSON:
            emit_json({"run_id": run_id, "outcome": outcome, "report": found, **({"why": mask(why)} if why else {})})
        else:
            say(f"{outcome}: {mask(why)}" if why else outcome)
            for path in found.values():
                emit(path)
        return int(Exit.ABORTED if outcome == "aborted" else Exit.DONE)

    def _stopped(self, run_id: str, files: report.Files, error: PatchpilotError) -> None:
        """Say how it stands. What is known so far makes a report as well, unless somebody else goes on with the run."""
        found = {} if isinstance(error, LeaseLost) else _so_far(files)
        if self._output is Output.JSON:
            outcome = error.exit_code.name.lower().replace("_", "-")
            emit_json({"run_id": run_id, "outcome": outcome, "why": mask(str(error)), "report": found})


def _so_far(files: report.Files) -> dict[str, str]:
    """Write the report of a run that stopped. That it cannot be written does not change how the run stands."""
    try:
        written = files.write()
    except PatchpilotError as error:
        say(f"no report so far: {mask(str(error))}")
        return {}
    say(f"report so far: {written['markdown']}")
    return {key: written[key] for key in report.KINDS}


class _Narrator:
    """Tells a person what happens: a line when something changes, none while nothing does."""

    def __init__(self) -> None:
        self._last: tuple[str, ...] = ()

    def __call__(self, progress: Progress) -> None:
        # What begins and what is done about it may have the same words: the mark tells them apart.
        line = (progress.phase, progress.step, progress.kind, progress.message)
        if line == self._last or not progress.message:
            return
        self._last = line
        where = f"{progress.phase}/{progress.step}" if progress.step else progress.phase
        mark = {"acting": "! ", "retrying": "? ", "interrupted": "? "}.get(progress.kind, "")
        say(f"{SYSTEM.now():%H:%M:%S}  {where:28}  {mark}{mask(progress.message)}")
