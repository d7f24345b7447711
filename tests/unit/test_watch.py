"""Continuous recovery: its loop, its health and its metrics, without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from prometheus_client import generate_latest

from patchpilot.cli.monitor import LONGEST, Health, Metrics, address
from patchpilot.clock import FakeClock
from patchpilot.errors import NeedsOperator, Transient, Usage
from patchpilot.recovery import Applied, Finding, Remedy, Sweep
from patchpilot.recovery.inventory import Backlog
from patchpilot.recovery.watch import Audiences, Pass, watch

EVERY = timedelta(seconds=5)
FOUND = Finding("chord", "the-id", "dispatch-lost", Remedy.DISPATCH_CALLBACK, "why", callback="shop.total")
LEFT = Finding("task", "another-id", "unknown", Remedy.NONE, "why")


class Heard:
    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.errors: list[Exception] = []

    def passed(self, done: Pass) -> None:
        self.passes.append(done)

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


def go(*passes: Callable[[], Sweep], clock: FakeClock, heard: Heard) -> list[str]:
    """Watch until there is nothing left to do. Returns when connections were made afresh, by the errors so far."""
    stop, left = threading.Event(), list(passes)
    afresh: list[str] = []

    def look() -> tuple[Sweep, Backlog]:
        todo = left.pop(0)
        if not left:
            stop.set()
        clock.sleep(2)
        return todo(), Backlog(open=1)

    watch(look, EVERY, stop, heard, afresh=lambda: afresh.append(str(heard.errors[-1])), clock=clock)
    return afresh


def fails(error: Exception) -> Callable[[], Sweep]:
    def look() -> Sweep:
        raise error

    return look


def well() -> Sweep:
    return Sweep((), ())


def test_it_goes_on_after_any_failure_and_with_new_connections() -> None:
    clock, heard = FakeClock(), Heard()
    afresh = go(
        fails(Transient("away")), well, fails(NeedsOperator("no tables")), fails(KeyError("bug")), well,
        clock=clock, heard=heard,
    )  # fmt: skip
    assert [len(heard.passes), len(heard.errors)] == [2, 3]
    assert afresh == ["away", "no tables", "'bug'"]
    assert heard.passes[0].seconds == 2
    assert clock.monotonic() == 5 * 2 + 4 * EVERY.total_seconds()  # the last pass is followed by no pause


def test_what_is_set_up_wrong_is_said_at_once() -> None:
    heard = Heard()
    with pytest.raises(NeedsOperator, match="no tables"):
        go(fails(NeedsOperator("no tables")), well, clock=FakeClock(), heard=heard)
    assert heard.errors == []


def test_health_is_the_end_of_the_last_pass() -> None:
    clock = FakeClock()
    health = Health(EVERY, clock)
    assert health.problem == "no pass has ended yet"
    health.passed(Pass(well(), Backlog()))
    assert health.problem is None
    health.failed(Transient("PostgreSQL at postgresql://u:hunter2@h/x is away"))
    assert "is away" in (health.problem or "")
    assert "hunter2" not in (health.problem or "")
    health.passed(Pass(well(), Backlog()))
    clock.sleep((3 * EVERY + LONGEST).total_seconds())
    assert health.problem is None
    clock.sleep(1)
    assert health.problem == "no pass has ended for 76 s"


def test_metrics_tell_what_was_found_and_done_and_name_nobody() -> None:
    clock = FakeClock()
    metrics = Metrics(clock)
    sweep = Sweep((FOUND, LEFT), (Applied.of(FOUND, clock.now()),))
    audience = Audiences(metrics)
    audience.passed(Pass(sweep, Backlog(3, timedelta(minutes=2), 1), 0.5))
    audience.failed(Transient("away"))
    audience.passed(Pass(Sweep((LEFT, FOUND), ()), Backlog(2, timedelta(minutes=1), 0), 0.5))
    text = generate_latest(metrics.registry).decode()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"patchpilot_recovery_{name}", labels)

    assert value("passes_total", outcome="ok") == 2
    assert value("passes_total", outcome="failed") == 1
    assert value("errors_total", error="Transient") == 1
    assert value("findings", kind="chord", diagnosis="dispatch-lost") == 1
    assert value("findings", kind="task", diagnosis="unknown") == 1
    assert value("remedies_total", kind="chord", remedy="dispatch-callback") == 1
    assert [value("open_chords"), value("oldest_open_chord_age_seconds"), value("unrecoverable_chords")] == [2, 60, 0]
    assert value("stuck") == 1
    assert value("last_success_timestamp_seconds") == clock.now().timestamp()
    assert value("pass_seconds_count") == 2
    assert not any(word in text for word in ("the-id", "another-id", "shop.total"))
    audience.passed(Pass(well(), Backlog()))
    assert value("findings", kind="task", diagnosis="unknown") is None


@pytest.mark.parametrize(
    ("text", "meant"), [("127.0.0.1:9090", ("127.0.0.1", 9090)), (":0", ("", 0)), ("[::1]:80", ("::1", 80))]
)
def test_an_address(text: str, meant: tuple[str, int]) -> None:
    assert address(text) == meant


@pytest.mark.parametrize(
    "text", ["9090", "localhost", "localhost:http", "h:65536", "h:-1", "[::1:80", "h:٣", "h:²", ""]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(Usage, match=r"--listen: .* is no address"):
        address(text)
