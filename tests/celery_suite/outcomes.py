"""What became of each test, and in what two sides differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """What became of a test, from good to bad: of several reports about one test the worst counts."""

    PASSED = "passed"
    SKIPPED = "skipped"
    XPASSED = "xpassed"
    XFAILED = "xfailed"
    FAILED = "failed"
    ERROR = "error"
    NOT_RUN = "not run"


_BADNESS = {outcome: badness for badness, outcome in enumerate(Outcome)}


@dataclass(frozen=True, slots=True)
class Result:
    """One test on one side."""

    outcome: Outcome
    reason: str = ""
    """Of anything but a pass: its first line."""
    reruns: int = 0
    """How often Celery's own `flaky` mark ran it again, in the session that counts."""
    before: Outcome | None = None
    """What became of it in the first session, if it was given a second one."""

    @property
    def passes(self) -> bool:
        return self.outcome in (Outcome.PASSED, Outcome.XPASSED)

    @property
    def fails(self) -> bool:
        return self.outcome in (Outcome.FAILED, Outcome.ERROR)

    def __str__(self) -> str:
        notes = [f"{self.reruns} reruns by Celery's own mark"] if self.reruns else []
        notes += [f"first session: {self.before}"] if self.before else []
        return f"{self.outcome} ({', '.join(notes)})" if notes else str(self.outcome)


Results = Mapping[str, Result]
"""What became of each test, by its name, in the order in which they ran."""

_NOT_RUN = Result(Outcome.NOT_RUN)


@dataclass(frozen=True, slots=True)
class Difference:
    """A test that went another way with our backend than with stock Redis."""

    name: str
    stock: Result
    ours: Result

    @property
    def lost(self) -> bool:
        """It passes with stock Redis and does not with ours."""
        return self.stock.passes and not self.ours.passes


def read(log: Iterable[str]) -> dict[str, Result]:
    """The results in a log of pytest-reportlog, which may have been cut off."""
    results: dict[str, Result] = {}
    for report in _reports(log):
        name = report["nodeid"]
        known = results.get(name, Result(Outcome.PASSED))
        if report["outcome"] == "rerun":
            results[name] = Result(Outcome.PASSED, reruns=known.reruns + 1)
            continue
        found = Result(_outcome(report), _reason(report.get("longrepr")), known.reruns)
        results[name] = max(known, found, key=lambda result: _BADNESS[result.outcome])
    return results


def failures(results: Results) -> list[str]:
    """The names of the tests that failed."""
    return [name for name, result in results.items() if result.fails]


def amend(first: Results, second: Results) -> dict[str, Result]:
    """The results after those that failed were given a second session, which counts."""
    return {
        name: replace(second.get(name, _NOT_RUN), before=result.outcome) if result.fails else result
        for name, result in first.items()
    }


def differences(stock: Results, ours: Results) -> list[Difference]:
    """Every test that did not go the same way, tests that one side did not run among them."""
    names = dict.fromkeys([*stock, *ours])
    pairs = [Difference(name, stock.get(name, _NOT_RUN), ours.get(name, _NOT_RUN)) for name in names]
    return [pair for pair in pairs if _way(pair.stock) != _way(pair.ours)]


def summary(results: Results) -> str:
    """How many went which way, in words."""
    counted = [(outcome, sum(result.outcome is outcome for result in results.values())) for outcome in Outcome]
    return ", ".join(f"{number} {outcome}" for outcome, number in counted if number) or "no tests"


def to_json(results: Results) -> str:
    """Results as text, for :func:`from_json`."""
    return json.dumps({name: asdict(result) for name, result in results.items()}, indent=1)


def from_json(text: str) -> dict[str, Result]:
    """Results as :func:`to_json` wrote them."""
    return {
        name: Result(**{**row, "outcome": Outcome(row["outcome"]), "before": row["before"] and Outcome(row["before"])})
        for name, row in json.loads(text).items()
    }


def _reports(log: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in log:
        try:
            report = json.loads(line)
        except ValueError:  # the last line of a session that was killed
            continue
        if "outcome" in report and report.get("when"):
            yield report


def _outcome(report: Mapping[str, Any]) -> Outcome:
    match report["outcome"], "wasxfail" in report:
        case "passed", expected:
            return Outcome.XPASSED if expected else Outcome.PASSED
        case "skipped", expected:
            return Outcome.XFAILED if expected else Outcome.SKIPPED
    return Outcome.FAILED if report["when"] == "call" else Outcome.ERROR


def _reason(longrepr: Any) -> str:
    match longrepr:
        case {"reprcrash": {"message": str(text)}}:
            return text.strip().partition("\n")[0]
        case [_, _, text]:
            return str(text)
    return str(longrepr or "").strip().rpartition("\n")[2]


def _way(result: Result) -> tuple[Outcome, bool]:
    return result.outcome, bool(result.reruns)
