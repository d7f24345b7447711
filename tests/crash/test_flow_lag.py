"""A failover just before the run, which AWS shows late: it is no part of the run, and proves nothing of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from patchpilot.engine.journal import Kind
from patchpilot.errors import NothingToDo, Transient, Unsafe
from patchpilot.phases.sight import look_around
from tests.crash.flow import ORDERS, Flow, arranged
from tests.crash.killing import Kill
from tests.crash.world import NAMES


def silent(flow: Flow) -> Flow:
    """No node can be asked, and AWS tells of no failover."""
    flow.world.surprises |= {f"{name}.test": [Transient("silent")] * 2000 for name in NAMES}
    flow.world.tells_of_failovers = False
    return flow


def lagging(flow: Flow) -> Flow:
    """There was a failover a moment ago, and AWS shows it a minute late: its roles and its event."""
    flow.world.fail_over(NAMES[2])
    flow.world.stale = 60
    flow.clock.sleep(5)
    return flow


@pytest.mark.parametrize("silent", [False, True])
def test_what_aws_shows_late_is_no_proof_of_a_test_failover_that_never_happened(tmp_path: Path, silent: bool) -> None:
    flow = lagging(arranged(tmp_path, "test-failover"))
    flow.world.surprises["apply"] = [Transient("AWS answers 503")] * 100
    if silent:
        flow.world.surprises |= {f"{name}.test": [Transient("silent")] * 2000 for name in NAMES}
    assert "AWS shows nothing of it" in flow.refuses(Unsafe)
    assert flow.world.applied == []
    flow.world.surprises.clear()
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]


def test_the_nodes_word_proves_a_test_failover_back_to_whom_aws_still_showed(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "test-failover")
    flow.world.tells_of_failovers = False
    flow.world.change(primary=NAMES[1])
    flow.clock.sleep(300)
    lagging(flow).run()
    assert (flow.outcome, [row["to"] for row in flow.report()["failovers"]]) == ("done", [NAMES[1]])


@pytest.mark.parametrize("kind", ["test-failover", "engine-upgrade", "service-update"])
def test_the_failover_before_the_run_is_not_listed_as_one_of_it(tmp_path: Path, kind: str) -> None:
    flow = lagging(arranged(tmp_path, kind))
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]


def test_a_failover_before_it_is_not_what_is_observed(tmp_path: Path) -> None:
    flow = lagging(Flow(tmp_path, ORDERS["observe"], observe=timedelta(minutes=30)))
    assert "nothing began" in flow.refuses(NothingToDo)


@pytest.mark.parametrize("kind", ["test-failover", "engine-upgrade", "service-update"])
def test_where_only_aws_shows_roles_an_old_failover_is_not_taken_for_one_of_the_run(tmp_path: Path, kind: str) -> None:
    """Its event never comes, and no node can be asked."""
    flow = lagging(silent(arranged(tmp_path, kind)))
    flow.clock.sleep(40)  # it is shown in the first minute of the run
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert flow.entries("trigger", Kind.REACHED)[0].data["how"] == "applied"
    assert [(row["old"], row["to"]) for row in flow.report()["failovers"]] == [(NAMES[2], NAMES[1])]


def test_where_only_aws_shows_roles_an_old_failover_is_not_observed_and_a_new_one_is(tmp_path: Path) -> None:
    flow = lagging(silent(Flow(tmp_path, ORDERS["observe"], observe=timedelta(minutes=30))))
    flow.clock.sleep(40)
    assert "nothing began" in flow.refuses(NothingToDo)
    flow = silent(Flow(tmp_path / "new", ORDERS["observe"]))
    flow.in_(5, lambda: flow.world.fail_over(NAMES[2]))
    flow.run()
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[2]]


@pytest.mark.parametrize("ahead", [-4, -1, 1, 4])
@pytest.mark.parametrize("kind", list(ORDERS))
def test_the_clock_of_aws_may_be_another_one(tmp_path: Path, kind: str, ahead: float) -> None:
    """It dates events: nothing concludes early, no failover counts twice, and one of before not at all."""
    flow = arranged(tmp_path, kind)
    flow.world.behind = timedelta(minutes=-ahead)
    lagging(flow)
    moved: list[datetime] = []
    fail_over = flow.world.fail_over
    flow.world.fail_over = lambda new: (moved.append(flow.clock.now()), fail_over(new))[1]  # type: ignore[method-assign, func-returns-value]
    flow.run()
    assert flow.outcome == "done"
    assert len(flow.world.applied) == (0 if kind == "observe" else 1)
    [failover] = flow.report()["failovers"]
    assert failover["to"] == NAMES[1]
    assert abs(datetime.fromisoformat(failover["at"]) - moved[0]) <= timedelta(minutes=1)  # by our clock
    assert flow.entries("watch", Kind.REACHED)[0].at >= moved[0] + flow.world.per_node
    assert flow.entries("dry-run", Kind.REACHED)[0].at >= moved[0] + flow.rules.grace


@pytest.mark.parametrize("ahead", [-4, 4])
def test_a_late_event_of_another_clock_is_no_proof_of_a_test_failover_that_never_happened(
    tmp_path: Path, ahead: float
) -> None:
    flow = arranged(tmp_path, "test-failover")
    flow.world.behind = timedelta(minutes=-ahead)
    lagging(flow).world.surprises["apply"] = [Transient("AWS answers 503")] * 100
    assert "AWS shows nothing of it" in flow.refuses(Unsafe)
    assert flow.world.applied == []


def test_whoever_takes_a_run_up_with_a_clock_that_is_ahead_waits_no_less_before_a_second_request(
    tmp_path: Path,
) -> None:
    """The host of the first process dated the request two minutes ago; AWS has had five seconds to show it."""
    flow = Flow(tmp_path)
    flow.world.surprises["applied"] = [Kill("applied")]
    with pytest.raises(Kill):
        flow.run()
    flow.world.stale = 170
    flow.clock.sleep(120)  # for AWS it is a moment
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


def test_an_event_that_a_clock_of_aws_dates_ahead_is_seen_at_once(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "test-failover")
    flow.world.behind = timedelta(minutes=-4)
    flow.world.fail_over(NAMES[2])
    now = flow.clock.now()
    assert len(look_around(flow.desk(), now, since=now).events) == 2


def test_what_began_by_a_clock_that_is_ahead_before_anybody_looked_has_its_failover(tmp_path: Path) -> None:
    flow = Flow(tmp_path, ORDERS["observe"])
    flow.world.behind = timedelta(minutes=-4)
    flow.crash((Kind.INTENDED, "trigger"))
    flow.in_(5, lambda: flow.world.happen(NAMES[1], "Recovering cache nodes 0001"))
    flow.in_(6, lambda: flow.world.fail_over(NAMES[1]))
    flow.clock.sleep(360)
    moved = flow.clock.now()
    flow.clock.sleep(60)
    flow.run()
    [failover] = flow.report()["failovers"]
    assert (failover["told_by"], failover["at"]) == ("events", moved.isoformat())


@pytest.mark.parametrize("asked", [True, False], ids=["nodes that answer", "silent nodes"])
@pytest.mark.parametrize("behind", [-4, 4])
def test_events_may_have_a_clock_of_their_own(tmp_path: Path, behind: float, asked: bool) -> None:
    """Another one than that by which AWS answers: nothing tells how far it is off, but what the roles show."""
    flow = Flow(tmp_path, grace=timedelta(minutes=10))
    flow.world.dates_behind = timedelta(minutes=behind)
    if not asked:
        silent(flow).world.tells_of_failovers = True
    moved: list[datetime] = []
    fail_over = flow.world.fail_over
    flow.world.fail_over = lambda new: (moved.append(flow.clock.now()), fail_over(new))[1]  # type: ignore[method-assign, func-returns-value]
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]
    assert flow.entries("dry-run", Kind.REACHED)[0].at >= moved[0] + flow.rules.grace
