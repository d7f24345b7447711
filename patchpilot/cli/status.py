"""``patchpilot status``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from patchpilot.cli.console import (
    ClusterOption,
    ConfigOption,
    Output,
    OutputOption,
    emit,
    emit_json,
    emit_table,
    read_settings,
    say,
)
from patchpilot.engine.journal import RunRecord, State
from patchpilot.engine.requests import Request, approval
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import Run, entries, find_run, runs
from patchpilot.postgres.record import Record
from patchpilot.postgres.requests import requests


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Show this run's journal.")] = None,
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Which runs there are, where they stand, and who holds them.

    A run is "running" while a live process holds it, or "paused" if it was told to pause. "interrupted", "paused" and
    "contradicted" runs without a holder go on with the same `patchpilot run` command that began them.
    """
    settings = read_settings(config)
    with Record(settings.postgres_dsn()) as database:
        if run is not None:
            _show_run(database, find_run(database, run), output)
            return
        if cluster is not None:
            settings.cluster(cluster)
        found = runs(database, settings.environment, cluster)
    if output is Output.JSON:
        emit_json({"runs": [_as_data(each) for each in found]})
    elif not found:
        say("no runs yet")
    else:
        emit_table(
            ("RUN", "CLUSTER", "STATE", "AT", "STARTED", "HOLDER"),
            [
                (each.id, each.cluster, each.state, _at(each), f"{each.created_at:%Y-%m-%d %H:%M:%S}", _holder(each))
                for each in found
            ],
        )


def _show_run(database: Database, run: Run, output: Output) -> None:
    journal = entries(database, run.id)
    asked = requests(database, run.id)
    if output is Output.JSON:
        told = [_entry(entry) for entry in journal]
        emit_json({**_as_data(run), "entries": told, "requests": [_request(request) for request in asked]})
        return
    emit(f"{run.id}  {run.cluster}  {run.state}  {_holder(run)}")
    for entry in journal:
        where = f"{entry.phase}/{entry.step}" if entry.step else ""
        emit(f"{entry.at:%H:%M:%S}  {entry.kind:12}  {where:28}  {entry.data.get('why', '')}".rstrip())
    for request in asked:
        emit(f"{request.at:%H:%M:%S}  {request}")
    waiting = RunRecord.of(journal).step("approve")
    pending = waiting.seen.get("digest") if waiting.state is State.LOOKING else None
    if pending and not approval(asked, pending):
        emit(f"waits for the approval of plan {pending}: {waiting.seen['proposal']['what']}")


def _request(request: Request) -> dict[str, Any]:
    return {
        "ask": str(request.ask), "by": request.by, "at": request.at.isoformat(), "reason": request.reason,
        "digest": request.digest,
    }  # fmt: skip


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "seq": entry.seq, "at": entry.at.isoformat(), "kind": str(entry.kind), "phase": entry.phase, "step": entry.step,
        "data": dict(entry.data),
    }  # fmt: skip


def _as_data(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.id, "environment": run.environment, "cluster": run.cluster, "state": run.state,
        "started_at": run.created_at.isoformat(),
        "finished_at": run.finished_at.isoformat() if run.finished_at else None,
        "phase": run.last.phase if run.last else "", "step": run.last.step if run.last else "",
        "holder": str(run.lease.holder) if run.lease and run.lease.live else None,
    }  # fmt: skip


def _at(run: Run) -> str:
    return f"{run.last.phase}/{run.last.step}" if run.last and run.last.step else "-"


def _holder(run: Run) -> str:
    return str(run.lease.holder) if run.lease and run.lease.live else "-"
