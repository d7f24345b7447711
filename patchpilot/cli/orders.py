"""The options that say what to do: what `run`, `plan` and `preflight` have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from patchpilot.phases.order import Kind

POSTGRES_BUDGET = 60.0
"""Seconds for which PostgreSQL may be away, failing over itself perhaps, before the run stops with "resume later"."""

OperationOption = Annotated[
    str | None,
    typer.Option(
        "--operation", metavar="KIND", help=f"What to do: {', '.join(Kind)} [default: {Kind.SERVICE_UPDATE}]."
    ),
]
UpdateOption = Annotated[
    str | None,
    typer.Option("--update", metavar="NAME", help="The service update to apply [default: the newest applicable]."),
]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", metavar="ENGINE", help="With engine-upgrade: valkey or redis [default: as it is]."),
]
EngineVersionOption = Annotated[
    str | None, typer.Option("--engine-version", metavar="VERSION", help="With engine-upgrade: the version to go to.")
]
ParameterGroupOption = Annotated[
    str | None,
    typer.Option(
        "--parameter-group", metavar="NAME", help="With engine-upgrade: the parameter group that goes with it."
    ),
]
NodeTypeOption = Annotated[
    str | None, typer.Option("--node-type", metavar="TYPE", help="With node-type: the type to go to.")
]
ClusterNameOption = Annotated[
    str, typer.Option("--cluster", metavar="NAME", help="The cluster's name in the configuration.")
]
