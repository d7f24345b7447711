"""Following the rotation: failovers from events and roles, when the watch ends, and when the grace does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from patchpilot.elasticache.facts import Event, Group, Member, NodeUpdate, UpdateAction
from patchpilot.engine.plan import Contradicted, NotYet, Reached, View
from patchpilot.errors import NeedsOperator, Unsafe
from patchpilot.phases import p3_watch, p4_grace
from patchpilot.phases.rotation import Failover, Rotation, failover
from patchpilot.settings import Runbook

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
RULES = Runbook(stall=timedelta(hours=2), grace=timedelta(minutes=5))
START = Rotation(primary="a", primary_since=NOON)


def minutes(number: float) -> datetime:
    return NOON + timedelta(minutes=number)


def told(at: float, new: str = "b", old: str = "a", source: str = "group") -> Event:
    return Event(minutes(at), source, f"Failover from primary node {old} to replica node {new} completed")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Failover from primary node x-001 to replica node x-002 completed", ("x-001", "x-002")),
        ("Failover from master node x-001 to replica node x-002 completed", ("x-001", "x-002")),
        ("Failover to replica node x-002 completed", ("", "x-002")),
        ("Test Failover API called for node group 0001", None),
        ("Recovering cache nodes 0001", None),
        ("Finished recovery for cache nodes 0001", None),
    ],
)
def test_the_texts_that_aws_writes(message: str, expected: tuple[str, str] | None) -> None:
    found = failover(Event(NOON, "x", message))
    assert (None if found is None else (found.old, found.to)) == expected


def test_the_events_of_the_group_and_of_the_node_are_one_failover() -> None:
    seen = START.follow("b", [told(10), told(10.1, source="b")], minutes(11))
    assert seen.failovers == (Failover(minutes(10.1), "b", "a", "events"),)


def test_events_that_are_read_again_or_go_missing_change_nothing() -> None:
    once = START.follow("b", [told(10)], minutes(11))
    assert once.follow("b", [told(10)], minutes(12)) == once
    assert once.follow("b", [], minutes(12)) == once


def test_a_failover_to_the_same_node_later_is_another_one() -> None:
    seen = START.follow("b", [told(10), told(20, "a", "b"), told(30)], minutes(31))
    assert [(each.at, each.to) for each in seen.failovers] == [
        (minutes(10), "b"), (minutes(20), "a"), (minutes(30), "b"),
    ]  # fmt: skip
    assert seen.last == Failover(minutes(30), "b", "a")


def test_without_an_event_a_new_primary_is_a_failover_when_it_is_first_seen() -> None:
    seen = START.follow("b", [], minutes(10))
    assert seen.failovers == (Failover(minutes(10), "b", "a", "roles"),)
    assert (seen.primary, seen.primary_since) == ("b", minutes(10))
    assert seen.follow("b", [], minutes(11)) == seen


def test_an_event_that_comes_late_takes_the_place_of_what_the_roles_showed() -> None:
    seen = START.follow("b", [], minutes(10)).follow("b", [told(9.5)], minutes(15))
    assert seen.failovers == (Failover(minutes(9.5), "b", "a", "events"),)


def test_an_event_before_the_roles_show_it_is_the_same_failover() -> None:
    seen = START.follow("a", [told(10)], minutes(10.5)).follow("b", [told(10)], minutes(11))
    assert seen.failovers == (Failover(minutes(10), "b", "a", "events"),)


def test_there_and_back_without_any_event_are_two_failovers() -> None:
    seen = START.follow("b", [], minutes(10)).follow("a", [], minutes(20))
    assert [each.to for each in seen.failovers] == ["b", "a"]


def test_an_answer_older_than_the_one_before_is_no_failover_back() -> None:
    seen = START.follow("b", [told(10)], minutes(11))
    assert seen.follow("a", [told(10)], minutes(11.5)) == seen
    assert seen.follow("a", [told(10)], minutes(11.5)).follow("b", [told(10)], minutes(12)) == seen
    back = seen.follow("a", [told(10)], minutes(13))
    assert [(each.to, each.told_by) for each in back.failovers] == [("b", "events"), ("a", "roles")]


def test_a_primary_that_aws_does_not_name_is_no_failover() -> None:
    assert START.follow(None, [], minutes(10)) == START
    assert Rotation().follow("b", [], minutes(10)).failovers == ()


def test_it_comes_back_from_the_journal_as_it_went_in() -> None:
    seen = START.follow("b", [told(10)], minutes(11))
    assert Rotation.of(seen.note()) == seen
    assert Rotation.of(Rotation().note()) == Rotation()


TRIGGERED = {"trigger": {"update": "u", "since": NOON.isoformat(), "primary": "a", "members": ["a", "b"]}}


def watch(now: float, seen: dict[str, Any] | None = None, contradicted: float | None = None) -> View:
    return View(
        "run", minutes(now), TRIGGERED, since=NOON, intended_at=NOON, seen=seen or {},
        contradicted_at=None if contradicted is None else minutes(contradicted),
    )  # fmt: skip


def action(status: str, *nodes: str, ratio: str = "") -> UpdateAction:
    rows = tuple(NodeUpdate(name, word) for name, word in zip("ab", nodes, strict=False))
    return UpdateAction("g", "u", status, nodes=rows, nodes_updated=ratio)


def group(status: str = "available", primary: str = "a") -> Group:
    members = tuple(Member(name, "primary" if name == primary else "replica") for name in "ab")
    return Group("g", status, members, (status,))


def test_the_watch_ends_when_every_node_is_complete_and_the_group_available() -> None:
    end = p3_watch.look(watch(30), action("complete", "complete", "complete"), group(primary="b"), (told(20),), RULES)
    assert isinstance(end, Reached)
    assert end.fact["completed"] == minutes(30).isoformat()
    assert [each["to"] for each in end.fact["rotation"]["failovers"]] == ["b"]
    assert [each["message"] for each in end.fact["events"]] == [told(20).message]


def test_it_needs_no_event_to_end() -> None:
    end = p3_watch.look(watch(30), action("complete", "complete", "complete"), group(primary="b"), (), RULES)
    assert isinstance(end, Reached)
    assert [each["told_by"] for each in end.fact["rotation"]["failovers"]] == ["roles"]


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (action("in-progress", "complete", "in-progress"), "available"),
        (action("in-progress", "complete", "complete"), "available"),
        (action("complete", "complete", "in-progress"), "available"),
        (action("complete", "complete", "complete"), "modifying"),
        (action("complete"), "available"),  # no node rows: unknown, not done
        (action("complete", ratio="1/2"), "available"),
        (action("not-applied", "not-applied", "not-applied"), "available"),  # an answer that lags behind
        (None, "available"),
    ],
)
def test_the_watch_goes_on_while_anything_is_unproven(seen: UpdateAction | None, status: str) -> None:
    assert isinstance(p3_watch.look(watch(30), seen, group(status), (), RULES), NotYet)


def test_a_ratio_will_do_where_aws_leaves_the_node_rows_out() -> None:
    assert isinstance(p3_watch.look(watch(30), action("complete", ratio="2/2"), group(), (), RULES), Reached)


def test_progress_is_told_node_by_node() -> None:
    going = p3_watch.look(watch(5), action("in-progress", "not-applied", "complete"), group("modifying"), (), RULES)
    assert isinstance(going, NotYet)
    assert "1/2 nodes done (a not-applied, b complete); group modifying" in going.why


def test_what_was_seen_survives_an_answer_without_the_update() -> None:
    first = p3_watch.look(watch(5), action("in-progress", "not-applied", "complete"), group(), (told(4),), RULES)
    assert isinstance(first, NotYet)
    second = p3_watch.look(watch(6, dict(first.seen)), None, group(), (), RULES)
    assert isinstance(second, NotYet)
    assert second.seen["nodes"] == first.seen["nodes"]
    assert second.seen["rotation"] == first.seen["rotation"]


def test_a_rotation_that_takes_too_long_stops_the_run_with_what_it_saw() -> None:
    slow = action("in-progress", "in-progress", "complete")
    assert isinstance(p3_watch.look(watch(119), slow, group(), (), RULES), NotYet)
    stopped = p3_watch.look(watch(120), slow, group(), (), RULES)
    assert isinstance(stopped, Contradicted)
    assert isinstance(stopped.error, Unsafe)
    assert stopped.seen["nodes"]["b"]["status"] == "complete"
    assert isinstance(p3_watch.look(watch(121, contradicted=120), slow, group(), (), RULES), NotYet)
    done = action("complete", "complete", "complete")
    assert isinstance(p3_watch.look(watch(500), done, group(), (), RULES), Reached)


def test_an_update_that_somebody_stopped_names_the_command_that_goes_on() -> None:
    stopped = p3_watch.look(watch(10), action("stopped", "complete", "stopped", ratio="1/2"), group(), (), RULES)
    assert isinstance(stopped, Contradicted)
    assert isinstance(stopped.error, NeedsOperator)
    assert "1/2 nodes" in str(stopped.error)
    assert "batch-apply-update-action --service-update-name u --replication-group-ids g" in str(stopped.error)


def test_an_update_that_was_superseded_on_the_way_stops_the_run() -> None:
    gone = p3_watch.look(watch(10), action("not-applicable", "complete", "not-applied"), group(), (), RULES)
    assert isinstance(gone, Contradicted)
    assert isinstance(gone.error, Unsafe)


def grace(now: float, failovers: Rotation = START, seen: dict[str, Any] | None = None) -> View:
    completed = minutes(30).isoformat()
    facts: dict[str, Any] = {**TRIGGERED, "watch": {"rotation": failovers.note(), "completed": completed}}
    terms = p4_grace.terms(failovers, completed, RULES.grace)
    return View("run", minutes(now), facts, since=NOON, intent=terms, intended_at=minutes(30), seen=seen or {})


AFTER_FAILOVER = START.follow("b", [told(28)], minutes(28))


def test_the_grace_counts_from_the_last_failover() -> None:
    view = grace(30, AFTER_FAILOVER)
    assert view.intent["deadline"] == minutes(33).isoformat()
    waiting = p4_grace.look(view, "b", (told(28),))
    assert waiting == NotYet("recovery begins in 3m00s (failover to b)", until=minutes(33))
    over = p4_grace.look(grace(33, AFTER_FAILOVER), "b", (told(28),))
    assert isinstance(over, Reached)
    assert over.fact["rearmed"] == 0


def test_without_a_failover_it_counts_from_the_end_of_the_rotation() -> None:
    view = grace(30)
    assert view.intent["deadline"] == minutes(35).isoformat()
    assert "no failover" in view.intent["because"]


def test_it_may_be_over_before_it_begins() -> None:
    assert isinstance(p4_grace.look(grace(34, AFTER_FAILOVER), "b", ()), Reached)


def test_a_further_failover_moves_the_deadline_and_is_remembered() -> None:
    further = p4_grace.look(grace(32, AFTER_FAILOVER), "a", (told(28), told(31, "a", "b")))
    assert isinstance(further, NotYet)
    assert further.until == minutes(36)
    remembered = grace(35.9, AFTER_FAILOVER, dict(further.seen))
    assert isinstance(p4_grace.look(remembered, "a", ()), NotYet)
    over = p4_grace.look(grace(36, AFTER_FAILOVER, dict(further.seen)), "a", ())
    assert isinstance(over, Reached)
    assert (over.fact["rearmed"], over.fact["because"]) == (1, "failover to a")


def test_a_failover_that_is_noticed_only_at_the_end_moves_it_too() -> None:
    further = p4_grace.look(grace(40, AFTER_FAILOVER), "a", (told(39, "a", "b"),))
    assert isinstance(further, NotYet)
    assert further.until == minutes(44)


def test_the_length_of_the_grace_is_the_one_on_record() -> None:
    """Editing the configuration in the middle of a run does not change a grace that has begun."""
    view = grace(32, AFTER_FAILOVER)
    longer = View(**{**view.__dict__, "intent": {**view.intent, "grace": 600.0}})
    further = p4_grace.look(longer, "a", (told(31, "a", "b"),))
    assert isinstance(further, NotYet)
    assert further.until == minutes(41)
