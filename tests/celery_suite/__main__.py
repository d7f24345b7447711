"""Run Celery's own integration tests on stock Redis and on our backend, and compare what became of each, by name.

The two sides run one after the other: side by side they would take each other's time, and many of the tests are timed.
Each of Celery's modules has a session of its own, with a worker and a Valkey of its own. Whatever fails gets a second
session, on both sides alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from patchpilot.errors import Exit, PatchpilotError, Usage
from patchpilot.lab.roster import Roster
from patchpilot.lab.watchdog import Watchdog
from tests.celery_suite import outcomes
from tests.celery_suite.outcomes import Difference, Result, Results
from tests.celery_suite.scratch import Scratch
from tests.celery_suite.sides import MODULES, OURS, STOCK, Bench, Side

_FOLDER = "t/integration/"


def main() -> int:
    """Do what the command line says. The exit code is 7 if a test is lost."""
    arguments = _arguments()
    try:
        return _run(arguments)
    except PatchpilotError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; everything it started is stopped")
        return Exit.RESUME_LATER


def _run(arguments: argparse.Namespace) -> Exit:
    scratch = Scratch(arguments.scratch, arguments.celery)
    directory = scratch.run_directory()
    _say(f"fetching Celery {scratch.version} and what its tests need; logs go to {directory}")
    suite, site = scratch.unpack(directory), directory / "site"
    scratch.install(suite, site)
    roster = Roster(directory / "roster.json")
    with ExitStack() as cleanup:
        cleanup.callback(roster.clean)
        cleanup.enter_context(Watchdog(roster))
        bench = Bench(scratch.python, suite, site, roster, arguments.counting)
        wanted = [side for side in (STOCK, OURS) if arguments.side in (None, side.name)]
        results = [_results(bench, side, directory, scratch, arguments) for side in wanted]
    code = _compare(*results) if len(results) == 2 else _judge(wanted[0], results[0])
    _show(f"logs: {directory}")
    return code


def _results(
    bench: Bench, side: Side, directory: Path, scratch: Scratch, arguments: argparse.Namespace
) -> dict[str, Result]:
    """One side's results: fresh, or with stock Redis those of an earlier run, if wanted."""
    kept = scratch.stock_results
    keep = arguments.reuse and side is STOCK and not arguments.k
    if keep and kept.exists():
        _say(f"{side.title}: the results of an earlier run, from {kept}")
        return outcomes.from_json(kept.read_text(encoding="utf-8"))
    results = _sessions(bench, side, directory, arguments.k)
    if keep:
        kept.write_text(outcomes.to_json(results), encoding="utf-8")
    return results


def _sessions(bench: Bench, side: Side, directory: Path, expression: str | None) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for module in MODULES:
        log = directory / f"{side.name}-{Path(module).stem}"
        _say(f"{side.title}: {_short(module)}; follow it in {log}/pytest.log")
        first = bench.run(side, log, [module, *(["-k", expression] if expression else [])])
        _say(f"{side.title}: {_short(module)}: {outcomes.summary(first)}")
        if failed := outcomes.failures(first):
            _say(f"{side.title}: a second session for what failed")
            first = outcomes.amend(first, bench.run(side, log.with_name(f"{log.name}-again"), failed))
            _say(f"{side.title}: {_short(module)}: {outcomes.summary(first)}")
        results |= first
    if not results:
        raise Usage(f"no test matches {expression!r}")
    return results


def _judge(side: Side, results: Results) -> Exit:
    failed = outcomes.failures(results)
    for name in failed:
        _show(f"{_short(name)}: {results[name]}: {results[name].reason}")
    _show(f"{side.title}: {outcomes.summary(results)}")
    return Exit.VERIFICATION_FAILED if failed else Exit.DONE


def _compare(stock: Results, ours: Results) -> Exit:
    found = outcomes.differences(stock, ours)
    if found:
        _table([("", "test", STOCK.title, OURS.title), *map(_row, found)])
    for difference in found:
        _show(f"{_short(difference.name)}: {difference.ours.reason or difference.stock.reason or 'no reason given'}")
    for side, results in ((STOCK, stock), (OURS, ours)):
        again = sum(result.before is not None for result in results.values())
        _show(f"{side.title}: {outcomes.summary(results)}; {again} of these in a second session")
    lost = sum(difference.lost for difference in found)
    _show(f"{len(found)} differences among {len(ours)} tests; {lost} that pass with {STOCK.title} are lost")
    return Exit.VERIFICATION_FAILED if lost else Exit.DONE


def _row(difference: Difference) -> tuple[str, ...]:
    mark = "LOST" if difference.lost else ""
    return mark, _short(difference.name), str(difference.stock), str(difference.ours)


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _short(name: str) -> str:
    return name.removeprefix(_FOLDER)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make celery-suite ARGS=...", description=__doc__)
    parser.add_argument("-k", metavar="EXPRESSION", help="only the tests that match, as for pytest")
    parser.add_argument("--side", choices=[STOCK.name, OURS.name], help="run one side only and compare nothing")
    parser.add_argument(
        "--reuse", action="store_true", help="keep the results of a whole run with stock Redis, or use those kept"
    )
    parser.add_argument(
        "--counting", choices=("postgres", "valkey"), default="postgres",
        help="where our backend counts the parts of chords [default: %(default)s]",
    )  # fmt: skip
    parser.add_argument("--celery", metavar="VERSION", default="5.7.0", help="of Celery [default: %(default)s]")
    parser.add_argument("--scratch", metavar="DIR", type=Path, help="the scratch folder [default: one in /tmp or so]")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _show(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
