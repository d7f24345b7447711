"""``celery -A proj patchpilot recover``: for whoever has the application at hand, and no configuration file.

Every ``celery`` command loads this, workers included, so that it imports click and nothing else before it is asked.
Typer has a click of its own: what is declared for the one cannot be added to the other. So the words after the
command's name go to the same command line as those of ``patchpilot``, and only the settings come from the application.
"""

from __future__ import annotations

import sys
from typing import Any

import click

COMMANDS = {
    "recover": "Find what a failover lost, and re-create exactly that, once.",
    "chords": "The chords on record: what is open, and the life of one.",
    "db": "The durable record: make its tables, and purge what is over.",
}


@click.group("patchpilot")
def patchpilot() -> None:
    """patchpilot, for this application: its broker and its PostgreSQL need not be said again."""


def _bridge(name: str, words: str) -> None:
    @patchpilot.command(
        name, short_help=words, add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )  # fmt: skip
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def run(context: click.Context, /, arguments: tuple[str, ...], **_: Any) -> None:
        context.exit(_run(context.obj.app, [name, *arguments]))


for _name, _words in COMMANDS.items():
    _bridge(_name, _words)


def _run(app: Any, arguments: list[str]) -> int:
    try:
        from patchpilot.cli.at_hand import run_for
    except ModuleNotFoundError as error:
        print(  # noqa: T201 - what prints elsewhere may be what is missing
            f"patchpilot: {error.name} is missing: install the command line with `pip install 'patchpilot[pilot]'`",
            file=sys.stderr,
        )
        return 1
    return run_for(app, arguments)
