"""``patchpilot chords``."""

from __future__ import annotations

from dataclasses import asdict
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
    the_broker,
)
from patchpilot.cli.recover import site
from patchpilot.clock import SYSTEM
from patchpilot.durations import ago
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Finding, Recovery, Window
from patchpilot.recovery.inventory import OfCallback, inventory, life

app = typer.Typer(
    help="The chords on record: what is open, and the life of one.", rich_markup_mode=None, invoke_without_command=True
)


@app.callback()
def chords(
    context: typer.Context,
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """The chords that are open, by callback: how many, the oldest, how many of them cannot be recovered or are stuck.

    Stuck is what `patchpilot recover --dry-run` would find. `patchpilot chords show ID` tells the life of one.
    """
    if context.invoked_subcommand is not None:
        return
    settings = read_settings(config)
    with Database(settings.postgres_dsn()) as database:
        found = inventory(database)
    window = Window(settings.recovery.min_age, settings.recovery.max_age)
    with Recovery(site(settings, the_broker(settings, cluster))) as recovery:
        stuck = recovery.survey(window, ("chord", "callback"))
    if output is Output.JSON:
        emit_json({
            "open": sum(each.open for each in found),
            "by_callback": [{**asdict(each), "stuck": _stuck(each, stuck)} for each in found],
            "stuck": [finding.as_dict() for finding in stuck],
        })  # fmt: skip
    elif not found:
        say("no chord is open")
    else:
        _table(found, stuck)


def _table(found: tuple[OfCallback, ...], stuck: tuple[Finding, ...]) -> None:
    now = SYSTEM.now()
    emit_table(
        ("CALLBACK", "OPEN", "OLDEST", "STUCK", "UNRECOVERABLE", "HALF-PUBLISHED"),
        [
            (it.callback, it.open, ago(now - it.oldest), _stuck(it, stuck), it.unrecoverable, it.half_published)
            for it in found
        ],
    )


def _stuck(of: OfCallback, stuck: tuple[Finding, ...]) -> int:
    return sum(finding.kind == "chord" and finding.callback == of.callback for finding in stuck)


@app.command()
def show(
    chord: Annotated[str, typer.Argument(metavar="ID", help="The chord's group id, or its callback's task id.")],
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """The life of one chord as a timeline, and in one sentence why its callback has run, or has not."""
    settings = read_settings(config)
    with Database(settings.postgres_dsn()) as database:
        found = life(database, chord)
    if output is Output.JSON:
        data: dict[str, Any] = asdict(found)
        data["moments"] = [{"at": it.at.isoformat(), "what": it.what} for it in found.moments]
        emit_json(data)
        return
    emit(f"chord {found.group_id}  {found.state}  {found.returned}/{found.total} parts")
    emit(f"callback {found.callback}[{found.callback_id}]")
    emit(f"{found.why}")
    emit("")
    for moment in found.moments:
        emit(f"{moment.at:%Y-%m-%d %H:%M:%S.%f}"[:-3] + f"  {moment.what}")
