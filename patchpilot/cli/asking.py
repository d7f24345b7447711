"""``patchpilot stop | pause | resume``: what people ask of a run, wherever it runs; and what ``approve`` shares."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from patchpilot.cli.console import ConfigOption, Output, OutputOption, emit_json, read_settings, say
from patchpilot.cli.orders import ClusterNameOption
from patchpilot.engine import requests as asked
from patchpilot.engine.journal import RunRecord, StepRecord
from patchpilot.engine.requests import Ask, Request
from patchpilot.errors import NothingToDo
from patchpilot.phases.operations import OPERATIONS
from patchpilot.phases.order import Order
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import entries, find_run
from patchpilot.postgres.record import Record
from patchpilot.settings import Settings

ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; it goes into the report.")]


_NOBODY = "no process works on it at the moment: give the same `patchpilot run` command again"


class Run:
    """The unfinished run of a cluster, as its journal tells it now."""

    def __init__(self, settings: Settings, cluster: str, database: Database) -> None:
        settings.cluster(cluster)
        self.id = requests.unfinished(database, settings.environment, cluster)
        self.entries = entries(database, self.id)
        self.record = RunRecord.of(self.entries)
        self.requests = requests.requests(database, self.id)
        lease = find_run(database, self.id).lease
        self.live = lease is not None and lease.live
        self._database = database

    def step(self, name: str) -> StepRecord:
        return self.record.step(name)

    def ask(self, what: Ask, reason: str, digest: str | None = None) -> Request:
        return requests.ask(self._database, self.id, what, reason=reason, digest=digest)


def stop(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Stop the rotation, and let the run recover and verify what is there.

    The run asks AWS to stop the service update: nodes in progress are finished, nothing is rolled back. Then it goes
    on to grace, recovery and verification, and ends with exit code 8. Before anything was triggered it just ends. If
    no process works on the run at the moment, it does so when the same `patchpilot run` command is given again.

    Once it has ended, another `patchpilot run` starts anew and applies the update after all: a scheduler must not try
    again on exit code 8.
    """
    with database_of(config) as (settings, database):
        run = Run(settings, cluster, database)
        _refuse_to_stop(run)
        told(run, run.ask(Ask.STOP, reason), "the run sees it at its next look", output)


def pause(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Let the run stay at its next checkpoint, until `patchpilot resume`. AWS goes on meanwhile."""
    with database_of(config) as (settings, database):
        run = Run(settings, cluster, database)
        if asked.hold(run.requests):
            raise NothingToDo(f"run {run.id} is to pause already")
        told(run, run.ask(Ask.PAUSE, reason), "the run stays at its next checkpoint", output)


def resume(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a run go on that was told to pause.

    If its process has ended meanwhile, give the same `patchpilot run` command again.
    """
    with database_of(config) as (settings, database):
        run = Run(settings, cluster, database)
        if not asked.hold(run.requests):
            raise NothingToDo(f"run {run.id} is not told to pause")
        told(run, run.ask(Ask.RESUME, reason), "the run goes on", output)


def _refuse_to_stop(run: Run) -> None:
    """Say so at once if stopping can have no effect any more, or if AWS offers no way to do it."""
    order = Order.of(run.record.order)
    if asked.stop(run.requests):
        raise NothingToDo(f"run {run.id} is to stop already")
    if run.step("stop").reached or run.step("grace").intent:
        raise NothingToDo(f"the rotation of run {run.id} is over: there is nothing to stop")
    takes_too_long = run.step("watch").contradicted is not None
    if run.step("trigger").reached and not OPERATIONS[order.operation].stoppable and not takes_too_long:
        raise NothingToDo(f"AWS offers no way to stop a running {order.title}: run {run.id} goes on watching it")


def told(run: Run, request: Request, what: str, output: Output, **more: Any) -> None:
    """Say what was asked of a run, and whether anybody is there to hear it.

    :param more: what else a script should know.
    """
    if output is Output.JSON:
        told = {"ask": str(request.ask), "by": request.by, "at": request.at.isoformat(), "digest": request.digest}
        emit_json({"run_id": run.id, **told, **more})
    say(f"{what} (run {run.id})" + ("" if run.live else f"; {_NOBODY}"))


class database_of:  # noqa: N801 - reads as a statement where it is used
    """The settings, and the database they name, for as long as a command takes."""

    def __init__(self, config: ConfigOption) -> None:
        self._settings = read_settings(config)

    def __enter__(self) -> tuple[Settings, Database]:
        self._opened = Record(self._settings.postgres_dsn())
        return self._settings, self._opened

    def __exit__(self, *_: object) -> None:
        self._opened.close()
