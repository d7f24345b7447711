"""``patchpilot lab``: real servers to rehearse on."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from patchpilot.cli.console import Output, OutputOption, emit, emit_json, emit_table, say
from patchpilot.errors import Exit, NeedsOperator
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate

app = typer.Typer(
    no_args_is_help=True,
    help="A lab on this machine: real PostgreSQL, real Valkey nodes, and an ElastiCache that really fails them over.",
    rich_markup_mode=None,
)

DirOption = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The folder of the lab.")]
LAB = Path(".lab")


def _prepare(dsn: str) -> None:
    with Database(dsn) as database:
        migrate(database)


@app.command()
def up(
    directory: DirOption = LAB,
    replicas: Annotated[int, typer.Option(min=1, max=5, help="Nodes besides the primary.")] = 2,
    write_loss_ms: Annotated[
        int, typer.Option(min=0, help="At each failover: how long the old primary takes writes that will be lost.")
    ] = 300,
    endpoint_lag_ms: Annotated[
        int, typer.Option(min=0, help="At each failover: how long the endpoint leads nowhere.")
    ] = 300,
    seconds_per_node: Annotated[float, typer.Option(min=0, help="How long replacing one node takes.")] = 3.0,
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario", metavar="NAME|FILE", help="What goes wrong; `lab scenarios` lists some [default: nothing]."
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Start the lab and leave it running.

    Everything listens on free loopback ports. DIR/lab.json says where; DIR/lab.toml is a configuration for --config.
    """
    background = _background()
    info = background.up(
        directory, replicas=replicas, write_loss_ms=write_loss_ms, endpoint_lag_ms=endpoint_lag_ms,
        seconds_per_node=seconds_per_node, scenario=scenario, prepare=_prepare,
    )  # fmt: skip
    if output is Output.JSON:
        emit_json(asdict(info))
        return
    say(f"the lab is up; {directory / 'lab.json'} says where everything is")
    say("to use it from a Celery application:")
    emit(f'broker_url = "{info.endpoint}"')
    emit(f'result_backend = "patchpilot+{info.endpoint}"')
    emit(f'patchpilot_database = "{info.postgres}"')
    say(f"to patch it:   patchpilot run --cluster broker --config {shlex.quote(info.config)}")
    say(f"to stop it:    patchpilot lab down --dir {shlex.quote(str(directory))}")


@app.command()
def down(directory: DirOption = LAB) -> None:
    """Stop everything the lab started, whatever is left of it."""
    _background().down(directory)
    say(f"the lab in {directory} is down")


@app.command()
def status(directory: DirOption = LAB, output: OutputOption = Output.TEXT) -> int:
    """What runs, and who is primary. Exit code 1 if the lab is not whole."""
    found = _background().status(directory)
    if output is Output.JSON:
        emit_json(found)
    elif found["processes"]:
        rows = [
            (name, row["pid"], "yes" if row["alive"] else "NO", row.get("role") or "-", row.get("offset") or "-")
            for name, row in sorted(found["processes"].items())
        ]
        emit_table(("PROCESS", "PID", "ALIVE", "ROLE", "OFFSET"), rows)
    else:
        say(f"no lab runs in {directory}")
    return int(Exit.DONE if found["running"] else Exit.ERROR)


@app.command()
def scenarios(output: OutputOption = Output.TEXT) -> None:
    """What can go wrong in a lab, for `lab up --scenario`. A file of your own can be named there as well."""
    from patchpilot.lab import scenario

    found = [(name, scenario.read(path).title, str(path)) for name, path in scenario.known().items()]
    if output is Output.JSON:
        emit_json([{"name": name, "title": title, "file": path} for name, title, path in found])
        return
    emit_table(("NAME", "WHAT GOES WRONG"), [(name, title) for name, title, _ in found])
    say(f"how to write one: {scenario.FOLDER / 'README.md'}")


@app.command()
def demo(
    reports: Annotated[Path, typer.Option("--reports", metavar="DIR", help="Where the reports go.")] = Path("reports"),
) -> int:
    """Patch a live broker under load, and let a ledger count what was lost; then the same with stock Celery.

    Starts a lab of its own, sends a steady stream of chords, runs `patchpilot run` as a user would, and writes
    reports/demo.json. Stops everything it started, also on Ctrl-C.
    """
    try:
        from patchpilot.lab.demo import demo as run_demo
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return run_demo(reports, prepare=_prepare)


def _background() -> ModuleType:
    try:
        from patchpilot.lab import background
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return background


def _missing(error: ModuleNotFoundError) -> NeedsOperator:
    return NeedsOperator(f"{error.name} is missing: install the lab with `pip install 'patchpilot[lab]'`")
