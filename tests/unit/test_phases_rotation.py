"""Following the rotation: failovers from events, from AWS's roles and from the nodes themselves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from patchpilot.elasticache.facts import Event
from patchpilot.phases.rotation import Failover, Rotation, Said, failover, is_sign, said_by
from patchpilot.settings import Runbook
from patchpilot.valkey.nodes import Report

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
RULES = Runbook(stall=timedelta(hours=2), node_stall=timedelta(hours=1), grace=timedelta(minutes=5))
START = Rotation.begin("a", NOON)


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


@pytest.mark.parametrize(("date", "counts"), [(9.5, 9.5), (8.5, 10), (6, 10), (3, 3)])
def test_an_event_that_is_dated_well_before_the_roles_showed_it_may_have_another_clock(
    date: float, counts: float
) -> None:
    """Unless that would be further off than AWS's clock can be: then nobody had looked."""
    seen = START.follow("b", [], minutes(10)).follow("b", [told(date)], minutes(15))
    [failover] = seen.failovers
    assert (failover.at, failover.told_by, failover.old) == (minutes(counts), "events", "a")
    assert seen.follow("b", [told(date)], minutes(16)) == seen


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


def test_the_nodes_own_word_is_enough_and_aws_may_lag_behind_for_as_long_as_it_likes() -> None:
    seen = START.follow("a", [], minutes(9), Said("a")).follow("a", [], minutes(10), Said("b"))
    assert seen.failovers == (Failover(minutes(10), "b", "a", "roles", after=minutes(9)),)
    lagging = seen.follow("a", [], minutes(20), Said("b")).follow("a", [], minutes(21))  # the nodes are silent once
    assert (lagging.failovers, lagging.primary) == (seen.failovers, "b")
    caught_up = lagging.follow("b", [], minutes(22))
    assert (caught_up.failovers, caught_up.primary, caught_up.previous) == (seen.failovers, "b", "a")
    assert caught_up.primary_since == minutes(10)
    back = caught_up.follow("a", [], minutes(30))
    assert [(each.to, each.told_by) for each in back.failovers] == [("b", "roles"), ("a", "roles")]


def test_where_two_nodes_call_themselves_the_primary_neither_counts() -> None:
    reports: dict[str, Report | str] = {"a": Report("primary", 1), "b": Report("primary", 2), "c": "does not answer"}
    assert said_by(reports) is None
    assert said_by({**reports, "a": Report("replica", 1)}) == Said("b")
    assert said_by({"c": "does not answer"}) is None


def test_a_primary_that_comes_back_with_another_history_was_restarted() -> None:
    seen = START.follow("a", [], minutes(1), Said("a", "x")).follow("a", [], minutes(2), Said("a", "x"))
    assert seen.failovers == ()
    assert seen.follow("a", [], minutes(3), Said("a", "y")).failovers == (Failover(minutes(3), "a", "a", "roles"),)
    promoted = seen.follow("b", [], minutes(3), Said("b", "y"))
    assert [each.to for each in promoted.follow("b", [], minutes(4), Said("b", "y")).failovers] == ["b"]


@pytest.mark.parametrize("behind", [0.2, 2, 4])
def test_a_clock_of_aws_that_is_behind_ours_does_not_make_the_grace_shorter(behind: float) -> None:
    """The failover was at 10.1 by our clock; the nodes said at 10 that it had not happened yet."""
    before = START.follow("a", [], minutes(10), Said("a"))
    event = told(10.1 - behind)
    at_once = before.follow("b", [event], minutes(10.25), Said("b"))
    assert at_once.follow("b", [event], minutes(11), Said("b")) == at_once
    late = before.follow("b", [], minutes(10.25), Said("b")).follow("b", [event], minutes(14), Said("b"))
    for seen in (at_once, late, Rotation.of(late.note()).follow("b", [event], minutes(15), Said("b"))):
        (counted,) = seen.failovers
        assert (counted.at, counted.dated, counted.told_by) == (minutes(10.25), event.at, "events")


def test_what_made_the_first_primary_one_is_no_part_of_the_rotation_however_often_its_event_is_read() -> None:
    before = [told(-1, "a", "c")]
    seen = START.follow("a", before, minutes(1), Said("a")).follow("a", before, minutes(2), Said("a"))
    assert seen.failovers == ()
    moved = seen.follow("b", [*before, told(3)], minutes(3.25), Said("b"))
    for now in (3.5, 4, 8):
        moved = moved.follow("b", [*before, told(3)], minutes(now), Said("b"))
    assert [(each.at, each.to) for each in moved.failovers] == [(minutes(3), "b")]
    back = moved.follow("a", [*before, told(3), told(20, "a", "b")], minutes(20), Said("a"))
    assert [(each.at, each.to) for each in back.failovers] == [(minutes(3), "b"), (minutes(20), "a")]


def test_a_clock_that_is_known_to_be_behind_is_allowed_for_where_nobody_watched() -> None:
    """The failover was at 10 by our clock; AWS dates it 6, and this process looks for the first time."""
    behind = timedelta(minutes=4)
    seen = START.follow("b", [told(6)], minutes(20), Said("b"), behind)
    for again in (seen, Rotation.of(seen.note()).follow("b", [told(6)], minutes(21), Said("b"), 0.9 * behind)):
        (counted,) = again.failovers
        assert (counted.at, counted.dated) == (minutes(10), minutes(6))
    (just_now,) = START.follow("b", [told(6)], minutes(9), None, behind).failovers
    assert just_now.at == minutes(9)
    assert START.follow("b", [told(-3)], minutes(5), None, behind).failovers[0].at == minutes(1)  # it had begun by then


def test_no_failover_from_before_is_part_of_it_however_late_it_is_told_or_shown() -> None:
    before = [told(-1, "c"), told(-0.5, "b", "c")]
    stale = Rotation.begin("b", NOON, aws="a", heard=True)  # the nodes said b when AWS still said a
    silent = stale.follow("a", [], minutes(1)).follow("b", before, minutes(2))
    assert (silent.failovers, silent.primary) == ((), "b")
    assert stale.follow("a", before, minutes(1), Said("b")).failovers == ()
    misled = START.follow("a", [], minutes(1)).follow("b", before, minutes(2))  # no node said anything
    assert (misled.failovers, misled.primary) == ((), "b")
    assert START.follow("a", [], minutes(1)).follow("a", before, minutes(2), Said("b")).failovers == ()
    wrong_clock = stale.follow("a", [], minutes(1)).follow("a", [told(-0.5, "c", "b")], minutes(2), Said("c"))
    assert [(each.at, each.to) for each in wrong_clock.failovers] == [(minutes(2), "c")]
    again = misled.follow("c", [*before, told(9, "c", "b")], minutes(10))
    assert [(each.at, each.to) for each in again.failovers] == [(minutes(9), "c")]


def test_an_event_that_is_read_again_after_the_next_failover_keeps_its_date() -> None:
    seen = START.follow("b", [told(3)], minutes(3), Said("b")).follow("b", [told(3)], minutes(5), Said("b"))
    both = [told(3), told(6, "c", "b")]
    for now in (6, 6.5, 7, 7.5):
        seen = seen.follow("c", both, minutes(now), Said("c"))
    assert [(each.at, each.to) for each in seen.failovers] == [(minutes(3), "b"), (minutes(6), "c")]


def test_an_event_that_is_there_before_the_nodes_know_keeps_its_date() -> None:
    seen = START
    for now in (10.1, 10.4, 10.7):
        seen = seen.follow("a", [told(10)], minutes(now), Said("a"))
    assert [(each.at, each.to) for each in seen.failovers] == [(minutes(10), "b")]


def test_an_event_of_long_ago_that_appears_late_is_not_taken_for_a_wrong_clock() -> None:
    seen = START.follow("c", [], minutes(10), Said("c")).follow("c", [told(4)], minutes(20), Said("c"))
    assert [(each.at, each.to) for each in seen.failovers] == [(minutes(4), "b"), (minutes(10), "c")]


@pytest.mark.parametrize(
    ("message", "sign"),
    [
        ("Recovering cache nodes 0001", True),
        ("Finished recovery for cache nodes 0001", True),
        ("Failover to replica node x-002 completed", True),
        ("Test Failover API called for node group 0001", True),
        ("Cache node 0001 restarted", True),
        ("Cache cluster patched", True),
        ("Service update is available for cache node 0001", False),
        ("Snapshot succeeded for cache cluster x", False),
    ],
)
def test_the_signs_of_a_rotation(message: str, sign: bool) -> None:
    assert is_sign(Event(NOON, "x", message)) is sign


def test_it_comes_back_from_the_journal_as_it_went_in() -> None:
    seen = START.follow("b", [told(10)], minutes(11))
    assert Rotation.of(seen.note()) == seen
    assert Rotation.of(Rotation().note()) == Rotation()
