"""When the update is started, when it is waited for, and when a person has to look."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from patchpilot.elasticache.facts import Event, Group, Member, NodeUpdate, UpdateAction
from patchpilot.engine.plan import Attempt, Contradicted, NotYet, Observation, Reached, View
from patchpilot.engine.requests import Ask, Request
from patchpilot.errors import NeedsOperator, NothingToDo, PatchpilotError, Unsafe
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import noted
from patchpilot.phases.operations import Sign, Standing
from patchpilot.phases.operations.gameday import GameDay, has_moved
from patchpilot.phases.operations.service_update import ServiceUpdateOperation, standing
from patchpilot.phases.p2_trigger import ACKNOWLEDGED, give_up, look
from patchpilot.phases.sight import Sight
from patchpilot.settings import Runbook
from patchpilot.valkey.nodes import Report

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
RULES = Runbook(settle=timedelta(minutes=1), stall=timedelta(hours=2))
BASELINE = {"update": "u", "primary": "a", "members": ["a", "b"]}


def minutes(number: float) -> datetime:
    return NOON + timedelta(minutes=number)


def view(
    now: float, *attempts: Attempt, since: float = 0, contradicted: float | None = None, before: str | None = None
) -> View:
    """A look at so many minutes past noon.

    :param before: the status of the update when the baseline was drawn.
    """
    intent = {**BASELINE, "status": before, "modified": NOON.isoformat()}
    return View(
        "run", minutes(now), {}, since=minutes(since), intent=intent, intended_at=NOON, attempts=attempts,
        contradicted_at=None if contradicted is None else minutes(contradicted),
    )  # fmt: skip


def action(status: str, *nodes: NodeUpdate) -> UpdateAction:
    return UpdateAction("g", "u", status, nodes=nodes, modified=NOON)


def judged(at: View, shown: UpdateAction | None) -> Observation:
    """What the trigger makes of an update action."""
    tried = any(not attempt.refused for attempt in at.attempts)
    kind = ServiceUpdateOperation(cast("Desk", None))  # which reads nothing here
    return look(at, standing(shown, {"a", "b"}, at.intent, tried=tried), RULES, kind)


def seen(status: str, at: View) -> Observation:
    return judged(at, action(status))


def error_of(observation: Observation) -> PatchpilotError:
    assert isinstance(observation, Contradicted)
    return observation.error


INTERRUPTED = Attempt(NOON)
ACCEPTED = Attempt(NOON, {"status": "waiting-to-start"})
REFUSED = Attempt(NOON, {"refused": "InvalidState: no, because of reasons"})
THROTTLED = Attempt(NOON, {"refused": "AWS is throttling us", "again": True})
APPLICABLE = pytest.mark.parametrize("status", ["not-applied", "stopped", "scheduled"])


@APPLICABLE
def test_it_is_started_if_nobody_has_tried(status: str) -> None:
    assert seen(status, view(0)) == NotYet(f"it is {status}", act=True)


@pytest.mark.parametrize("status", ["waiting-to-start", "in-progress", "stopping", "complete"])
@pytest.mark.parametrize(
    ("attempts", "how"),
    [((), "adopted"), ((INTERRUPTED,), "applied"), ((ACCEPTED,), "applied"), ((REFUSED,), "adopted")],
)
def test_it_runs_whoever_started_it(status: str, attempts: tuple[Attempt, ...], how: str) -> None:
    fact = seen(status, view(1, *attempts))
    assert isinstance(fact, Reached)
    assert (fact.fact["how"], fact.fact["status"], fact.fact["primary"]) == (how, status, "a")


def test_an_adopted_update_began_when_its_first_node_did_and_says_who_started_it() -> None:
    nodes = (
        NodeUpdate("a", "not-applied"),
        NodeUpdate("b", "complete", started=minutes(-20), initiated_by="system", initiated=minutes(-25)),
    )
    adopted = judged(view(0), action("in-progress", *nodes))
    assert isinstance(adopted, Reached)
    assert adopted.fact["since"] == minutes(-25).isoformat()
    assert adopted.fact["initiated_by"] == ["system"]
    ours = judged(view(3, INTERRUPTED), action("in-progress", *nodes))
    assert isinstance(ours, Reached)
    assert ours.fact["since"] == NOON.isoformat()
    # The request was interrupted, and AWS says that it was not the one that took effect.
    assert (ours.fact["how"], ours.fact["attempts"]) == ("adopted", 1)
    assert ours.say == "adopted: it is in-progress, started by system"
    by_us = judged(view(3, INTERRUPTED), action("in-progress", replace(nodes[1], initiated_by="customer")))
    assert isinstance(by_us, Reached)
    assert (by_us.fact["how"], by_us.say) == ("applied", "")


@APPLICABLE
def test_after_an_interrupted_request_aws_gets_time_to_show_it(status: str) -> None:
    for now in (0, 0.5, 0.999):
        waiting = seen(status, view(now, INTERRUPTED))
        assert isinstance(waiting, NotYet)
        assert (waiting.act, waiting.until) == (False, minutes(1))
    retry = seen(status, view(1, INTERRUPTED))
    assert isinstance(retry, NotYet)
    assert retry.act


def test_a_second_test_failover_would_be_a_second_failover_so_aws_gets_more_time() -> None:
    kind = GameDay(cast("Desk", None))
    for now in (1, 4.9):
        waiting = look(view(now, INTERRUPTED), Standing(Sign.READY, "available"), RULES, kind)
        assert isinstance(waiting, NotYet)
        assert (waiting.act, waiting.until) == (False, minutes(5))
    assert acts(look(view(5, INTERRUPTED), Standing(Sign.READY, "available"), RULES, kind))


@pytest.mark.parametrize(
    ("heard", "says", "aws", "moved"),
    [
        (True, "b", "a", False),  # AWS lags behind
        (True, "c", "a", True),
        (True, "d", "a", True),  # where it was before
        (True, "", "a", False),  # what AWS showed at the baseline already
        (True, "", "b", False),  # AWS has caught up
        (True, "", "c", True),
        (False, "d", "a", False),  # what the failover before the baseline led to
        (False, "c", "a", True),
        (False, "", None, False),
    ],
)
def test_who_is_the_primary_is_news_only_if_it_was_not_so_at_the_baseline(
    heard: bool, says: str, aws: str | None, moved: bool
) -> None:
    """The nodes said b, or said nothing, when AWS still showed a; there had been a failover to d."""
    at_first = {"primary": "b", "aws_primary": "a", "heard": heard, "drawn": NOON.isoformat()}
    members = tuple(Member(name, "primary" if name == aws else "replica") for name in "abcd")
    before = Event(minutes(-1), "g", "Failover to replica node d completed")
    reports: dict[str, Report | str] = {says: Report("primary", 1)} if says else {}
    sight = Sight(minutes(5), Group("g", "available", members), events=(before,), reports=reports)
    assert has_moved(at_first, sight) is moved


def test_each_interrupted_request_gets_its_own_time() -> None:
    again = seen("not-applied", view(1.5, INTERRUPTED, Attempt(minutes(1))))
    assert isinstance(again, NotYet)
    assert (again.act, again.until) == (False, minutes(2))


def test_requests_that_never_arrive_are_not_made_for_ever() -> None:
    late = Attempt(minutes(118))
    assert acts(seen("not-applied", view(119.5, INTERRUPTED, late)))
    error = error_of(seen("not-applied", view(120, INTERRUPTED, late)))
    assert isinstance(error, Unsafe)
    assert "patchpilot stop" in str(error)
    assert acts(seen("not-applied", view(121, INTERRUPTED, late, contradicted=120)))


@APPLICABLE
def test_a_request_that_aws_accepted_is_never_made_again(status: str) -> None:
    for now in (0.1, 1, ACKNOWLEDGED - 0.1):
        waiting = seen(status, view(now, ACCEPTED))
        assert isinstance(waiting, NotYet)
        assert not waiting.act
    for since in (0, ACKNOWLEDGED + 1):  # nor by a run that was taken up again
        error = error_of(seen(status, view(ACKNOWLEDGED + 1, ACCEPTED, since=since)))
        assert isinstance(error, Unsafe)
        assert "AWS accepted the request of 2026-03-01 12:00:00 UTC" in str(error)
        assert "patchpilot stop" in str(error)


def test_a_refusal_is_passed_on_verbatim_after_a_second_look() -> None:
    waiting = seen("not-applied", view(0.5, REFUSED))
    assert isinstance(waiting, NotYet)
    assert (waiting.act, waiting.until) == (False, minutes(1))
    error = error_of(seen("not-applied", view(1, REFUSED)))
    assert isinstance(error, NeedsOperator)
    assert "InvalidState: no, because of reasons" in str(error)


def test_a_refusal_is_forgotten_once_somebody_has_started_the_run_again() -> None:
    retry = seen("not-applied", view(9, REFUSED, since=8))
    assert isinstance(retry, NotYet)
    assert retry.act


@pytest.mark.parametrize("redrawn", [False, True])
@pytest.mark.parametrize(("words", "settles"), [("InvalidState: no", 1), ("It has already been applied", ACKNOWLEDGED)])
def test_whoever_starts_a_refused_run_again_waits_for_what_aws_may_still_show(
    words: str, settles: int, redrawn: bool
) -> None:
    """It may have started all the same; nobody knows how long whoever was refused has looked for that."""

    def again(now: float, since: float) -> Observation:
        refused = Attempt(NOON, {"refused": words})
        if not redrawn:
            return seen("not-applied", view(now, refused, since=since))
        at = view(now, since=since)
        note = {"at": NOON.isoformat(), "outcome": refused.outcome}
        return seen("not-applied", replace(at, intent={**at.intent, "refused": note}))

    for later in (0.2, settles - 0.1):
        waiting = again(0.1 + later, since=0.1)
        assert isinstance(waiting, NotYet)
        assert (waiting.act, waiting.until) == (False, minutes(0.1 + settles))
    assert acts(again(0.1 + settles, since=0.1))
    assert acts(again(600, since=600))  # long ago: AWS has had its time


def test_absent_is_unknown_and_not_for_ever() -> None:
    assert isinstance(judged(view(119), None), NotYet)
    assert isinstance(error_of(judged(view(120), None)), Unsafe)
    # Whoever starts the run again after that gets as long again.
    assert isinstance(judged(view(121, contradicted=120), None), NotYet)
    assert isinstance(error_of(judged(view(240, contradicted=120), None)), Unsafe)


@pytest.mark.parametrize("before", ["not-applied", "scheduled"])
@pytest.mark.parametrize("attempts", [(), (INTERRUPTED,), (ACCEPTED,), (REFUSED,), (THROTTLED,)])
def test_what_somebody_has_stopped_since_is_followed_and_never_started_again(
    before: str, attempts: tuple[Attempt, ...]
) -> None:
    for now in (0.5, 2, 500):
        ended = seen("stopped", view(now, *attempts, before=before))
        assert isinstance(ended, Reached)
        assert ended.fact["status"] == "stopped"
        assert "not started again" in ended.say


@pytest.mark.parametrize(
    ("now", "ran"),
    [
        (NodeUpdate("b", "stopped", initiated=minutes(-60)), False),
        (NodeUpdate("b", "stopped", initiated=minutes(1)), True),
        (NodeUpdate("b", "complete", initiated=minutes(-60)), True),
    ],
)
def test_what_was_stopped_before_is_started_unless_it_ran_since(now: NodeUpdate, ran: bool) -> None:
    row = noted(NodeUpdate("b", "stopped", initiated=minutes(-60)))
    at = view(2, INTERRUPTED, before="stopped")
    at = replace(at, intent={**at.intent, "nodes": [row], "modified": None})
    made = judged(at, replace(action("stopped", now), modified=None))
    assert isinstance(made, Reached) if ran else acts(made)
    at = replace(at, intent={**at.intent, "modified": NOON.isoformat()})
    assert isinstance(judged(at, replace(action("stopped"), modified=minutes(1))), Reached)


def test_a_request_of_ours_is_not_repeated_where_nothing_tells_whether_it_ran() -> None:
    bare = replace(action("stopped"), modified=None)
    assert isinstance(judged(view(2, INTERRUPTED, before="stopped"), bare), Reached)
    assert acts(judged(view(2, before="stopped"), bare))


@pytest.mark.parametrize("shown", [None, action("not-applied"), action("scheduling")])
@pytest.mark.parametrize("attempt", [INTERRUPTED, ACCEPTED])
def test_given_up_it_waits_for_what_aws_may_still_show_and_goes_on(
    shown: UpdateAction | None, attempt: Attempt
) -> None:
    waiting, given_up = (given(view(now, attempt), shown) for now in (ACKNOWLEDGED - 0.1, ACKNOWLEDGED))
    assert isinstance(waiting, NotYet)
    assert not waiting.act
    assert isinstance(given_up, Reached)
    assert (given_up.fact["how"], given_up.fact["update"]) == ("requested", "u")
    assert isinstance(given(view(1, attempt), action("not-applicable")), Reached)


def given(at: View, shown: UpdateAction | None) -> Observation:
    """What the trigger makes of a request to stop."""
    return give_up(
        at, standing(shown, {"a", "b"}, at.intent, tried=True), RULES, Request(Ask.STOP, "ann", NOON, "enough")
    )


def test_aws_scheduling_it_is_waited_for() -> None:
    waiting = seen("scheduling", view(1))
    assert isinstance(waiting, NotYet)
    assert not waiting.act


def test_a_superseded_update_is_nothing_to_do_unless_it_may_have_begun() -> None:
    assert isinstance(error_of(seen("not-applicable", view(1))), NothingToDo)
    assert isinstance(error_of(seen("not-applicable", view(1, REFUSED))), NothingToDo)
    error = error_of(seen("not-applicable", view(1, INTERRUPTED)))
    assert isinstance(error, Unsafe)
    assert "patchpilot stop" in str(error)


def test_a_status_nobody_knows_stops_the_run_unless_it_may_have_begun() -> None:
    error = error_of(seen("half-applied", view(5)))
    assert isinstance(error, Unsafe)
    assert "'half-applied'" in str(error)
    for attempt in (INTERRUPTED, ACCEPTED):
        waiting = seen("half-applied", view(119, attempt))
        assert isinstance(waiting, NotYet)
        assert not waiting.act
        assert "'half-applied', which this version does not know" in waiting.why
        assert isinstance(error_of(seen("half-applied", view(120, attempt))), Unsafe)


def test_no_situation_asks_to_act_while_the_update_may_be_running() -> None:
    """The one promise of this phase, over every status and every history of up to two attempts."""
    statuses = ["waiting-to-start", "in-progress", "stopping", "complete", "scheduling", "not-applicable", "odd"]
    histories: list[tuple[Attempt, ...]] = [
        (first, replace(second, at=minutes(1)))
        for first in (INTERRUPTED, ACCEPTED, REFUSED)
        for second in (INTERRUPTED, ACCEPTED, REFUSED)
    ]
    histories += [(), (INTERRUPTED,), (ACCEPTED,), (REFUSED,)]
    for attempts in histories:
        for now in (1, 1.5, 2, 5, 500):
            for status in statuses:
                assert not acts(seen(status, view(now, *attempts)))
            assert not acts(judged(view(now, *attempts), None))
            last = attempts[-1] if attempts else None
            if last and not last.refused:
                too_early = last.interrupted and minutes(now) < last.at + RULES.settle
                if too_early or not last.interrupted:
                    assert not acts(seen("not-applied", view(now, *attempts)))


def acts(observation: Any) -> bool:
    return isinstance(observation, NotYet) and observation.act
