"""``patchpilot report``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from patchpilot import report as reports
from patchpilot.cli.console import (
    ClusterOption,
    ConfigOption,
    emit_json,
    emit_page,
    read_settings,
    say,
)
from patchpilot.errors import Usage
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import Run, entries, find_run, runs
from patchpilot.postgres.record import Record
from patchpilot.settings import Settings


class Format(StrEnum):
    """How the report is printed."""

    TEXT = "text"
    HTML = "html"
    JSON = "json"


def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run [default: the newest].")] = None,
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    write: Annotated[bool, typer.Option("--write", help="Write the files of the report again as well.")] = False,
    output: Annotated[
        Format,
        typer.Option(
            "--output", "-o", help="Markdown for a terminal, one HTML file for a browser, or JSON for scripts."
        ),
    ] = Format.TEXT,
) -> None:
    """Make the report of a run again, from its journal: Markdown or HTML for people, or the JSON these are made from.

    The report is a function of the journal, so it can be made of a run that is still under way, or years later.
    """
    settings = read_settings(config)
    with Record(settings.postgres_dsn()) as database:
        found = find_run(database, run) if run is not None else _newest(database, settings, cluster)
        data = reports.build(entries(database, found.id), found)
    if write:
        for path in reports.write(data, settings.reports):
            say(f"wrote {path}")
    match output:
        case Format.JSON:
            emit_json(data)
        case Format.HTML:
            emit_page(reports.html(data).rstrip())
        case Format.TEXT:
            emit_page(reports.markdown(data))


def _newest(database: Database, settings: Settings, cluster: str | None) -> Run:
    if cluster is not None:
        settings.cluster(cluster)
    found = runs(database, settings.environment, cluster, limit=1)
    if not found:
        raise Usage("there are no runs yet")
    return found[0]
