"""``patchpilot db``: the durable record's schema."""

from __future__ import annotations

import typer

from patchpilot.cli.console import ConfigOption, Output, OutputOption, emit_json, read_settings, say
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate as apply_migrations

app = typer.Typer(no_args_is_help=True, help="The durable record in PostgreSQL: its schema.", rich_markup_mode=None)


@app.callback()
def group() -> None:
    """The durable record in PostgreSQL: its schema."""


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
