"""What `make celery-suite` makes of the reports that pytest wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.celery_suite.outcomes import (
    Outcome,
    Result,
    amend,
    differences,
    failures,
    from_json,
    read,
    summary,
    to_json,
)
from tests.celery_suite.scratch import let_run, requirements


def report(name: str, outcome: str, when: str = "call", **more: Any) -> str:
    return json.dumps({"$report_type": "TestReport", "nodeid": name, "when": when, "outcome": outcome, **more})


def test_the_worst_report_of_a_test_counts() -> None:
    crash = {"reprcrash": {"message": "AssertionError: assert 1 == 2\n  more"}}
    log = [
        json.dumps({"pytest_version": "9", "$report_type": "SessionStart"}),
        report("good", "passed", "setup"), report("good", "passed"), report("good", "passed", "teardown"),
        report("bad", "passed", "setup"), report("bad", "failed", longrepr=crash), report("bad", "passed", "teardown"),
        report("untidy", "passed"), report("untidy", "failed", "teardown", longrepr="a\nb"),
        report("skipped", "skipped", longrepr=["file", 7, "Skipped: why"]),
        report("expected", "skipped", wasxfail="reason"), report("unexpected", "passed", wasxfail="reason"),
        report("parts", "passed"), report("parts", "failed", longrepr=crash), report("parts", "passed", "teardown"),
        '{"nodeid": "cut o',
    ]  # fmt: skip
    assert read(log) == {
        "good": Result(Outcome.PASSED),
        "bad": Result(Outcome.FAILED, "AssertionError: assert 1 == 2"),
        "untidy": Result(Outcome.ERROR, "b"),
        "skipped": Result(Outcome.SKIPPED, "Skipped: why"),
        "expected": Result(Outcome.XFAILED),
        "unexpected": Result(Outcome.XPASSED),
        "parts": Result(Outcome.FAILED, "AssertionError: assert 1 == 2"),
    }


def test_what_a_rerun_by_celerys_own_mark_replaces_is_counted() -> None:
    log = [report("shaky", "passed", "setup"), report("shaky", "rerun"), report("shaky", "rerun")]
    assert read([*log, report("shaky", "passed")]) == {"shaky": Result(Outcome.PASSED, reruns=2)}
    assert read([*log, report("shaky", "failed")]) == {"shaky": Result(Outcome.FAILED, reruns=2)}


def test_a_second_session_counts_for_what_failed_and_is_told() -> None:
    first = {"a": Result(Outcome.PASSED), "b": Result(Outcome.FAILED), "c": Result(Outcome.ERROR)}
    assert failures(first) == ["b", "c"]
    amended = amend(first, {"b": Result(Outcome.PASSED)})
    assert amended == {
        "a": Result(Outcome.PASSED),
        "b": Result(Outcome.PASSED, before=Outcome.FAILED),
        "c": Result(Outcome.NOT_RUN, before=Outcome.ERROR),
    }
    assert str(amended["b"]) == "passed (first session: failed)"
    assert summary(amended) == "2 passed, 1 not run"
    assert from_json(to_json(amended)) == amended


def test_differences_by_name() -> None:
    passed, failed, skipped = Result(Outcome.PASSED), Result(Outcome.FAILED), Result(Outcome.SKIPPED)
    shaky, expected = Result(Outcome.PASSED, reruns=1), Result(Outcome.XFAILED)
    stock = {"same": passed, "lost": passed, "skips": passed, "won": failed, "gone": passed, "shaky": passed}
    ours = {"same": passed, "lost": failed, "skips": skipped, "won": passed, "new": expected, "shaky": shaky}
    found = differences(stock, ours)
    assert [difference.name for difference in found] == ["lost", "skips", "won", "gone", "shaky", "new"]
    assert [difference.name for difference in found if difference.lost] == ["lost", "skips", "gone"]


def test_a_test_for_redis_runs_on_ours_too() -> None:
    code, count = let_run("if not manager.app.conf.result_backend.startswith(('redis', 'rpc')): raise skip")
    assert count == 1
    for backend, runs in (("redis://", True), ("patchpilot+redis://", True), ("rpc://", True), ("cache://", False)):
        condition = code.partition(" not ")[2].partition(": raise")[0].removeprefix("manager.app.conf.")
        assert eval(condition, {"result_backend": backend}) is runs  # noqa: S307 - our own few words
    assert let_run("broker_url.startswith('redis')") == ("broker_url.startswith('redis')", 0)


def test_only_what_is_needed_of_the_requirements(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("pytest==9.1.1\npytest-celery[all]>=1.3.0\n-r extras/pydantic.txt\n")
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "pydantic.txt").write_text("pydantic==2.14.1\n")
    assert requirements(tmp_path) == ["pydantic==2.14.1", "pytest==9.1.1"]
