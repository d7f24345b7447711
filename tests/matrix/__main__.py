"""Run the backend's own tests over Pythons, Celerys and servers, and print a table.

Each pair of a Python and a Celery gets a virtual environment of its own, in which pip chooses kombu and redis-py. The
first Python meets every server. The others meet the first server only, because a server does not care which Python
asks; --every runs all combinations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from patchpilot.cli.console import emit, emit_table, say
from patchpilot.errors import PatchpilotError, Usage
from tests.matrix.cell import ROOT, Bench, Cell, Outcome
from tests.matrix.finding import WHEEL, Server, fetched, missing, python, server, servers

PYTHONS = ("3.11", "3.12", "3.13")
CELERYS = ("5.4", "5.5", "5.6", "5.7")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    pythons = {version: python(version) for version in options.python or PYTHONS}
    absent = [f"Python {version}" for version, interpreter in pythons.items() if interpreter is None]
    try:
        if options.python and absent:
            raise Usage(f"not found: {', '.join(absent)}")
        chosen = [server(name) for name in options.server] if options.server else every_server(options.scratch)
    except PatchpilotError as error:
        say(f"matrix: {error}")
        return 2
    if not options.server:
        absent += missing(chosen)
    say(f"servers: {', '.join(f'{it.name} ({it.program.name})' for it in chosen)}")
    say(f"not found, and not tested: {', '.join(absent) or 'nothing'}")
    cells = combine({key: path for key, path in pythons.items() if path}, options.celery, chosen, every=options.every)
    if options.list:
        emit("\n".join(map(str, cells)))
        return 0
    return run(cells, Bench(options.scratch.absolute(), options.extra, options.pytest), absent)


def every_server(scratch: Path) -> list[Server]:
    """Those that are here, and from wheels those that are not."""
    here = servers()
    return here + [it for wanted in missing(here) if (it := fetched(wanted, scratch.absolute() / "servers"))]


def combine(
    pythons: Mapping[str, Path], celerys: Sequence[str], chosen: Sequence[Server], *, every: bool
) -> list[Cell]:
    """The cells to run: all combinations, or only those that say something new."""
    return [
        Cell(version, path, celery, it)
        for place, (version, path) in enumerate(pythons.items())
        for celery in celerys
        for it in (chosen if every or place == 0 else chosen[:1])
    ]


def run(cells: Sequence[Cell], bench: Bench, absent: Sequence[str] = ()) -> int:
    """Run the cells one after the other and print the table. Returns the exit code."""
    rows: list[tuple[object, ...]] = []
    bad = 0
    for number, cell in enumerate(cells, 1):
        say(f"[{number}/{len(cells)}] {cell} ...")
        outcome = bench.run(cell)
        bad += bool(outcome.problem)
        say(outcome.problem or f"  {outcome.passed} passed")
        rows.append(_row(cell, outcome))
    emit_table(("python", "server", "celery / kombu / redis-py", "passed", "failed", "skipped", "seconds", ""), rows)
    emit(
        f"{len(cells) - bad} of {len(cells)} cells passed; not found, and not tested: {', '.join(absent) or 'nothing'}"
    )
    return 1 if bad or not cells else 0


def _row(cell: Cell, it: Outcome) -> tuple[object, ...]:
    versions = cell.celery if it.versions == "-" else it.versions
    verdict = "FAILED" if it.problem else "ok"
    return (cell.python, cell.server.name, versions, it.passed, it.failed, it.skipped, round(it.seconds), verdict)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make matrix", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", nargs="+", metavar="3.X", help="only these; each must be there")
    parser.add_argument(
        "--celery", nargs="+", metavar="5.X", default=CELERYS, help="only these; 5.6 is its newest release, or 5.6.1"
    )
    parser.add_argument(
        "--server", nargs="+", metavar="PROGRAM",
        help=f"only these: paths or names, or {WHEEL!r}; otherwise the wheel's, the one that PATCHPILOT_LAB_SERVER\n"
        "names, redis-server and valkey-server if they are on the path, and for what is missing then other wheels",
    )  # fmt: skip
    parser.add_argument("--with", dest="extra", action="append", default=[], metavar="REQUIREMENT",
                        help="install this as well, like 'kombu==5.4.*'; may be repeated")  # fmt: skip
    parser.add_argument("--every", action="store_true", help="every Python with every server")
    parser.add_argument("--list", action="store_true", help="print the cells and run nothing")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / ".matrix", help="where environments, servers and logs go"
    )
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
