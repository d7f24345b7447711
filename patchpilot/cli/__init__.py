"""The command line: parse, call, render. No logic."""

from __future__ import annotations

import sys


def main() -> None:
    """The ``patchpilot`` command."""
    try:
        from patchpilot.cli.app import run_app
    except ModuleNotFoundError as error:
        sys.exit(
            f"patchpilot: {error.name} is missing: install the command line with `pip install 'patchpilot[pilot]'`"
        )
    sys.exit(run_app())
