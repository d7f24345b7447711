"""The fold over a journal, and the table of what may follow what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from patchpilot.engine.journal import TRANSITIONS, Entry, Kind, RunRecord, State, StepRecord, plain
from patchpilot.errors import Corrupt

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def story(*kinds: Kind) -> list[Entry]:
    return [
        Entry(number, NOON + timedelta(minutes=number), kind, "phase", "step", {"n": number})
        for number, kind in enumerate(kinds, 1)
    ]


def told(*kinds: Kind) -> RunRecord:
    """The fold over a run that has begun."""
    return RunRecord.of([Entry(0, NOON, Kind.STARTED), *story(*kinds)])


def test_every_state_can_be_reached_and_left() -> None:
    reached, todo = {State.NEW}, [State.NEW]
    while todo:
        state = todo.pop()
        after = {to for (source, _), to in TRANSITIONS.items() if source is state}
        todo += after - reached
        reached |= after
    assert reached == set(State)
    assert {source for source, _ in TRANSITIONS} == set(State)


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        ((), State.NEW),
        ((Kind.INTENDED,), State.LOOKING),
        ((Kind.INTENDED, Kind.ACTING), State.ACTING),
        ((Kind.INTENDED, Kind.ACTING, Kind.OBSERVED, Kind.ACTING, Kind.ACTED), State.LOOKING),
        ((Kind.INTENDED, Kind.ACTING, Kind.REACHED), State.REACHED),
        ((Kind.INTENDED, Kind.REACHED, Kind.INTENDED), State.LOOKING),
    ],
)
def test_the_journal_says_where_a_step_is(kinds: tuple[Kind, ...], state: State) -> None:
    assert told(*kinds).step("step").state is state


@pytest.mark.parametrize(
    "kinds",
    [
        (Kind.ACTING,),
        (Kind.REACHED,),
        (Kind.INTENDED, Kind.ACTED),
        (Kind.INTENDED, Kind.REACHED, Kind.ACTING),
        (Kind.INTENDED, Kind.ACTING, Kind.INTENDED),
    ],
)
def test_a_journal_that_contradicts_itself_is_refused(kinds: tuple[Kind, ...]) -> None:
    with pytest.raises(Corrupt, match=f"entry {len(kinds)} .* cannot follow"):
        told(*kinds)


def test_an_attempt_without_an_answer_was_interrupted() -> None:
    record = told(Kind.INTENDED, Kind.ACTING, Kind.ACTING, Kind.ACTED).step("step")
    assert [attempt.interrupted for attempt in record.attempts] == [True, False]
    assert [attempt.at for attempt in record.attempts] == [NOON + timedelta(minutes=2), NOON + timedelta(minutes=3)]
    assert record.attempts[1].outcome == {"n": 4}


def test_a_step_that_is_established_anew_begins_anew() -> None:
    kinds = (Kind.INTENDED, Kind.OBSERVED, Kind.ACTING, Kind.ACTED, Kind.CONTRADICTED, Kind.REACHED, Kind.INTENDED)
    record = told(*kinds).step("step")
    assert record == StepRecord(State.LOOKING, intent=story(*kinds)[-1])


def test_only_steps_that_reached_their_goal_have_facts() -> None:
    assert told(Kind.INTENDED, Kind.OBSERVED).facts() == {}
    assert told(Kind.INTENDED, Kind.REACHED).facts() == {"step": {"n": 2}}


def test_the_run_remembers_its_start_its_last_resumption_and_its_end() -> None:
    entries = story(Kind.STARTED, Kind.RESUMED, Kind.RESUMED, Kind.FINISHED)
    record = RunRecord.of(entries)
    assert (record.started, record.resumed, record.finished) == (entries[0], entries[2], entries[3])


@pytest.mark.parametrize(
    "kinds",
    [
        (Kind.INTENDED,),
        (Kind.RESUMED,),
        (Kind.STARTED, Kind.STARTED),
        (Kind.STARTED, Kind.FINISHED, Kind.RESUMED),
        (Kind.STARTED, Kind.FINISHED, Kind.INTENDED),
        (Kind.STARTED, Kind.FINISHED, Kind.FINISHED),
    ],
)
def test_steps_are_taken_while_the_run_is_under_way_and_nothing_follows_its_end(kinds: tuple[Kind, ...]) -> None:
    with pytest.raises(Corrupt, match=f"entry {len(kinds)} .* cannot follow"):
        RunRecord.of(story(*kinds))


def test_the_order_is_the_last_one_on_record() -> None:
    orders = [Entry(n, NOON, kind, data={"order": {"n": n}}) for n, kind in enumerate((Kind.STARTED, Kind.RESUMED))]
    assert RunRecord.of(orders[:1]).order == {"n": 0}
    assert RunRecord.of(orders).order == {"n": 1}
    assert RunRecord.of([Entry(1, NOON, Kind.STARTED)]).order == {}


def test_data_is_compared_as_the_journal_will_give_it_back() -> None:
    assert plain({"a": (1, (2,)), "b": {3: None}}) == {"a": [1, [2]], "b": {"3": None}}
