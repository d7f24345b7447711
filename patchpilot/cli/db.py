"""``patchpilot db``: the durable record's schema and its purge."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from patchpilot.backend.purge import purge as remove
from patchpilot.cli.console import ConfigOption, Output, OutputOption, duration, emit_json, read_settings, say
from patchpilot.errors import Usage
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate as apply_migrations
from patchpilot.postgres.record import Record

SHORTEST = timedelta(seconds=1)

app = typer.Typer(
    no_args_is_help=True,
    help="The durable record in PostgreSQL: its schema, and the purge of what is over.",
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """The durable record in PostgreSQL: its schema, and the purge of what is over."""


@app.command()
def migrate(config: ConfigOption = None, output: OutputOption = Output.TEXT) -> None:
    """Make the tables, or bring them up to date.

    Forward only: every step is applied once, in order, and recorded with its checksum. Running it twice, or from
    several places at once, is safe. Run it before the first worker of a new version starts; workers of the version
    before go on working.
    """
    with Database(read_settings(config).postgres_dsn()) as database:
        applied = [f"{migration.number:04} {migration.name}" for migration in apply_migrations(database)]
    if output is Output.JSON:
        emit_json({"applied": applied})
    for name in applied:
        say(f"applied {name}")
    if not applied:
        say("the schema is up to date")


@app.command()
def purge(
    config: ConfigOption = None,
    retention: Annotated[
        str | None,
        typer.Option(
            "--retention", metavar="DURATION", help="Keep what ended later than this: chords, starts [default: 7d]."
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Remove what is over: results past their `result_expires`, and chords, starts and left-over messages of long ago.

    In small batches, beside the traffic, as often as you like. What is open stays, however old it is. Keep the
    retention longer than the broker's visibility timeout: until then an old message may come back, and the record of
    its start is what keeps it from running twice. Celery beat does the same once a day, if it runs.
    """
    settings = read_settings(config)
    keep = duration(retention, settings.purge.retention, "--retention")
    if keep < SHORTEST:
        raise Usage("--retention: must be 1s at least: what has just ended may come back from the broker")
    with Record(settings.postgres_dsn()) as database:
        removed = remove(database, keep)
    if output is Output.JSON:
        emit_json({"removed": removed})
    else:
        say("removed " + ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in removed.items()))
