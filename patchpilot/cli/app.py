"""The commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from patchpilot import __version__
from patchpilot.cli import approving, asking, chords, db, lab
from patchpilot.cli.blanks import refuse_blanks, refuse_unreadable
from patchpilot.cli.console import say
from patchpilot.cli.plan import plan
from patchpilot.cli.preflight import preflight
from patchpilot.cli.recover import recover
from patchpilot.cli.report import report
from patchpilot.cli.run import run
from patchpilot.cli.status import status
from patchpilot.dsn import mask
from patchpilot.errors import Exit, PatchpilotError

EPILOG = (
    "Exit codes: 0 done, 1 error, 2 usage, 3 nothing to do, 4 resume later, 5 blocked by pre-flight, 6 lock held, "
    "7 verification failed, 8 aborted. Data goes to standard output, messages to standard error."
)

_TYPER_INTERRUPTED = 130
"""What Typer makes of a KeyboardInterrupt in a command: a return value, not an exception."""

app = typer.Typer(
    name="patchpilot",
    help="Patch the Valkey or Redis cluster under Celery workers live, lose nothing, and prove it.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run", epilog=EPILOG)(run)
app.command("preflight")(preflight)
app.command("plan")(plan)
app.command("status")(status)
for _ask in (approving.approve, asking.pause, asking.resume, asking.stop):
    app.command(_ask.__name__)(_ask)
app.command("recover")(recover)
app.command("report")(report)
app.add_typer(chords.app, name="chords")
app.add_typer(db.app, name="db")
app.add_typer(lab.app, name="lab")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Patch the Valkey or Redis cluster under Celery workers live, lose nothing, and prove it."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run_app(arguments: Sequence[str] | None = None, prog_name: str | None = None) -> int:
    """Run the command line and return its exit code. Never a traceback, unless PATCHPILOT_DEBUG asks for one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        refuse_unreadable(arguments)
        refuse_blanks(arguments)
        outcome = app(arguments, prog_name, standalone_mode=False)
    except PatchpilotError as error:
        say(f"patchpilot: {mask(' '.join(str(error).split()))}")  # one line, whatever was quoted in it
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say("patchpilot: interrupted")
        return int(Exit.RESUME_LATER)
    except BrokenPipeError:
        # Whoever read our output has enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.ERROR)
    except Exception as error:  # noqa: BLE001 - the last line of defence against tracebacks
        return _unexpected(error)
    if outcome == _TYPER_INTERRUPTED:
        say("patchpilot: interrupted")
        return int(Exit.RESUME_LATER)
    return outcome if isinstance(outcome, int) else int(Exit.DONE)


def _unexpected(error: Exception) -> int:
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):  # Typer's own errors: a wrong option, a missing argument
        show()
        return int(Exit.USAGE)
    if os.environ.get("PATCHPILOT_DEBUG"):
        traceback.print_exception(error)
    say(
        f"patchpilot: unexpected {type(error).__name__}: {mask(str(error))} "
        "(a bug; set PATCHPILOT_DEBUG=1 to see where, and report it)"
    )
    return int(Exit.ERROR)
