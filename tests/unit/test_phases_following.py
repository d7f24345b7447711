"""What is remembered of a rotation from one look to the next, and since when all looks have meant the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patchpilot.elasticache.facts import NodeUpdate
from patchpilot.phases.following import Followed, stalled, stopped_elsewhere
from patchpilot.phases.operations import Sign, Standing
from patchpilot.phases.sight import Sight
from tests.unit.test_phases_watch import RULES, SERVICE_UPDATE, START, action, group, minutes, watch

NEW = Followed.of({"rotation": START.note(), "update": "u"})
RUNNING, STOPPED = action("in-progress", "complete", "in-progress"), action("stopped", "complete", "stopped")


def followed(earlier: Followed, now: float, shown: object = RUNNING, primary: str = "a") -> Followed:
    """After a look, as the journal has it."""
    sight = Sight(minutes(now), group(primary=primary), (shown,) if shown else ())  # type: ignore[arg-type]
    at = SERVICE_UPDATE.standing({"update": "u", "begun": True}, sight, tried=True)
    return Followed.of(earlier.follow(at, sight).note())


def test_since_when_looks_mean_the_same_counts_from_the_last_that_meant_something_else() -> None:
    first = followed(NEW, 1, STOPPED)
    assert followed(first, 2, STOPPED).since(minutes(9)) == minutes(1)
    between = followed(first, 2, RUNNING)
    assert followed(between, 3, STOPPED).since(minutes(9)) == minutes(3)
    assert NEW.since(minutes(9)) == minutes(9)


def test_a_further_failover_means_something_else() -> None:
    first = followed(NEW, 1, STOPPED)
    assert followed(first, 2, STOPPED, primary="b").since(minutes(9)) == minutes(2)


def test_the_update_and_its_rows_are_remembered_while_aws_does_not_list_it() -> None:
    unlisted = followed(followed(NEW, 1), 2, shown=None)
    assert (unlisted.update, set(unlisted.rows)) == ("u", {"a", "b"})


@pytest.mark.parametrize("status", ["waiting-to-start", "not-applied", "stopped", "complete", "available"])
def test_a_node_that_nobody_works_on_is_not_slow(status: str) -> None:
    rows = (NodeUpdate("a", status), NodeUpdate("b", "in-progress"))
    assert set(followed(NEW, 1, replace(RUNNING, nodes=rows)).working) == {"b"}


def test_the_status_of_the_group_is_said_once() -> None:
    shown = replace(followed(NEW, 1), group="modifying")
    assert shown.line(Standing(Sign.RUNNING, why="one node is done")) == "one node is done; group modifying"
    assert shown.line(Standing(Sign.BUSY, why="the group is modifying")) == "the group is modifying"


@pytest.mark.parametrize(
    ("at", "offered"),
    [
        (Standing(Sign.RUNNING, "in-progress", update="u"), True),
        (Standing(Sign.RUNNING, "available"), True),
        (Standing(Sign.RUNNING, "modifying"), False),  # AWS cannot stop it
    ],
)
def test_what_takes_too_long_is_given_up_only_where_that_can_be(at: Standing, offered: bool) -> None:
    error = stalled(watch(120), at, NEW, RULES)
    assert error
    assert ("patchpilot stop" in str(error)) is offered
    assert stalled(watch(119.9), at, NEW, RULES) is None


def test_how_far_an_update_was_that_somebody_stopped_may_be_unknown() -> None:
    at = Standing(Sign.STOPPED, "stopped", update="u")
    found = stopped_elsewhere(watch(2), at, replace(NEW, sign_since=minutes(1)), RULES)
    assert found == {"why": "somebody stopped u (an unknown number of nodes are updated)", "by": "somebody else"}
    assert stopped_elsewhere(watch(1.9), at, replace(NEW, sign_since=minutes(1)), RULES) is None


def test_what_this_process_knows_beyond_the_record_is_kept_while_the_record_says_the_same() -> None:
    knows_more, note = replace(START, shown=minutes(1)), {"rotation": START.note()}
    assert Followed.of(note, knows_more).rotation is knows_more
    assert Followed.of(note, replace(knows_more, primary="c")).rotation == START
