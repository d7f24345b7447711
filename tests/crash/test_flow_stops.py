"""What stops a run, in the little world: a request, a limit, somebody else; and what is given up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.elasticache.facts import Application, Modification, Unprocessed, UpdateStatus
from patchpilot.engine.journal import Kind
from patchpilot.engine.requests import Ask
from patchpilot.errors import Aborted, Blocked, NeedsOperator, Throttled, Unsafe
from patchpilot.settings import Metric
from tests.crash.flow import MINUTE, Flow, arranged, substance
from tests.crash.killing import Kill, Side
from tests.crash.world import GROUP, NAMES, RUNBOOK, UPDATE, stuck


def stopping(directory: Path, minutes: float, per_node: float = 2) -> Flow:
    flow = Flow(directory)
    flow.world.per_node = per_node * MINUTE
    flow.in_(minutes, lambda: flow.world.ask(Ask.STOP, reason="enough"))
    return flow


def stopped_by_hand(flow: Flow) -> None:
    """A colleague stops the update in the console."""
    flow.world.stop(UPDATE, GROUP)
    flow.world.stops.clear()


@pytest.mark.parametrize("before", [UpdateStatus.NOT_APPLIED, UpdateStatus.SCHEDULED, UpdateStatus.STOPPED])
@pytest.mark.parametrize("minutes", [0.2, 1, 3])
@pytest.mark.parametrize("fails_over", [True, False])
def test_what_somebody_stops_while_the_run_is_dead_is_not_started_again(
    tmp_path: Path, before: str, minutes: float, fails_over: bool
) -> None:
    flow = Flow(tmp_path)
    flow.world.change(update=before)
    flow.world.surprises["applied"] = [Kill("applied")]
    with pytest.raises(Kill):
        flow.run()
    flow.clock.sleep(60 * minutes)
    stopped_by_hand(flow)
    if fails_over:
        flow.world.fail_over(NAMES[2])
    flow.clock.sleep(3600)
    flow.run()
    assert (flow.outcome, len(flow.world.applied), flow.world.stops) == ("aborted", 1, [])
    report = flow.report()
    assert report["abort"]["by"] == "somebody else"
    assert report["abort"]["why"].startswith(f"somebody stopped {UPDATE}")
    assert all(claim["holds"] for claim in report["verification"]["claims"])
    assert [row["to"] for row in report["failovers"]] == ([NAMES[2]] if fails_over else [])
    assert [row["id"] for row in report["remedies"]["after"]] == (["chord-0"] if fails_over else [])


@pytest.mark.parametrize("moment", ["apply", "throttled"])
def test_what_somebody_starts_and_stops_between_two_processes_is_not_started_again(tmp_path: Path, moment: str) -> None:
    """Whether the run had tried already or not."""
    flow = Flow(tmp_path)
    if moment == "throttled":
        flow.world.surprises["apply"] = [Throttled("AWS is throttling us")]
        flow.crash((Kind.ACTED, "trigger"))
    else:
        flow.crash((Kind.INTENDED, "trigger"))
    flow.world.start()
    flow.clock.sleep(60)
    stopped_by_hand(flow)
    flow.clock.sleep(600)
    flow.run()
    assert (flow.outcome, flow.world.applied) == ("aborted", [])


def test_what_somebody_stops_in_the_middle_is_recovered_and_verified(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.in_(3, lambda: stopped_by_hand(flow))
    flow.run()
    assert (flow.outcome, len(flow.world.applied), flow.world.stops) == ("aborted", 1, [])
    assert ("operation-stopped", True) in substance(flow)["claims"]


def test_what_a_colleague_stopped_and_goes_on_with_is_not_stopped_by_this_run(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.in_(3, lambda: stopped_by_hand(flow))
    flow.in_(4, lambda: flow.world.change(status="modifying"))  # so that it does not look at rest
    flow.crash((Kind.INTENDED, "stop"))
    flow.world.change(update=UpdateStatus.IN_PROGRESS)
    rows = {name: replace(row, status=UpdateStatus.COMPLETE) for name, row in flow.world.now.nodes.items()}
    flow.in_(5, lambda: flow.world.change(update=UpdateStatus.COMPLETE, status="available", nodes=rows))
    flow.run()
    assert (flow.outcome, flow.world.stops) == ("aborted", [])


def unlisted(flow: Flow, shown: dict[str, Any]) -> None:
    """From the request on AWS lists nothing; in the end it shows what the request came to."""
    actions = flow.world.update_actions
    flow.world.update_actions = lambda group: (  # type: ignore[method-assign]
        actions(group) if not flow.world.applied or "again" in shown else ()
    )


def test_superseded_while_aws_lists_nothing_it_can_be_given_up(tmp_path: Path) -> None:
    flow, shown = Flow(tmp_path), {}
    unlisted(flow, shown)
    flow.in_(5, lambda: flow.world.change(update=UpdateStatus.NOT_APPLICABLE, status="available"))
    flow.in_(6, lambda: shown.update(again=True))
    assert "patchpilot stop" in flow.refuses(Unsafe)
    flow.world.ask(Ask.STOP)
    flow.run()
    assert (flow.outcome, len(flow.world.applied), flow.world.stops) == ("aborted", 1, [])
    assert flow.report()["update"]["how"] == "requested"
    assert all(claim["holds"] for claim in flow.report()["verification"]["claims"])


def test_what_aws_never_lists_again_can_be_given_up_and_its_failover_is_dealt_with(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    unlisted(flow, {})
    flow.in_(5, lambda: flow.world.ask(Ask.STOP))
    began = flow.clock.now()
    flow.run()
    assert (flow.outcome, len(flow.world.applied), flow.world.stops) == ("aborted", 1, [])
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]
    assert [row["id"] for row in flow.report()["remedies"]["after"]] == ["chord-0"]
    assert flow.clock.now() - began >= 20 * MINUTE  # AWS had ten settling times, and then it was quiet for as long
    assert ("operation-stopped", True) in substance(flow)["claims"]


@pytest.mark.parametrize(
    ("update", "came_to", "words"),
    [
        (UpdateStatus.COMPLETE, "complete", "**Aborted, but complete.**"),
        (UpdateStatus.STOPPED, "stopped", "stopped before it was complete"),
        (UpdateStatus.NOT_APPLICABLE, "not-applicable", "applies no longer"),
        (None, "unknown", "AWS does not show what has become of it"),
    ],
)
def test_the_report_of_a_run_that_was_given_up_says_what_became_of_it(
    tmp_path: Path, update: str | None, came_to: str, words: str
) -> None:
    """AWS lists it again, if it does, only after the run has gone on to its grace."""
    flow, shown = Flow(tmp_path), {}
    unlisted(flow, shown)
    flow.in_(5, lambda: flow.world.ask(Ask.STOP))
    flow.crash((Kind.INTENDED, "grace"))
    if update:
        shown.update(again=True)
        rows = {name: replace(row, status=update) for name, row in flow.world.now.nodes.items()}
        flow.world.change(update=update, nodes=rows, status="available")
    flow.run()
    report, page = flow.report(), next(tmp_path.glob("*/report.md")).read_text()
    assert (flow.outcome, report["abort"]["came_to"], report["abort"]["given_up"]) == ("aborted", came_to, True)
    assert report["update"]["status"] == report["abort"]["status"]
    assert report["abort"]["status"] == (update or None)
    assert {row.get("status") for row in report["nodes"]} == {update}
    assert words in page
    assert "given up, because AWS did not show that it began" in page
    assert ("Nodes in progress were finished" in page) == (update == UpdateStatus.STOPPED)


def test_the_report_of_a_request_that_came_to_nothing_says_that_it_does_not_run(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "node-type")
    flow.world.modify = lambda group, change: flow.world.applied.append(flow.clock.now()) or Application("modifying")  # type: ignore[method-assign, func-returns-value]
    flow.refuses(Unsafe)
    flow.world.ask(Ask.STOP)
    flow.run()
    assert flow.report()["abort"]["came_to"] == "not-begun"
    page = next(tmp_path.glob("*/report.md")).read_text()
    assert "AWS shows that it does not run" in page
    assert "Type before | Type after" in page
    assert "| cache.r7g.large | cache.r7g.large |" in page


def test_stopped_by_a_colleague_while_aws_lists_nothing_it_ends_by_itself(tmp_path: Path) -> None:
    flow, shown = Flow(tmp_path), {}
    unlisted(flow, shown)
    flow.in_(1, lambda: stopped_by_hand(flow))
    flow.in_(8, lambda: shown.update(again=True))
    flow.run()
    assert (flow.outcome, len(flow.world.applied), flow.world.stops) == ("aborted", 1, [])
    assert flow.report()["update"]["how"] == "applied"


@pytest.mark.parametrize("kind", ["engine-upgrade", "node-type", "test-failover"])
def test_a_request_of_any_kind_that_comes_to_nothing_can_be_given_up(tmp_path: Path, kind: str) -> None:
    flow = arranged(tmp_path, kind)
    accepted = Application("modifying")
    flow.world.modify = lambda group, change: flow.world.applied.append(flow.clock.now()) or accepted  # type: ignore[method-assign, func-returns-value]
    flow.world.test_failover = lambda group, node_group: flow.world.modify(group, Modification())  # type: ignore[method-assign]
    assert "patchpilot stop" in flow.refuses(Unsafe)
    flow.world.ask(Ask.STOP)
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("aborted", 1)
    assert flow.report()["abort"]["why"].startswith("stop asked for by ann")


@pytest.mark.parametrize("kind", ["engine-upgrade", "node-type"])
def test_what_makes_the_group_busy_is_not_taken_for_an_interrupted_request_that_never_arrived(
    tmp_path: Path, kind: str
) -> None:
    """AWS updates by itself in that moment, and would have refused it."""
    flow = arranged(tmp_path, kind)
    flow.crash((Kind.ACTING, "trigger"))
    flow.world.start()
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert len(flow.entries("trigger", Kind.ACTING)) == 2


def comes_to_nothing(flow: Flow) -> None:
    """AWS begins, and then nothing more happens: no failover, or no further node."""

    def begin(*_: object) -> Application:
        flow.world.applied.append(flow.clock.now())
        flow.world.happen(GROUP, "Test Failover API called for node group 0001")
        flow.world.change(versions={**flow.world.now.versions, NAMES[2]: "8.1"})
        return Application("modifying")

    flow.world.test_failover = flow.world.modify = begin  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("kind", ["test-failover", "engine-upgrade"])
def test_what_leaves_signs_and_comes_to_nothing_says_how_long_it_waits_and_can_be_given_up(
    tmp_path: Path, kind: str
) -> None:
    flow = arranged(tmp_path, kind)
    comes_to_nothing(flow)
    began = flow.clock.now()
    flow.in_(30, lambda: flow.world.ask(Ask.STOP))  # too early: something may still come of it
    words = flow.refuses(Unsafe)
    assert "has not come to its end within 2h00m" in words
    assert words.count("the group is available") + words.count("group available") == 1
    assert words.endswith("give it up with `patchpilot stop` and run the same command again")
    [until] = {line.partition("waited for until ")[2][:23] for line in flow.said if "waited for until" in line}
    assert until == f"{began + RUNBOOK.stall:%Y-%m-%d %H:%M:%S} UTC"[:23]
    flow.run()
    report = flow.report()
    assert (flow.outcome, len(flow.world.applied), report["abort"]["came_to"]) == ("aborted", 1, "incomplete")
    assert report["failovers"] == []
    assert all(claim["holds"] for claim in report["verification"]["claims"])


def test_a_failover_that_comes_after_all_while_it_is_given_up_is_dealt_with(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "test-failover")
    comes_to_nothing(flow)
    flow.refuses(Unsafe)
    flow.world.ask(Ask.STOP)
    flow.in_(0.5, lambda: flow.world.fail_over(NAMES[1]))
    flow.run()
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]
    assert flow.report()["abort"]["came_to"] == "complete"
    assert [row["id"] for row in flow.report()["remedies"]["after"]] == ["chord-0"]


def test_what_is_still_under_way_is_not_given_up(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "test-failover")
    comes_to_nothing(flow)
    flow.in_(1, lambda: flow.world.change(status="modifying"))
    for _ in range(2):
        words = flow.refuses(Unsafe)
        assert words.endswith("the same command goes on watching")
        flow.world.ask(Ask.STOP)
    assert (flow.outcome, flow.entries("watch", Kind.REACHED)) == ("unfinished", [])


def test_an_update_that_is_not_listed_any_more_after_it_ran_can_be_given_up(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.in_(3, lambda: setattr(flow.world, "update_actions", lambda group: ()))
    flow.in_(4, lambda: flow.world.ask(Ask.STOP))
    began = flow.clock.now()
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("aborted", 1)
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]
    assert flow.clock.now() - began >= RUNBOOK.stall  # it may be unlisted for a while, and go on all the same


def test_a_request_to_stop_stops_the_update_and_goes_on_to_recovery(tmp_path: Path) -> None:
    calm = stopping(tmp_path / "calm", 15, per_node=10)
    count = calm.run().written
    expected = substance(calm)
    assert expected["outcome"] == ("aborted", "aborted")
    assert expected["abort"]
    assert dict(expected["nodes"]) == {NAMES[0]: "stopped", NAMES[1]: "complete", NAMES[2]: "complete"}
    assert ("operation-stopped", True) in expected["claims"]
    assert all(holds for _, holds in expected["claims"])
    assert {state for _, state in expected["phases"]} == {"done"}
    assert calm.report()["abort"]["why"] == "stop asked for by ann on laptop: enough"
    assert len(calm.world.stops) == 1
    for at, side in itertools.product(range(1, count + 1), Side):
        flow = stopping(tmp_path / f"{at}-{side}", 15, per_node=10)
        death = flow.crash(at, side)
        flow.run()
        assert substance(flow) == expected, death
        assert (len(flow.world.applied), len(flow.world.stops)) == (1, 1), death


@pytest.mark.parametrize("moment", ["stop", "stopped"])
def test_killed_around_the_request_to_stop_it_is_stopped_all_the_same(tmp_path: Path, moment: str) -> None:
    flow = stopping(tmp_path, 3)
    flow.world.surprises[moment] = [Kill(moment)]
    with pytest.raises(Kill):
        flow.run()
    flow.run()
    assert (flow.outcome, len(flow.world.stops)) == ("aborted", 1)


def test_asked_to_stop_after_the_failover_its_damage_is_recovered(tmp_path: Path) -> None:
    flow = stopping(tmp_path, 5.5)  # in the middle of the last node
    flow.run()
    assert flow.outcome == "aborted"
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]
    assert [row["id"] for row in flow.report()["remedies"]["after"]] == ["chord-0"]
    assert flow.world.now.update == UpdateStatus.COMPLETE  # the node in progress was the last one


def test_a_failover_while_it_winds_down_begins_the_grace(tmp_path: Path) -> None:
    flow = stopping(tmp_path, 3, per_node=10)
    flow.in_(6, lambda: flow.world.fail_over(NAMES[2]))
    flow.run()
    assert flow.outcome == "aborted"
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[2]]
    (grace,) = flow.entries("grace", Kind.INTENDED)
    assert grace.data["because"] == f"failover to {NAMES[2]}"
    assert flow.entries("stop", Kind.REACHED)[0].data["nodes"][NAMES[1]]["status"] == "complete"


def test_asked_to_stop_before_the_trigger_it_just_ends(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.ask(Ask.STOP)
    assert "before anything was started" in flow.refuses(Aborted)
    assert (flow.outcome, flow.world.applied, flow.world.stops) == ("aborted", [], [])


def test_aws_may_refuse_to_stop_once_and_is_asked_again(tmp_path: Path) -> None:
    flow = stopping(tmp_path, 3, per_node=10)
    flow.in_(2.9, lambda: setattr(flow.world, "unprocessed", Unprocessed("Odd", "not now")))
    flow.in_(4.2, lambda: setattr(flow.world, "unprocessed", None))
    flow.run()
    assert (flow.outcome, len(flow.world.stops)) == ("aborted", 3)


def test_too_many_stuck_chords_stop_the_update(tmp_path: Path) -> None:
    flow = Flow(tmp_path, abort_stuck=2)
    flow.in_(3, lambda: flow.world.stick(*(stuck(f"c{number}") for number in range(3))))
    flow.run()
    assert flow.outcome == "aborted"
    assert flow.report()["abort"]["why"] == "3 chords are stuck, more than runbook.abort_stuck = 2"
    few = Flow(tmp_path / "few", abort_stuck=3)
    few.in_(3, lambda: few.world.stick(*(stuck(f"c{number}") for number in range(3))))
    few.run()
    assert few.outcome == "done"


def test_what_somebody_is_stopping_already_is_not_stopped_for_another_reason(tmp_path: Path) -> None:
    flow = Flow(tmp_path, abort_stuck=0)
    flow.in_(3, lambda: stopped_by_hand(flow))
    flow.in_(3.5, lambda: flow.world.stick(stuck("c1")))
    flow.run()
    assert (flow.outcome, flow.world.stops) == ("aborted", [])
    assert flow.report()["abort"]["by"] == "somebody else"


def test_a_metric_past_its_limit_stops_the_update(tmp_path: Path) -> None:
    metric = Metric(namespace="Shop", name="QueueLength", above=100, points=2)
    flow = Flow(tmp_path, abort_metric=metric)
    flow.in_(3, lambda: flow.world.measure(120, 90))  # one alone may be a blip
    flow.in_(4, lambda: flow.world.measure(130, 120))
    flow.run()
    assert flow.outcome == "aborted"
    assert flow.report()["abort"]["why"] == "Shop QueueLength is above 100: 130, 120"


def test_what_was_measured_before_the_rotation_does_not_stop_it_but_is_told_before(tmp_path: Path) -> None:
    flow = Flow(tmp_path, abort_metric=Metric(namespace="Shop", name="QueueLength", above=100, points=2))
    flow.world.measure(130, 120)
    flow.clock.sleep(1)
    assert "abort-metric: Shop QueueLength is above 100: 130, 120" in flow.refuses(Blocked)
    flow.waivers = {"abort-metric": "they are from a test"}
    flow.run()
    assert (flow.outcome, flow.world.stops) == ("done", [])


def test_a_metric_that_becomes_unreadable_is_told_and_stops_nothing(tmp_path: Path) -> None:
    flow = Flow(tmp_path, abort_metric=Metric(namespace="Shop", name="QueueLength", above=100))
    denied: list[Any] = [NeedsOperator(f"AWS denies access {how_often}") for how_often in ("once", "twice")]
    flow.in_(3, lambda: flow.world.surprises.__setitem__("gauge", denied))
    flow.run()
    assert flow.outcome == "done"
    assert [line for line in flow.said if "a limit is not watched at the moment: AWS denies access" in line]
    limits = [line["status"] for line in flow.report()["timeline"] if line["what"] == "limits"]
    assert limits == ["not watched: AWS denies access once", "watched"]


def test_a_metric_that_may_not_be_read_is_found_out_before_anything_is_touched(tmp_path: Path) -> None:
    flow = Flow(tmp_path, abort_metric=Metric(namespace="Shop", name="QueueLength", above=100))
    flow.world.surprises["gauge"] = [NeedsOperator("AWS denies access")]
    assert flow.refuses(NeedsOperator) == "AWS denies access"
    assert flow.world.applied == []


def test_what_aws_cannot_stop_goes_on(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "engine-upgrade")
    flow.in_(3, lambda: flow.world.ask(Ask.STOP))
    flow.run()
    assert (flow.outcome, flow.world.stops) == ("done", [])


def test_an_update_that_was_superseded_on_the_way_is_given_up_and_recovered_from(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.in_(5, lambda: flow.world.change(update=UpdateStatus.NOT_APPLICABLE, status="available"))
    assert "patchpilot stop" in flow.refuses(Unsafe)
    flow.world.ask(Ask.STOP)
    flow.run()
    assert (flow.outcome, flow.world.stops) == ("aborted", [])


@pytest.mark.parametrize("where", [(Kind.INTENDED, "watch"), (Kind.REACHED, "watch")])
def test_a_clock_of_aws_that_is_behind_ends_no_grace_early(tmp_path: Path, where: tuple[Kind, str]) -> None:
    """Killed before the failover, or before the grace, and back when the event alone tells when the failover was."""
    flow = Flow(tmp_path, grace=timedelta(minutes=10))
    flow.world.behind = timedelta(minutes=4)
    moved: list[Any] = []
    flow.world.after(timedelta(minutes=4.6), lambda: moved.append(flow.clock.now()))
    flow.crash(where)
    flow.clock.sleep(300)
    flow.run()
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]
    assert flow.entries("recover", Kind.ACTING)[0].at - moved[0] >= timedelta(minutes=9.75)
