"""Every kind of operation, plans, approvals and pauses, in the little world: crashed at every entry."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from patchpilot.elasticache.facts import Modification, Unprocessed
from patchpilot.engine.journal import Kind
from patchpilot.engine.requests import Ask
from patchpilot.errors import (
    Aborted,
    Blocked,
    NeedsOperator,
    NothingToDo,
    PatchpilotError,
    Throttled,
    Transient,
    Unsafe,
    VerificationFailed,
)
from patchpilot.phases.order import Kind as Do
from patchpilot.phases.order import Order
from patchpilot.postgres.journal import Run
from patchpilot.recovery.findings import Remedy
from patchpilot.report import build, markdown
from tests.crash.flow import ORDERS, Flow, arranged, substance
from tests.crash.killing import Kill, Side
from tests.crash.world import GROUP, NAMES, RUNBOOK, UPDATE, stuck


@pytest.mark.parametrize("kind", list(ORDERS)[1:])
def test_each_kind_crashed_at_every_entry_ends_in_the_same_state_and_is_started_once(tmp_path: Path, kind: str) -> None:
    calm = arranged(tmp_path / "calm", kind)
    count = calm.run().written
    expected = substance(calm)
    assert expected["outcome"] == ("done", "done")
    assert expected["failovers"] == [(NAMES[0], NAMES[1])]
    assert all(holds for _, holds in expected["claims"])
    assert ("operation-complete", True) in expected["claims"]
    assert len(calm.world.applied) == (0 if kind == "observe" else 1)
    for at, side in itertools.product(range(1, count + 1), Side):
        flow = arranged(tmp_path / f"{at}-{side}", kind)
        death = flow.crash(at, side)
        flow.run()
        assert substance(flow) == expected, death
        assert len(flow.world.applied) == len(calm.world.applied), death


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("engine-upgrade", ["Version before | Version after", "| valkey 8.0.1 | valkey 8.1 |"]),
        ("node-type", ["Type before | Type after", "| cache.r7g.large | cache.r7g.xlarge |"]),
        ("service-update", ["Version before | Version after", "| valkey 8.0.1 | valkey 8.0.1 |"]),
    ],
)
def test_the_report_shows_of_each_node_what_the_operation_is_about(
    tmp_path: Path, kind: str, shown: list[str], proven: bool
) -> None:
    """Before and after; also if it could not be proven good."""
    flow = arranged(tmp_path, kind)
    if not proven:
        flow.in_(1, lambda: flow.world.stick(stuck("odd", Remedy.NONE)))
        flow.refuses(VerificationFailed)
        page = markdown(build(flow.journal.entries(), Run("run", "test", "broker", flow.clock.now())))
    else:
        flow.run()
        page = next(tmp_path.glob("*/report.md")).read_text()
    section = page.partition("## Nodes")[2].partition("##")[0]
    assert [section.count(each) for each in shown] == [1, 3]
    assert ("Type" in section) == (kind == "node-type")
    assert ("Version" in section) == (kind != "node-type")


@pytest.mark.parametrize("kind", ["engine-upgrade", "node-type", "test-failover"])
@pytest.mark.parametrize("moment", ["apply", "applied"])
def test_killed_around_the_request_it_is_made_once(tmp_path: Path, kind: str, moment: str) -> None:
    flow = arranged(tmp_path, kind)
    flow.world.surprises[moment] = [Kill(moment)]
    with pytest.raises(Kill):
        flow.run()
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


@pytest.mark.parametrize("kind", ["engine-upgrade", "node-type"])
def test_what_every_node_has_is_nothing_to_do(tmp_path: Path, kind: str) -> None:
    flow = arranged(tmp_path, kind)
    flow.world.change(versions=dict.fromkeys(NAMES, "8.1.0"), node_type="cache.r7g.xlarge")
    assert "has it already" in flow.refuses(NothingToDo)
    assert flow.world.applied == []


@pytest.mark.parametrize(
    ("order", "error", "words"),
    [
        (Order(Do.ENGINE_UPGRADE, engine_version="7.2"), Blocked, "cannot be downgraded"),
        (Order(Do.ENGINE_UPGRADE, engine="redis", engine_version="7.1"), Blocked, "cannot go back"),
        (Order(Do.NODE_TYPE, node_type="cache.t0.nano"), Blocked, "it allows: cache.r7g.large, cache.r7g.xlarge"),
        (Order(Do.OBSERVE, update="elsewhere"), NeedsOperator, f"listed: {UPDATE}"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, order: Order, error: type[PatchpilotError], words: str) -> None:
    flow = Flow(tmp_path, order)
    assert words in flow.refuses(error)
    assert flow.world.applied == []


def test_a_modification_is_not_asked_for_while_another_one_is_pending(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "engine-upgrade")
    # It appears between pre-flight, which would have seen it, and the request, which would apply it as well.
    nodes = flow.world.nodes
    looks = itertools.count()
    flow.world.nodes = lambda group: tuple(  # type: ignore[method-assign]
        replace(node, pending=("CacheNodeType",) if next(looks) >= 6 else ()) for node in nodes(group)
    )
    assert "would apply it as well" in flow.refuses(NeedsOperator)
    assert flow.world.applied == []


def test_an_upgrade_that_a_colleague_has_begun_is_adopted(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "engine-upgrade")
    flow.world.modify(GROUP, Modification(engine_version="8.1"))
    flow.clock.sleep(200)  # the first node has it
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert flow.entries("trigger", Kind.REACHED)[0].data["how"] == "adopted"


def test_an_upgrade_that_was_broken_off_half_way_is_finished(tmp_path: Path) -> None:
    """One node has it already, and nothing is under way: that is no trace of an upgrade that runs."""
    flow = arranged(tmp_path, "engine-upgrade")
    flow.world.change(versions={**flow.world.now.versions, NAMES[1]: "8.1"})
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


def test_the_failover_of_a_minute_ago_is_not_the_one_of_this_game_day(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "test-failover")
    flow.world.fail_over(NAMES[2])
    flow.clock.sleep(60)
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert flow.entries("trigger", Kind.REACHED)[0].data["how"] == "applied"
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]


@pytest.mark.parametrize("back_after", [2.5, 4])
@pytest.mark.parametrize("silent", [True, False])
def test_a_game_day_that_ends_where_it_began_is_over_all_the_same(
    tmp_path: Path, silent: bool, back_after: float
) -> None:
    """One more failover, back to the old primary, before the watch is over or in the grace; no event tells of any."""
    flow = Flow(tmp_path, ORDERS["test-failover"], grace=timedelta(minutes=3))
    flow.world.tells_of_failovers = False
    if silent:
        flow.world.surprises |= {f"{name}.test": [Transient("silent")] * 2000 for name in NAMES}
    back_after += 1 if silent else 0  # what only AWS shows has to be sure before the request
    flow.in_(back_after, lambda: flow.world.fail_over(NAMES[0]))
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    if not silent:  # AWS's roles may be old ones: what is back at once is not believed
        assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1], NAMES[0]]


def test_nothing_to_observe_is_nothing_to_do(tmp_path: Path) -> None:
    flow = Flow(tmp_path, ORDERS["observe"], observe=timedelta(minutes=30))
    began = flow.clock.now()
    assert flow.refuses(NothingToDo) == "nothing began within 30m00s"
    assert flow.clock.now() - began >= timedelta(minutes=30)


def test_what_is_only_observed_is_not_refused(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "observe")
    flow.world.group_changes = {"multi_az": "disabled", "automatic_failover": "disabled"}
    flow.run()
    assert flow.outcome == "done"
    checks = {check["name"]: check for check in flow.report()["preflight"]["checks"]}
    assert checks["automatic-failover"]["verdict"] == "warn"
    assert "it is only observed" in checks["automatic-failover"]["evidence"]


def test_a_failover_that_is_no_update_is_observed_until_it_has_been_quiet(tmp_path: Path) -> None:
    flow = Flow(tmp_path, ORDERS["observe"], quiet=timedelta(minutes=10))
    flow.in_(5, lambda: flow.world.fail_over(NAMES[1]))
    flow.in_(12, lambda: flow.world.fail_over(NAMES[2]))
    began = flow.clock.now()
    flow.run()
    report = flow.report()
    assert [row["to"] for row in report["failovers"]] == [NAMES[1], NAMES[2]]
    assert flow.entries("watch", Kind.REACHED)[0].at - began >= timedelta(minutes=22)
    assert report["update"] is None


def test_an_observation_survives_that_everything_happens_while_nobody_is_there(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "observe")
    flow.crash((Kind.INTENDED, "trigger"))
    flow.clock.sleep(3600)  # begun, failed over, complete
    flow.run()
    assert flow.outcome == "done"
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]


# Pausing.


def test_paused_before_the_trigger_it_triggers_nothing_and_checks_again_before_it_does(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.ask(Ask.PAUSE, reason="wait for ben")
    flow.in_(180, lambda: flow.world.ask(Ask.RESUME))
    began = flow.clock.now()
    flow.run()
    assert flow.outcome == "done"
    assert flow.world.applied[0] - began >= timedelta(hours=3)
    checked = flow.entries("readiness", Kind.REACHED)[-1].at
    assert flow.world.applied[0] - checked <= RUNBOOK.poll_interval
    (interruption,) = flow.report()["interruptions"]
    assert (interruption["how"], interruption["why"]) == ("stopped", "pause asked for by ann on laptop: wait for ben")


def test_paused_in_the_watch_it_finds_afterwards_what_happened_meanwhile(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.in_(2, lambda: flow.world.ask(Ask.PAUSE))
    flow.in_(60, lambda: flow.world.ask(Ask.RESUME))
    flow.run()
    assert flow.outcome == "done"
    assert [row["told_by"] for row in flow.report()["failovers"]] == ["events"]
    assert len(flow.entries("grace", Kind.INTENDED)) == 1


def test_a_pause_outlives_the_process_that_it_was_told_to(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.ask(Ask.PAUSE)
    flow.crash((Kind.PAUSED, "plan"))
    flow.crash((Kind.PAUSED, "plan"))
    flow.world.ask(Ask.RESUME)
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


def test_a_paused_run_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.in_(3, lambda: flow.world.ask(Ask.PAUSE))
    flow.in_(3.5, lambda: flow.world.ask(Ask.STOP))
    flow.run()
    assert (flow.outcome, len(flow.world.stops)) == ("aborted", 1)


# Plans and approvals.


def test_a_plan_is_carried_out_and_is_in_the_report(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    key = flow.plan()
    assert flow.plan() == key  # the same world, the same plan
    flow.hold_to(key)
    flow.run()
    told = flow.report()["operation"]
    assert (told["plan"], told["held_to"]) == (key, key)
    assert f"{key}, to which the run was held" in next(tmp_path.glob("*/report.md")).read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda flow: flow.world.fail_over(NAMES[1]), "primary was shop-broker-001, is shop-broker-002"),
        (lambda flow: flow.world.change(update="scheduled"), "status was not-applied, is scheduled"),
        (lambda flow: flow.world.start(), "status was not-applied, is waiting-to-start"),
        (
            lambda flow: flow.world.change(versions=dict.fromkeys(NAMES, "8.0.2")),
            "shop-broker-003 valkey 8.0.1, is shop-broker-001 valkey 8.0.2",
        ),
        (lambda flow: flow.world.change(update="complete"), f"{UPDATE} was not-applied, and now"),
        (lambda flow: setattr(flow, "rules", RUNBOOK), "grace was 1m00s, is 20m00s"),
        (
            lambda flow: flow.world.change(node_type="cache.r7g.xlarge"),
            "node_types was shop-broker-001 cache.r7g.large",
        ),
    ],
    ids=["primary", "status", "begun", "version", "complete", "grace", "node-type"],
)
def test_a_run_is_held_to_its_plan(tmp_path: Path, change: Callable[[Flow], object], words: str) -> None:
    flow = Flow(tmp_path)
    flow.hold_to(flow.plan())
    change(flow)
    said = flow.refuses(Blocked)
    assert words in said
    assert "\n" not in said
    assert flow.world.applied == []


def test_a_world_that_changes_between_the_checks_and_the_request_stops_the_run_too(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.hold_to(flow.plan())
    flow.world.stick(stuck("old"))
    flow.world.surprises["recover"] = [lambda: flow.world.fail_over(NAMES[1])]
    assert "since this was agreed to: primary was shop-broker-001" in flow.refuses(Blocked)
    assert flow.world.applied == []


def test_a_plan_of_nowhere_is_a_mistake_and_one_that_was_carried_out_is_nothing_to_do(tmp_path: Path) -> None:
    flow = Flow(tmp_path, Order(plan="0" * 16))
    assert "there is no plan 0000000000000000" in flow.refuses(PatchpilotError)
    key = flow.plan()
    flow.world.plans[key]["carried_out_by"] = "run-7"
    flow.hold_to(key)
    assert flow.refuses(NothingToDo) == f"plan {key} was carried out by run run-7"


def waiting(directory: Path) -> Flow:
    """A run that waits for an approval, killed while it waits."""
    flow = Flow(directory, Order(approve_before="trigger"))
    flow.crash((Kind.OBSERVED, "approve"))
    return flow


def pending(flow: Flow) -> str:
    return str(flow.record.step("approve").seen["digest"])


def test_it_waits_for_an_approval_through_a_kill_and_checks_again_before_the_trigger(tmp_path: Path) -> None:
    flow = waiting(tmp_path)
    flow.in_(180, lambda: flow.world.ask(Ask.APPROVE, digest=pending(flow)))
    flow.run()
    assert flow.outcome == "done"
    given = flow.entries("approve", Kind.REACHED)[0].at
    assert flow.world.applied[0] >= given
    assert flow.world.applied[0] - flow.entries("readiness", Kind.REACHED)[-1].at <= RUNBOOK.poll_interval
    assert flow.report()["operation"]["approved_by"] == "ann on laptop"


def test_an_approval_is_for_what_was_shown_and_for_nothing_else(tmp_path: Path) -> None:
    flow = waiting(tmp_path)
    shown = pending(flow)
    flow.world.fail_over(NAMES[1])
    flow.world.ask(Ask.APPROVE, digest=shown)
    flow.in_(30, lambda: flow.world.ask(Ask.APPROVE, digest=pending(flow)))
    asked = flow.clock.now()
    flow.run()
    assert flow.outcome == "done"
    assert flow.world.applied[0] - asked >= timedelta(minutes=30)


@pytest.mark.parametrize("refused_by", ["aws", "pre-flight", "a world that changed and changed back"])
def test_an_approval_stays_good_for_its_plan_after_a_refusal(tmp_path: Path, refused_by: str) -> None:
    flow = waiting(tmp_path)
    flow.world.ask(Ask.APPROVE, digest=pending(flow))
    if refused_by == "aws":
        flow.world.surprises["apply"] = [NeedsOperator("AWS denies access")]
        flow.refuses(NeedsOperator)
    elif refused_by == "pre-flight":
        flow.crash((Kind.REACHED, "approve"))
        flow.world.group_changes = {"automatic_failover": "disabled"}
        flow.refuses(Blocked)
        flow.world.group_changes = {}
    else:
        flow.crash((Kind.REACHED, "approve"))
        flow.world.change(primary=NAMES[1])
        flow.crash((Kind.OBSERVED, "approve"))
        flow.world.change(primary=NAMES[0])
    flow.run()
    assert (flow.outcome, len(flow.world.applied), len(flow.world.requests)) == ("done", 1, 1)


def test_what_begins_by_itself_needs_no_approval_any_more(tmp_path: Path) -> None:
    flow = waiting(tmp_path)
    flow.world.initiator = "system"
    flow.in_(10, flow.world.start)
    flow.run()
    assert (flow.outcome, flow.world.applied) == ("done", [])
    assert flow.report()["update"]["how"] == "adopted"
    assert flow.report()["update"]["initiated_by"] == ["system"]


def test_an_update_that_aws_does_not_list_when_the_run_is_taken_up_is_unknown_and_not_nothing(tmp_path: Path) -> None:
    flow = waiting(tmp_path)
    flow.world.ask(Ask.APPROVE, digest=pending(flow))
    listed = flow.world.update_actions
    flow.world.update_actions = lambda group: ()  # type: ignore[method-assign]
    flow.in_(3, lambda: setattr(flow.world, "update_actions", listed))
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


def test_an_update_that_is_gone_for_good_leaves_a_run_that_can_be_ended(tmp_path: Path) -> None:
    flow = waiting(tmp_path)
    flow.world.update_actions = lambda group: ()  # type: ignore[method-assign]
    assert f"AWS does not list {UPDATE}, which this run is about" in flow.refuses(Transient)
    assert flow.outcome == "unfinished"
    flow.world.ask(Ask.STOP)
    flow.refuses(Aborted)
    assert (flow.outcome, flow.world.applied) == ("aborted", [])


def test_what_nobody_has_looked_at_and_aws_does_not_list_is_nothing_to_do(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.update_actions = lambda group: ()  # type: ignore[method-assign]
    assert "AWS lists none" in flow.refuses(NothingToDo)


def test_a_run_that_waits_can_be_ended(tmp_path: Path) -> None:
    flow = waiting(tmp_path)
    flow.world.ask(Ask.STOP)
    flow.refuses(Aborted)
    assert (flow.outcome, flow.world.applied) == ("aborted", [])


# The trigger.


def test_throttled_is_not_done_and_is_tried_again(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.surprises["apply"] = [Throttled("AWS is throttling us")] * 3
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert flow.report()["update"]["attempts"] == 1
    outcomes = [entry.data for entry in flow.entries("trigger", Kind.ACTED)]
    assert [outcome.get("again") for outcome in outcomes] == [True] * 3 + [None]


def test_throttled_for_too_long_it_stops_and_may_be_taken_up(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.surprises["apply"] = [Throttled("AWS is throttling us")] * 50
    assert "AWS is throttling us" in flow.refuses(Unsafe)
    flow.world.surprises.clear()
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


def test_a_refusal_for_want_of_a_permission_is_no_doubt(tmp_path: Path) -> None:
    flow = Flow(tmp_path)
    flow.world.surprises["apply"] = [NeedsOperator("AWS denies access")]
    assert "AWS refuses to start it: AWS denies access" in flow.refuses(NeedsOperator)
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)


def test_already_applied_is_looked_for_longer(tmp_path: Path) -> None:
    """Somebody else was quicker, and AWS shows it late."""
    flow = Flow(tmp_path)
    flow.world.unprocessed = Unprocessed("InvalidState", "the update is already in progress")
    flow.in_(5, flow.world.start)
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert flow.report()["update"]["how"] == "adopted"
