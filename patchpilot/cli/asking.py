"""``patchpilot stop | pause | resume | approve``: what people ask of a run, wherever it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from patchpilot.cli.console import ConfigOption, Output, OutputOption, emit_json, read_settings, say
from patchpilot.cli.orders import ClusterNameOption
from patchpilot.engine import requests as asked
from patchpilot.engine.journal import RunRecord, State, StepRecord
from patchpilot.engine.requests import Ask, Request
from patchpilot.errors import NothingToDo, ResumeLater, Usage
from patchpilot.phases.operations import OPERATIONS
from patchpilot.phases.order import Order
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import entries, find_run
from patchpilot.settings import Settings

ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; it goes into the report.")]


_NOBODY = "no process works on it at the moment: give the same `patchpilot run` command again"


class _Run:
    """The unfinished run of a cluster, as its journal tells it now."""

    def __init__(self, settings: Settings, cluster: str, database: Database) -> None:
        settings.cluster(cluster)
        self.id = requests.unfinished(database, settings.environment, cluster)
        self.record = RunRecord.of(entries(database, self.id))
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
    """
    with _database(config) as (settings, database):
        run = _Run(settings, cluster, database)
        _refuse_to_stop(run)
        _told(run, run.ask(Ask.STOP, reason), "the run sees it at its next look", output)


def pause(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Let the run stay at its next checkpoint, until `patchpilot resume`. AWS goes on meanwhile."""
    with _database(config) as (settings, database):
        run = _Run(settings, cluster, database)
        if asked.hold(run.requests):
            raise NothingToDo(f"run {run.id} is to pause already")
        _told(run, run.ask(Ask.PAUSE, reason), "the run stays at its next checkpoint", output)


def resume(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a run go on that was told to pause.

    If its process has ended meanwhile, give the same `patchpilot run` command again.
    """
    with _database(config) as (settings, database):
        run = _Run(settings, cluster, database)
        if not asked.hold(run.requests):
            raise NothingToDo(f"run {run.id} is not told to pause")
        _told(run, run.ask(Ask.RESUME, reason), "the run goes on", output)


def approve(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="DIGEST", help="Only if this is what waits [default: whatever waits]."),
    ] = None,
    reason: ReasonOption = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Approve what a run that was started with `--approve-before` is about to do.

    The approval is for what waits now. If the world changes before the run has acted on it, it waits for another one.
    Exit code 4 if the run has not come so far yet.
    """
    with _database(config) as (settings, database):
        run = _Run(settings, cluster, database)
        if not Order.of(run.record.order).approve_before:
            raise NothingToDo(f"run {run.id} needs no approval: it was started without --approve-before")
        waiting = run.step("approve")
        pending = waiting.seen.get("digest")
        if waiting.state is State.REACHED:
            raise NothingToDo(f"run {run.id} has been approved")
        if pending is None:
            raise ResumeLater(f"run {run.id} does not wait for an approval yet: try again when it does")
        if plan not in {None, pending}:
            raise Usage(f"what waits is plan {pending}, not {plan}: see `patchpilot status {run.id}`")
        what = f"{waiting.seen['proposal']['what']} (plan {pending})"
        _told(run, run.ask(Ask.APPROVE, reason, pending), f"approved: {what}", output)


def _refuse_to_stop(run: _Run) -> None:
    """Say so at once if stopping can have no effect any more, or if AWS offers no way to do it."""
    order = Order.of(run.record.order)
    if asked.stop(run.requests):
        raise NothingToDo(f"run {run.id} is to stop already")
    if run.step("stop").reached or run.step("grace").intent:
        raise NothingToDo(f"the rotation of run {run.id} is over: there is nothing to stop")
    if run.step("trigger").reached and not OPERATIONS[order.operation].stoppable:
        raise NothingToDo(f"AWS offers no way to stop a running {order.title}: run {run.id} goes on watching it")


def _told(run: _Run, request: Request, what: str, output: Output) -> None:
    if output is Output.JSON:
        told = {"ask": str(request.ask), "by": request.by, "at": request.at.isoformat(), "digest": request.digest}
        emit_json({"run_id": run.id, **told})
    say(f"{what} (run {run.id})" + ("" if run.live else f"; {_NOBODY}"))


class _database:  # noqa: N801 - reads as a statement where it is used
    def __init__(self, config: ConfigOption) -> None:
        self._settings = read_settings(config)

    def __enter__(self) -> tuple[Settings, Database]:
        self._opened = Database(self._settings.postgres_dsn())
        return self._settings, self._opened

    def __exit__(self, *_: object) -> None:
        self._opened.close()
