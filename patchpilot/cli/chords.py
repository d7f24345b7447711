"""``patchpilot chords``."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
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
from patchpilot.cli.recover import say_elsewhere, site
from patchpilot.clock import SYSTEM
from patchpilot.durations import ago
from patchpilot.errors import Transient, Usage
from patchpilot.postgres.connection import Database
from patchpilot.postgres.record import Record
from patchpilot.recovery import Finding, Recovery, Window
from patchpilot.recovery.inventory import Life, OfCallback, inventory, life
from patchpilot.recovery.lookup import Ambiguous
from patchpilot.recovery.quiet import rest
from patchpilot.settings import Settings

EVER = Window(timedelta(0), timedelta(days=36500))

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

    Stuck is what `patchpilot recover --dry-run` would find; callbacks that were dispatched and lost are told as well,
    though their chords are not open any more. `patchpilot chords show ID` tells the life of one.
    """
    if context.invoked_subcommand is not None:
        return
    settings = read_settings(config)
    with Record(settings.postgres_dsn()) as database:
        found = inventory(database)
    window = Window(settings.recovery.min_age, settings.recovery.max_age)
    with Recovery(site(settings, the_broker(settings, cluster))) as recovery:
        sweep = recovery.look(window, ("chord", "callback"))
        elsewhere = recovery.elsewhere()
    stuck = sweep.findings
    if output is Output.JSON:
        data = {**_as_data(found, stuck), "quiet": sweep.quiet.as_dict()}
        emit_json({**data, "elsewhere": [asdict(each) for each in elsewhere]})
        return
    if found:
        _table(found, stuck)
    for finding in stuck:
        emit(f"{finding.kind} {finding.id} ({finding.callback}): {finding.diagnosis}: {finding.reason}")
    unknown = sum(finding.unknown for finding in stuck)
    say(f"{_open(found)}, {len(stuck) - unknown} stuck" if found or stuck else "no chord is open")
    for line in rest(stuck, sweep.quiet, window):
        say(line)
    say_elsewhere(elsewhere)


def _as_data(found: tuple[OfCallback, ...], stuck: tuple[Finding, ...]) -> dict[str, Any]:
    return {
        "open": sum(each.open for each in found),
        "oldest": min((each.oldest for each in found), default=None),
        "unrecoverable": sum(each.unrecoverable for each in found),
        "by_callback": [{**asdict(each), "stuck": _stuck(each, stuck)} for each in found],
        "stuck": [finding.as_dict() for finding in stuck],
    }


def _open(found: tuple[OfCallback, ...]) -> str:
    if not found:
        return "no chord is open"
    number, oldest = sum(each.open for each in found), min(each.oldest for each in found)
    return f"{number} {'chord is' if number == 1 else 'chords are'} open, the oldest for {ago(SYSTEM.now() - oldest)}"


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
    chord: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="The chord's group id, or the id of a task of it, or the first 8 characters."
        ),
    ],
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """The life of one chord as a timeline, and in one sentence why its callback has run, or has not.

    The timeline is PostgreSQL's. If its callback has not run, the broker and the workers are asked too: what
    `patchpilot recover` would say of this chord, however short the time since its last progress.
    """
    settings = read_settings(config)
    with Record(settings.postgres_dsn()) as database:
        found = _life(database, chord, settings)
    stuck, unknown = ((), None) if found.over else _diagnosed(settings, cluster, found)
    found = _lost(found, stuck)
    if output is Output.JSON:
        data: dict[str, Any] = asdict(found)
        data["moments"] = [{"at": it.at.isoformat(), "what": it.what} for it in found.moments]
        emit_json({**data, "stuck": [finding.as_dict() for finding in stuck], "unknown": unknown})
        return
    if found.asked_for == "header-task":
        emit(f"{chord} is a task of the header of this chord:")
    emit(f"chord {found.group_id}  {found.state}  {found.returned}/{found.total} parts")
    emit(f"callback {found.callback}[{found.callback_id}]")
    emit(f"{found.why}")
    for finding in stuck:
        emit(f"{finding.diagnosis}: {finding.reason} (remedy: {finding.remedy})")
    if unknown is not None:
        emit(f"whether anything was lost is not known: {unknown}")
    emit("")
    for moment in found.moments:
        emit(f"{moment.at:%Y-%m-%d %H:%M:%S.%f}"[:-3] + f"  {moment.what}")


def _life(database: Database, chord: str, settings: Settings) -> Life:
    try:
        return life(database, chord, settings.celery.accept_content)
    except Ambiguous as error:
        for candidate in error.candidates:
            say(candidate)
        raise


def _diagnosed(settings: Settings, cluster: str | None, it: Life) -> tuple[tuple[Finding, ...], str | None]:
    """What recovery finds of this chord, or else why nobody knows. What PostgreSQL knows is told either way."""
    try:
        with Recovery(site(settings, the_broker(settings, cluster))) as recovery:
            findings = recovery.survey(EVER)
    except (Usage, Transient) as error:
        return (), str(error)
    ours = {it.group_id, *it.callback_ids}
    return tuple(finding for finding in findings if finding.id in ours), None


def _lost(found: Life, stuck: tuple[Finding, ...]) -> Life:
    """What the broker and the workers say of the callback goes before what the record says: a message may be lost."""
    lost = [it for it in stuck if it.kind != "chord" and it.curable]
    if not lost:
        return found
    what = "the message of an errback" if found.state == "failed" else "a message of its callback"
    return replace(found, why=f"{found.why}; but {what} is lost ({lost[0].diagnosis}): `patchpilot recover` sends it")
