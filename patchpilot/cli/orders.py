"""The options that say what to do to which cluster: what `run`, `plan` and `preflight` have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import typer

from patchpilot.cli.console import ConfigOption, Output, OutputOption, duration, read_settings
from patchpilot.errors import Usage
from patchpilot.phases.checks import CHECKS
from patchpilot.phases.order import Kind, Order, settle
from patchpilot.settings import Settings

R = TypeVar("R")

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
GraceOption = Annotated[
    str | None,
    typer.Option("--grace", metavar="DURATION", help="How long to wait after the last failover [default: 5m]."),
]
WaiveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--waive", metavar="CHECK",
        help="Go on although this check is unknown; for some checks, although it blocks. Needs a --reason; repeatable.",
    ),
]  # fmt: skip
ReasonOption = Annotated[
    list[str] | None,
    typer.Option("--reason", metavar="TEXT", help="Why; one for each --waive, in the same order. It goes on record."),
]


@dataclass(frozen=True)
class Command:
    """What a command was told to do, to which cluster."""

    settings: Settings
    cluster: str
    asked: Mapping[str, str | None]
    """The options that say what to do, by the names of :class:`~patchpilot.phases.order.Order`."""
    waivers: Mapping[str, str]
    """The checks that somebody answers for, and why."""
    output: Output

    @property
    def order(self) -> Order:
        """What to do, of a run that has not begun.

        :raises Usage: the options do not fit together.
        """
        return settle(self.asked, None, begun=False)

    def with_grace(self, grace: str | None) -> Command:
        """The same, with the grace that the command line gives, if it gives one.

        :raises Usage: it is no duration, or cannot be so long.
        """
        settings = self.settings
        return replace(self, settings=settings.with_grace(duration(grace, settings.runbook.grace, "--grace")))


def ordering(command: Callable[..., R]) -> Callable[..., R]:
    """Give ``command`` the options that say what to do to which cluster, in place of its first parameter.

    :raises Usage: there is no such cluster, or the waivers are wrong; when the command is given.
    """

    def told(
        *, cluster: ClusterNameOption, config: ConfigOption = None, operation: OperationOption = None,
        update: UpdateOption = None, engine: EngineOption = None, engine_version: EngineVersionOption = None,
        parameter_group: ParameterGroupOption = None, node_type: NodeTypeOption = None, waive: WaiveOption = None,
        reason: ReasonOption = None, output: OutputOption = Output.TEXT,
    ) -> Command:  # fmt: skip
        settings = read_settings(config)
        settings.cluster(cluster)
        asked = {
            "operation": operation, "update": update, "engine": engine, "engine_version": engine_version,
            "parameter_group": parameter_group, "node_type": node_type,
        }  # fmt: skip
        return Command(settings, cluster, asked, read_waivers(waive, reason), output)

    ours = inspect.signature(told, eval_str=True).parameters
    theirs = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in theirs]

    @functools.wraps(command)
    def wrapped(**given: Any) -> R:
        said = {name: given.pop(name) for name in ours if name in given}
        return command(told(**said), **given)

    last = [ours[name] for name in ("waive", "reason", "output")]
    first = [each for each in ours.values() if each not in last]
    wrapped.__signature__ = inspect.Signature([*first, *own, *last])  # type: ignore[attr-defined]
    return wrapped


def read_waivers(checks: Sequence[str] | None, reasons: Sequence[str] | None) -> dict[str, str]:
    """The waivers that were given, by check.

    :raises Usage: one is for no check, twice for the same, or has no reason.
    """
    checks, reasons = list(checks or ()), [" ".join(reason.split()) for reason in reasons or ()]
    known = [row.name for row in CHECKS]
    for name in checks:
        if name not in known:
            raise Usage(f"--waive: there is no check {name!r} (checks: {', '.join(known)})")
        if checks.count(name) > 1:
            raise Usage(f"--waive: {name!r} is given twice")
    if len(checks) != len(reasons) or not all(reasons):
        raise Usage("each --waive needs a --reason that says why it is safe to go on, in the same order")
    return dict(zip(checks, reasons, strict=True))
