"""When the watch ends and what it remembers, and when the grace does."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from patchpilot.elasticache.facts import Event, Group, Member, NodeUpdate, UpdateAction
from patchpilot.engine.plan import Attempt, Contradicted, NotYet, Observation, Reached, View
from patchpilot.errors import Unsafe
from patchpilot.phases import p3_watch, p4_grace
from patchpilot.phases.desk import Desk
from patchpilot.phases.following import Followed
from patchpilot.phases.operations.service_update import ServiceUpdateOperation
from patchpilot.phases.rotation import Rotation
from patchpilot.phases.sight import SECOND, Sight
from patchpilot.settings import Runbook
from patchpilot.valkey.nodes import Report

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
RULES = Runbook(stall=timedelta(hours=2), node_stall=timedelta(hours=1), grace=timedelta(minutes=5))
START = Rotation.begin("a", NOON)


def minutes(number: float) -> datetime:
    return NOON + timedelta(minutes=number)


def told(at: float, new: str = "b", old: str = "a", source: str = "group") -> Event:
    return Event(minutes(at), source, f"Failover from primary node {old} to replica node {new} completed")


TRIGGERED = {
    "trigger": {"update": "u", "since": NOON.isoformat(), "primary": "a", "members": ["a", "b"]}, "stop": {},
}  # fmt: skip
SERVICE_UPDATE = ServiceUpdateOperation(cast("Desk", None))  # which reads nothing here


def watch(now: float, seen: dict[str, Any] | None = None, contradicted: float | None = None) -> View:
    return View(
        "run", minutes(now), TRIGGERED, since=NOON, intended_at=NOON, seen=seen or {},
        contradicted_at=None if contradicted is None else minutes(contradicted),
    )  # fmt: skip


def looked(
    view: View, action: UpdateAction | None, group: Group, events: tuple[Event, ...] = (), rules: Runbook = RULES,
    stop: dict[str, str] | None = None,
) -> Observation:  # fmt: skip
    """What the watch makes of one look."""
    sight = Sight(view.now, group, (action,) if action else (), (), events)
    at = SERVICE_UPDATE.standing({"update": "u"}, sight, tried=True)
    known = view.seen or {"rotation": START.note(), "update": "u"}
    return p3_watch.look(view, at, sight, Followed.of(known).follow(at, sight), rules, SERVICE_UPDATE, stop)


def action(status: str, *nodes: str, ratio: str = "") -> UpdateAction:
    rows = tuple(NodeUpdate(name, word) for name, word in zip("ab", nodes, strict=False))
    return UpdateAction("g", "u", status, nodes=rows, nodes_updated=ratio)


def group(status: str = "available", primary: str = "a") -> Group:
    members = tuple(Member(name, "primary" if name == primary else "replica") for name in "ab")
    return Group("g", status, members, (status,))


@pytest.mark.parametrize("heard", [True, False])
def test_what_aws_showed_wrongly_at_the_baseline_is_no_failover_when_the_nodes_fall_silent(heard: bool) -> None:
    trigger = {**TRIGGERED["trigger"], "primary": "b", "baseline": {"aws_primary": "a", "heard": heard}}
    rotation = Rotation.of(p3_watch.begun(trigger)["rotation"])
    assert (rotation.primary, rotation.heard) == ("b", heard)
    assert rotation.follow("a", [], minutes(1)).failovers == ()


def test_how_far_the_clock_of_aws_is_behind_is_read_from_its_answers() -> None:
    def behind(answered: float | None) -> timedelta:
        shown = replace(group(), answered=None if answered is None else minutes(answered))
        return Sight(minutes(10), shown).behind

    assert behind(7) == timedelta(minutes=3) - SECOND
    assert {behind(each) for each in (None, 10, 10 - 1 / 60, 12)} == {timedelta()}


DONE = action("complete", "complete", "complete")


def test_the_watch_ends_when_every_node_is_complete_and_the_group_available() -> None:
    end = looked(watch(30), DONE, group(primary="b"), (told(20),))
    assert isinstance(end, Reached)
    assert end.fact["completed"] == minutes(30).isoformat()
    assert [each["to"] for each in end.fact["rotation"]["failovers"]] == ["b"]
    assert [each["message"] for each in end.fact["events"]] == [told(20).message]


def test_it_needs_no_event_to_end() -> None:
    end = looked(watch(30), DONE, group(primary="b"))
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
        (action("complete", "complete"), "available"),  # one node's row is missing
        (action("complete", ratio="1/2"), "available"),
        (action("complete", ratio="1/1"), "available"),  # of two
        (action("complete", "complete", ratio="1/2"), "available"),  # one row of two, and the ratio says so, too
        (action("complete", "complete", ratio="1/1"), "available"),
        (action("complete", "complete", "complete", ratio="1/2"), "available"),  # they contradict each other
        (action("complete", "complete", "complete", ratio="1/1"), "available"),
        (action("complete", "complete", "complete", ratio="2/3"), "available"),
        (action("complete", "complete", "in-progress", ratio="2/2"), "available"),
        (action("not-applied", "not-applied", "not-applied"), "available"),  # an answer that lags behind
        (None, "available"),
    ],
)
def test_the_watch_goes_on_while_anything_is_unproven(seen: UpdateAction | None, status: str) -> None:
    assert isinstance(looked(watch(30), seen, group(status)), NotYet)


def test_a_ratio_will_do_where_aws_leaves_the_node_rows_out() -> None:
    for shown in (action("complete", ratio="2/2"), action("complete", "complete", ratio="2/2")):
        assert isinstance(looked(watch(30), shown, group()), Reached)
    assert isinstance(looked(watch(30), action("complete", "complete", "complete", ratio="2/2"), group()), Reached)


def test_progress_is_told_node_by_node() -> None:
    going = looked(watch(5), action("in-progress", "not-applied", "complete"), group("modifying"))
    assert isinstance(going, NotYet)
    assert "1/2 nodes done (a not-applied, b complete); group modifying" in going.why


def test_what_was_seen_survives_an_answer_without_the_update() -> None:
    first = looked(watch(5), action("in-progress", "not-applied", "complete"), group(), (told(4),))
    assert isinstance(first, NotYet)
    second = looked(watch(6, dict(first.seen)), None, group())
    assert isinstance(second, NotYet)
    assert second.seen["nodes"] == first.seen["nodes"]
    assert second.seen["rotation"] == first.seen["rotation"]


def going_on(until: float, contradicted: float | None = None) -> tuple[list[Observation], dict[str, Any]]:
    """Looks every ten minutes at node a being updated; what was made of each, and what was seen."""
    seen: dict[str, Any] = {}
    made: list[Observation] = []
    for now in range(10, int(until) + 1, 10):
        made.append(looked(watch(now, seen, contradicted), action("in-progress", "in-progress", "complete"), group()))
        seen = dict(made[-1].seen)  # type: ignore[union-attr]
    return made, seen


def test_a_rotation_that_takes_too_long_stops_the_run_with_what_it_saw() -> None:
    slow = action("in-progress", "waiting-to-start", "complete")
    assert isinstance(looked(watch(119), slow, group()), NotYet)
    stopped = looked(watch(120), slow, group())
    assert isinstance(stopped, Contradicted)
    assert isinstance(stopped.error, Unsafe)
    assert stopped.seen["nodes"]["b"]["status"] == "complete"
    assert isinstance(looked(watch(121, contradicted=120), slow, group()), NotYet)
    assert isinstance(looked(watch(500), DONE, group()), Reached)
    assert isinstance(looked(watch(500), DONE, group("modifying")), Contradicted)


def test_one_node_that_takes_too_long_is_named_and_time_counts_from_when_that_was_first_seen() -> None:
    made, seen = going_on(70)
    assert [isinstance(each, NotYet) for each in made] == [True] * 6 + [False]
    stalled = made[-1]
    assert isinstance(stalled, Contradicted)
    assert str(stalled.error).startswith("a has been worked on for more than 1h00m")
    again, _ = going_on(120, contradicted=70)
    assert all(isinstance(each, NotYet) for each in again[6:])
    assert seen["working"] == {"a": minutes(10).isoformat()}
    next_node = looked(watch(75, seen), action("in-progress", "complete", "in-progress"), group())
    assert isinstance(next_node, NotYet)
    assert next_node.seen["working"] == {"b": minutes(75).isoformat()}


def twice(shown: UpdateAction, *, apart: float) -> tuple[Observation, Observation]:
    """Two looks that show the same, so many minutes apart."""
    first = looked(watch(10), shown, group())
    return first, looked(watch(10 + apart, dict(first.seen)), shown, group())  # type: ignore[union-attr]


def test_an_update_that_somebody_stopped_ends_the_watch_once_that_is_sure() -> None:
    once, again = twice(action("stopped", "complete", "stopped", ratio="1/2"), apart=1)
    assert isinstance(once, NotYet)  # it may be an answer from before it was applied
    assert isinstance(again, Reached)
    assert again.fact["abort"] == {"why": "somebody stopped u (1/2 nodes are updated)", "by": "somebody else"}
    assert all(isinstance(each, NotYet) for each in twice(action("stopped", "complete", "stopped"), apart=0.9))


def test_an_update_that_was_superseded_on_the_way_stops_the_run() -> None:
    once, again = twice(action("not-applicable", "complete", "not-applied"), apart=1)
    assert isinstance(once, NotYet)
    assert isinstance(again, Contradicted)
    assert isinstance(again.error, Unsafe)
    assert "patchpilot stop" in str(again.error)


def test_a_status_that_nobody_knows_is_watched_until_it_takes_too_long() -> None:
    odd = action("half-applied", "complete", "half-applied")
    once, again = twice(odd, apart=40)
    for made in (once, again):
        assert isinstance(made, NotYet)
        assert made.why.startswith("AWS reports the update as 'half-applied', which this version does not know; group")
    assert isinstance(again, NotYet)
    assert isinstance(looked(watch(51, dict(again.seen)), DONE, group()), Reached)
    stalled = looked(watch(120, dict(again.seen)), odd, group())
    assert isinstance(stalled, Contradicted)
    assert "has been worked on" in str(stalled.error)


def test_what_is_in_a_status_that_nobody_knows_is_stopped_all_the_same() -> None:
    view = replace(watch(10), intent={"update": "u"}, facts={**TRIGGERED, "watch": {"rotation": START.note()}})
    for status in ("available", "modifying"):
        sight = Sight(view.now, group(status), (action("half-applied", "complete", "half-applied"),))
        at = SERVICE_UPDATE.standing({"update": "u", "begun": True}, sight, tried=True)
        followed = Followed.of({"rotation": START.note()}).follow(at, sight)
        made = p3_watch.wind_down(view, at, sight, followed, RULES)
        assert isinstance(made, NotYet)
        assert made.act
        asked = replace(view, attempts=(Attempt(view.now, {"status": "half-stopped"}),))
        waiting = p3_watch.wind_down(asked, at, sight, followed, RULES)
        assert isinstance(waiting, NotYet)
        assert not waiting.act


def test_a_reason_to_stop_ends_the_watch_with_what_it_saw() -> None:
    going = action("in-progress", "in-progress", "complete")
    end = looked(watch(10), going, group(), stop={"why": "too much is stuck", "by": "patchpilot"})
    assert isinstance(end, Reached)
    assert end.fact["abort"] == {"why": "too much is stuck", "by": "patchpilot"}
    assert end.fact["nodes"]["b"]["status"] == "complete"


@pytest.mark.parametrize(
    ("outcome", "asks_after"), [({"status": "stopping"}, p3_watch.REPEAT), ({"refused": "not now"}, 1), (None, 1)]
)
def test_aws_is_asked_again_to_stop_only_when_it_cannot_have_heard(
    outcome: dict[str, str] | None, asks_after: int
) -> None:
    def asks(now: float, *attempts: Attempt) -> bool:
        view = replace(watch(now), intent={"update": "u"}, attempts=attempts)
        sight = Sight(view.now, group("modifying"), (action("in-progress", "in-progress", "complete"),))
        at = SERVICE_UPDATE.standing({"update": "u", "begun": True}, sight, tried=True)
        followed = Followed.of({"rotation": START.note()}).follow(at, sight)
        made = p3_watch.wind_down(view, at, sight, followed, RULES)
        assert isinstance(made, NotYet)
        return made.act

    assert asks(10)
    last = Attempt(minutes(10), outcome)
    assert [asks(10 + later, last) for later in (0.1, asks_after - 0.1, asks_after)] == [False, False, True]


def test_offsets_alone_are_nothing_new_to_write_down() -> None:
    def seen_with(reports: dict[str, Report | str], known: dict[str, Any] | None = None) -> dict[str, Any]:
        sight = Sight(minutes(5), group(), (action("in-progress"),), reports=reports)
        at = SERVICE_UPDATE.standing({"update": "u"}, sight, tried=True)
        return dict(Followed.of(known or {"rotation": START.note()}).follow(at, sight).note())

    first = seen_with({"a": Report("primary", 10, "x"), "b": Report("replica", 9, "x", link_up=True)})
    later = seen_with({"a": Report("primary", 99, "x"), "b": Report("replica", 98, "x", link_up=True)}, first)
    assert later == first
    broken = seen_with({"a": Report("primary", 120, "x"), "b": Report("replica", 98, "x", link_up=False)}, first)
    assert broken["reports"]["b"] == {"role": "replica", "link_up": False, "replid": "x", "offset": 98}
    assert broken["reports"]["a"]["offset"] == 10


def grace(now: float, failovers: Rotation = START, seen: dict[str, Any] | None = None) -> View:
    completed = minutes(30).isoformat()
    facts: dict[str, Any] = {**TRIGGERED, "watch": {"rotation": failovers.note(), "completed": completed}}
    terms = p4_grace.terms(failovers, completed, RULES.grace)
    return View("run", minutes(now), facts, since=NOON, intent=terms, intended_at=minutes(30), seen=seen or {})


def waited(view: View, primary: str, events: tuple[Event, ...] = ()) -> Observation:
    """What the grace makes of one look."""
    known = Rotation.of((view.seen or view.intent)["rotation"])
    return p4_grace.look(view, known.follow(primary, events, view.now))


AFTER_FAILOVER = START.follow("b", [told(28)], minutes(28))


def test_the_grace_counts_from_the_last_failover() -> None:
    view = grace(30, AFTER_FAILOVER)
    assert view.intent["deadline"] == minutes(33).isoformat()
    waiting = waited(view, "b", (told(28),))
    assert waiting == NotYet("recovery begins in 3m00s (failover to b)", until=minutes(33))
    over = waited(grace(33, AFTER_FAILOVER), "b", (told(28),))
    assert isinstance(over, Reached)
    assert over.fact["rearmed"] == 0


def test_without_a_failover_it_counts_from_the_end_of_the_rotation() -> None:
    view = grace(30)
    assert view.intent["deadline"] == minutes(35).isoformat()
    assert "no failover" in view.intent["because"]


def test_it_may_be_over_before_it_begins() -> None:
    assert isinstance(waited(grace(34, AFTER_FAILOVER), "b"), Reached)


def test_a_further_failover_moves_the_deadline_and_is_remembered() -> None:
    further = waited(grace(32, AFTER_FAILOVER), "a", (told(28), told(31, "a", "b")))
    assert isinstance(further, NotYet)
    assert further.until == minutes(36)
    remembered = grace(35.9, AFTER_FAILOVER, dict(further.seen))
    assert isinstance(waited(remembered, "a"), NotYet)
    over = waited(grace(36, AFTER_FAILOVER, dict(further.seen)), "a")
    assert isinstance(over, Reached)
    assert (over.fact["rearmed"], over.fact["because"]) == (1, "failover to a")


def test_a_failover_that_is_noticed_only_at_the_end_moves_it_too() -> None:
    further = waited(grace(40, AFTER_FAILOVER), "a", (told(39, "a", "b"),))
    assert isinstance(further, NotYet)
    assert further.until == minutes(44)


def test_the_length_of_the_grace_is_the_one_on_record() -> None:
    """Editing the configuration in the middle of a run does not change a grace that has begun."""
    view = grace(32, AFTER_FAILOVER)
    longer = View(**{**view.__dict__, "intent": {**view.intent, "grace": 600.0}})
    further = waited(longer, "a", (told(31, "a", "b"),))
    assert isinstance(further, NotYet)
    assert further.until == minutes(41)
