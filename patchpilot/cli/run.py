"""``patchpilot run``: the pilot."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Annotated, Any

import typer

from patchpilot import elasticache, phases, report
from patchpilot.cli.console import ConfigOption, Output, OutputOption, duration, emit, emit_json, read_settings, say
from patchpilot.cli.recover import complain, site
from patchpilot.clock import SYSTEM
from patchpilot.engine.journal import Kind
from patchpilot.engine.runner import Progress, Runner
from patchpilot.errors import Exit, LeaseLost, PatchpilotError
from patchpilot.phases.desk import Desk
from patchpilot.postgres import journal as journals
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from patchpilot.settings import Settings
from patchpilot.telemetry import mask
from patchpilot.valkey import nodes

POSTGRES_BUDGET = 60.0
"""Seconds for which PostgreSQL may be away, failing over itself perhaps, before the run stops with "resume later"."""


def run(
    cluster: Annotated[str, typer.Option("--cluster", metavar="NAME", help="The cluster's name in the configuration.")],
    config: ConfigOption = None,
    update: Annotated[
        str | None,
        typer.Option("--update", metavar="NAME", help="The service update to apply [default: the newest applicable]."),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option("--grace", metavar="DURATION", help="How long to wait after the last failover [default: 5m]."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option("--time-budget", metavar="DURATION", help="Checkpoint and exit with code 4 after this long."),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """Patch one cluster: check, recover, trigger, watch, wait, dry-run, recover, verify, report.

    Every step is journalled in PostgreSQL before and after it takes effect. The run may be killed at any instruction:
    the same command takes it up where it was, and the service update is applied once. Ctrl-C and SIGTERM stop it at
    the next checkpoint, with exit code 4. One run per cluster: a second one exits at once with code 6.
    """
    settings = read_settings(config)
    pause = settings.runbook
    overrides = {
        "grace": duration(grace, pause.grace, "--grace"),
        "time_budget": duration(time_budget, timedelta(), "--time-budget") if time_budget else pause.time_budget,
    }
    settings = settings.model_copy(update={"runbook": pause.model_copy(update=overrides)})
    settings.cluster(cluster)
    with Database(settings.postgres_dsn(), budget=POSTGRES_BUDGET) as database, _signals() as stop:
        return _Pilot(settings, cluster, database, output).fly(update, stop)


class _Pilot:
    """One invocation of the run command."""

    def __init__(self, settings: Settings, cluster: str, database: Database, output: Output) -> None:
        self._settings = settings
        self._cluster = cluster
        self._database = database
        self._output = output

    def fly(self, update: str | None, stop: threading.Event) -> int:
        """Take the run up, or begin one, and drive it. Returns the exit code."""
        settings = self._settings
        with journals.open_run(self._database, settings.environment, self._cluster) as journal, ExitStack() as stack:
            resumed = any(entry.kind is Kind.STARTED for entry in journal.entries())
            say(f"run {journal.run_id} of cluster {self._cluster!r}" + (", taken up again" if resumed else ""))
            run_ = journals.find_run(self._database, journal.run_id)
            files = report.Files(journal, run_, settings.reports)
            plan = phases.runbook(self._desk(stack, journal.run_id, files, update))
            runner = Runner(plan, journal, SYSTEM, stop=stop, budget=settings.runbook.time_budget, notify=_Narrator())
            try:
                record = runner.run()
            except PatchpilotError as error:
                self._stopped(journal.run_id, files, error)
                raise
            facts = record.facts()
            paths = next((fact for fact in reversed(facts.values()) if "markdown" in fact), {})
            self._done(journal.run_id, dict(paths))
            return int(Exit.DONE)

    def _desk(self, stack: ExitStack, run_id: str, files: report.Files, update: str | None) -> Desk:
        settings = self._settings
        cluster = settings.cluster(self._cluster)
        is_broker = cluster.role == "broker"
        recovery = (
            stack.enter_context(Recovery(site(settings, self._cluster), complain=complain)) if is_broker else None
        )
        cloud = elasticache.connect(settings.aws, cluster.region, session_name=f"patchpilot-{run_id}")
        return Desk(
            cluster=self._cluster,
            group=cluster.replication_group,
            role=cluster.role,
            cloud=stack.enter_context(cloud),
            nodes=nodes.connect(settings.endpoint(self._cluster)) if is_broker or cluster.endpoint else None,
            recovery=recovery,
            reports=files,
            schema=lambda: journals.outdated(self._database),
            runbook=settings.runbook,
            window=Window(settings.recovery.min_age, settings.recovery.max_age),
            update=update,
        )

    def _done(self, run_id: str, paths: dict[str, Any]) -> None:
        found = {key: paths[key] for key in ("json", "markdown") if key in paths}
        if self._output is Output.JSON:
            emit_json({"run_id": run_id, "outcome": "done", "report": found})
            return
        say("done")
        for path in found.values():
            emit(path)

    def _stopped(self, run_id: str, files: report.Files, error: PatchpilotError) -> None:
        """Say how it stands. What is known so far makes a report as well, unless somebody else goes on with the run."""
        found: dict[str, str] = {}
        if not isinstance(error, LeaseLost):
            written = files.write()
            found = {key: written[key] for key in ("json", "markdown")}
            say(f"report so far: {found['markdown']}")
        if self._output is Output.JSON:
            outcome = error.exit_code.name.lower().replace("_", "-")
            emit_json({"run_id": run_id, "outcome": outcome, "why": mask(str(error)), "report": found})


class _Narrator:
    """Tells a person what happens: a line when something changes, none while nothing does."""

    def __init__(self) -> None:
        self._last = ("", "", "")

    def __call__(self, progress: Progress) -> None:
        line = (progress.phase, progress.step, progress.message)
        if progress.kind == "reached" or line == self._last or not progress.message:
            return
        self._last = line
        where = f"{progress.phase}/{progress.step}" if progress.step else progress.phase
        mark = {"acting": "! ", "retrying": "? ", "interrupted": "? "}.get(progress.kind, "")
        say(f"{SYSTEM.now():%H:%M:%S}  {where:28}  {mark}{mask(progress.message)}")


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set the event on SIGTERM and SIGINT, instead of dying from them. A second Ctrl-C is an interrupt again."""
    stop = threading.Event()

    def ask(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        say("stopping at the next checkpoint; the same command goes on from there")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
