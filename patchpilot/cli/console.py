"""What a person sees: lines on standard error, data on standard output."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from patchpilot.dsn import masked
from patchpilot.durations import parse_duration
from patchpilot.errors import Usage
from patchpilot.legible import encodable, legible
from patchpilot.settings import Settings, load


class Output(StrEnum):
    """How data is printed."""

    TEXT = "text"
    JSON = "json"


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The TOML configuration [default: patchpilot.toml, if it is there]."
    ),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Text for people, or JSON for scripts.")]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", metavar="NAME", help="The cluster's name in the configuration.")
]


WIDEST = 64
"""How many characters of a cell a table shows."""

_WHOLE = {"ID", "CHORD", "RUN", "SERVER"}
"""Columns of what a person copies."""


def say(line: str) -> None:
    """A message for a person."""
    _print(legible(line), sys.stderr)


def emit(line: str) -> None:
    """Data, one line, whatever is in it."""
    _print(legible(line), sys.stdout)


def emit_page(text: str) -> None:
    """Data of several lines."""
    _print(legible(text, keep="\n\t"), sys.stdout)


def emit_json(data: Any) -> None:
    """Data for a script."""
    emit_page(json.dumps(masked(data), indent=2, default=str))


def emit_line(data: Any) -> None:
    """Data for a script that reads as it comes: one line of JSON."""
    emit(json.dumps(masked(data), default=str))


def emit_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Data for a person, in columns as wide as they need to be, or as is sensible. The last one takes what it needs."""
    free = {len(header) - 1, *(column for column, name in enumerate(header) if name in _WHOLE)}
    told = [[legible(str(cell)) for cell in row] for row in rows]
    cut = [[cell if column in free else shortened(cell) for column, cell in enumerate(row)] for row in told]
    table = [list(header), *cut]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def shortened(cell: str) -> str:
    """``cell`` as a table shows it: of a long one, both ends."""
    half = (WIDEST - 3) // 2
    return cell if len(cell) <= WIDEST else f"{cell[:half]}...{cell[-half:]}"


def _print(text: str, stream: TextIO) -> None:
    print(encodable(text, stream), file=stream, flush=True)


_change: ContextVar[Callable[[Settings], Settings]] = ContextVar("patchpilot_change", default=lambda settings: settings)


@contextmanager
def settings_from(change: Callable[[Settings], Settings]) -> Iterator[None]:
    """Inside, commands read their settings through ``change``."""
    token = _change.set(change)
    try:
        yield
    finally:
        _change.reset(token)


def read_settings(config: Path | None) -> Settings:
    """The settings, from the configuration file and the environment."""
    return _change.get()(load(config))


def the_broker(settings: Settings, name: str | None) -> str:
    """The cluster called ``name``, or the only broker there is.

    :raises Usage: if there is no such cluster, it is no broker, or there are several to choose from.
    """
    if name is not None:
        if settings.cluster(name).role != "broker":
            raise Usage(
                f"cluster {name!r} is a {settings.cluster(name).role}, not a broker: there is nothing to recover"
            )
        return name
    brokers = sorted(key for key, cluster in settings.clusters.items() if cluster.role == "broker")
    if len(brokers) != 1:
        known = ", ".join(brokers) or "none"
        raise Usage(f"say which broker with --cluster (brokers in the configuration: {known})")
    return brokers[0]


def duration(text: str | None, default: timedelta, option: str) -> timedelta:
    """The value of a duration option.

    :raises Usage: if it is not one.
    """
    if text is None:
        return default
    try:
        return parse_duration(text)
    except ValueError as error:
        raise Usage(f"{option}: {error}") from None


@contextmanager
def stop_signals(words: str) -> Iterator[threading.Event]:
    """Set the event on SIGTERM and SIGINT, instead of dying from them. A second Ctrl-C is an interrupt again.

    :param words: what to say then.
    """
    stop = threading.Event()

    def ask(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        say(words)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
