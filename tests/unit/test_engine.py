"""The engine, driven by a toy plan that makes tea."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Entry, Kind, MemoryJournal, RunRecord
from patchpilot.engine.plan import Data, NotYet, Observation, Phase, Plan, Reached, Step, View
from patchpilot.engine.runner import PATIENCE, Progress, Runner
from patchpilot.errors import (
    Aborted,
    Blocked,
    Corrupt,
    Exit,
    LeaseLost,
    NeedsOperator,
    NothingToDo,
    ResumeLater,
    Transient,
    Unsafe,
)  # fmt: skip
from tests.crash.kettle import ANSWER_LOST, Kitchen, tea


@dataclass
class Stove:
    """A kitchen, its clock and its journal; each :meth:`run` is a new process."""

    clock: FakeClock
    kitchen: Kitchen
    journal: MemoryJournal
    told: list[Progress]

    def run(
        self, stop: threading.Event | None = None, budget: timedelta | None = None, plan: Plan | None = None,
        **more: Any,
    ) -> RunRecord:  # fmt: skip
        self.told.clear()
        return Runner(
            plan or tea(self.kitchen), self.journal, self.clock, stop=stop, budget=budget, notify=self.told.append,
            **more,
        ).run()  # fmt: skip

    def kinds(self, step: str) -> list[str]:
        return [str(entry.kind) for entry in self.journal.entries() if entry.step == step]

    def last(self) -> Entry:
        return self.journal.entries()[-1]


@pytest.fixture
def stove() -> Stove:
    clock = FakeClock()
    return Stove(clock, Kitchen(clock), MemoryJournal(clock), [])


def test_a_run_writes_down_intent_act_and_fact_in_that_order(stove: Stove) -> None:
    record = stove.run()
    assert stove.kinds("check") == ["intended", "reached"]
    assert stove.kinds("switch-on") == ["intended", "acting", "acted", "reached"]
    assert stove.kinds("pour") == ["intended", "acting", "acted", "acting", "acted", "reached"]
    assert [stove.journal.entries()[0].kind, stove.last().kind] == [Kind.STARTED, Kind.FINISHED]
    assert record.facts()["pour"] == {"cups": ["hers", "his"]}
    assert (stove.kitchen.clicks, stove.last().data) == (1, {"outcome": "done"})


def test_a_finished_run_is_left_alone(stove: Stove) -> None:
    stove.run()
    before = stove.journal.entries()
    assert stove.run().finished
    assert stove.journal.entries() == before


def test_what_was_seen_is_written_down_only_when_it_changes(stove: Stove) -> None:
    stove.run()
    seen = [entry.data for entry in stove.journal.entries() if entry.kind is Kind.OBSERVED]
    assert seen == [{"minutes": [0]}, {"minutes": [1]}]


def test_the_runner_looks_again_at_the_moment_a_step_names(stove: Stove) -> None:
    facts = stove.run().facts()
    steeped = next(e for e in stove.journal.entries() if e.step == "steep" and e.kind is Kind.REACHED)
    assert steeped.at.isoformat() == facts["steep"]["until"]


def test_a_world_that_cannot_be_read_is_read_again(stove: Stove) -> None:
    stove.kitchen.surprises["boil"] = [Transient("steam"), Transient("more steam")]
    stove.run()
    assert [p.message for p in stove.told if p.kind == "retrying"] == ["steam", "more steam"]
    assert stove.kinds("boil")[-1] == "reached"


def test_patience_ends_and_the_run_can_be_taken_up_again(stove: Stove) -> None:
    stove.kitchen.surprises["boil"] = [Transient(f"steam {n}") for n in range(1000)]
    with pytest.raises(Transient):
        stove.run()
    waited = stove.clock.now() - next(e.at for e in stove.journal.entries() if e.step == "boil")
    assert PATIENCE <= waited <= PATIENCE + timedelta(minutes=1)
    assert stove.last().kind is Kind.PAUSED
    stove.kitchen.surprises.clear()
    assert stove.run().finished
    assert stove.kitchen.clicks == 1


@pytest.mark.parametrize("where", ["switch-on", "switch-on: answer"])
def test_an_interrupted_act_is_looked_for_before_it_is_repeated(stove: Stove, where: str) -> None:
    stove.kitchen.surprises[where] = [ANSWER_LOST]
    stove.run()
    assert stove.kitchen.clicks == 1
    acts = [k for k in stove.kinds("switch-on") if k.startswith("act")]
    assert acts == (["acting", "acting", "acted"] if where == "switch-on" else ["acting"])
    assert [p.message for p in stove.told if p.kind == "interrupted"] == ["the answer was lost"]


def test_a_refused_act_did_nothing_so_a_resumed_run_begins_with_the_checks(stove: Stove) -> None:
    stove.kitchen.surprises["switch-on"] = [lambda: stove.kitchen.power(False)]
    with pytest.raises(Unsafe):
        stove.run()
    assert stove.last().data == {"why": "the switch is stuck", "exit": int(Exit.ERROR)}
    stove.kitchen.power(True)
    stove.clock.sleep(3600)
    assert stove.run().finished
    assert stove.kinds("check") == ["intended", "reached", "resumed", "intended", "reached"]
    assert stove.kinds("switch-on").count("intended") == 2
    assert stove.kitchen.clicks == 1


def test_a_refusal_after_an_interrupted_act_keeps_the_baseline(stove: Stove) -> None:
    stove.kitchen.surprises["switch-on"] = [Transient("flicker"), lambda: stove.kitchen.power(False)]
    with pytest.raises(Unsafe):
        stove.run()
    stove.kitchen.power(True)
    stove.clock.sleep(3600)
    assert stove.run().finished
    assert stove.kinds("check") == ["intended", "reached"]
    assert stove.kinds("switch-on").count("intended") == 1
    assert stove.kitchen.clicks == 1


def test_what_was_checked_before_an_act_is_history_once_the_act_may_have_happened(stove: Stove) -> None:
    stove.kitchen.surprises["switch-on: answer"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        stove.run()
    stove.kitchen.power(False)  # would block the check, but the kettle is on
    assert stove.run().finished
    assert stove.kinds("check") == ["intended", "reached"]
    assert stove.kitchen.clicks == 1


def test_a_resumed_run_checks_again_and_draws_its_baseline_anew_if_nothing_was_done(stove: Stove) -> None:
    stop = threading.Event()
    stove.kitchen.surprises["check"] = [stop.set]
    with pytest.raises(ResumeLater, match=r"prepare/switch-on: asked to stop; run the same command again"):
        stove.run(stop)
    assert stove.kinds("switch-on") == ["intended", "paused"]

    stove.clock.sleep(60)
    later = stove.clock.now().isoformat()
    record = stove.run()
    assert stove.told[0] == Progress("resumed", "prepare", "check", "resuming from prepare/check")
    assert stove.kinds("check") == ["intended", "reached", "resumed", "intended", "reached"]
    assert record.facts()["check"] == {"at": later}
    assert record.steps["switch-on"].intent is not None
    assert record.steps["switch-on"].intent.data["drawn"] == later


def test_a_blocked_run_goes_on_once_somebody_has_seen_to_it(stove: Stove) -> None:
    stove.kitchen.mains = False
    with pytest.raises(Blocked, match="no power"):
        stove.run()
    assert (stove.last().kind, stove.last().data) == (Kind.CONTRADICTED, {"why": "no power", "exit": Exit.BLOCKED})
    stove.kitchen.mains = True
    assert stove.run().finished


def test_an_error_that_a_step_raises_is_written_down_like_one_it_returns(stove: Stove) -> None:
    stove.kitchen.surprises["boil"] = [NeedsOperator("the lid is off")]
    with pytest.raises(NeedsOperator):
        stove.run()
    assert (stove.last().kind, stove.last().step) == (Kind.CONTRADICTED, "boil")
    assert stove.last().data["why"] == "the lid is off"


def test_nothing_to_do_ends_the_run(stove: Stove) -> None:
    stove.kitchen.thirsty = False
    with pytest.raises(NothingToDo):
        stove.run()
    assert stove.last().data == {"outcome": "nothing-to-do", "why": "nobody is thirsty"}


def test_asked_to_stop_it_stops_at_the_next_checkpoint_with_everything_on_record(stove: Stove) -> None:
    stop = threading.Event()
    stove.clock.after(60, stop.set)
    with pytest.raises(ResumeLater, match="brew/boil"):
        stove.run(stop)
    assert stove.clock.now() - stove.journal.entries()[0].at < timedelta(seconds=75)
    assert (stove.last().kind, stove.last().data) == (Kind.PAUSED, {"why": "asked to stop"})
    assert stove.run().finished
    assert stove.kitchen.clicks == 1


def test_a_spent_time_budget_stops_it_too_and_deadlines_do_not_start_again(stove: Stove) -> None:
    with pytest.raises(ResumeLater, match="time budget"):
        stove.run(budget=timedelta(minutes=4))
    assert stove.last().step == "steep"
    deadline = RunRecord.of(stove.journal.entries()).steps["steep"].intent
    assert deadline is not None
    stove.clock.sleep(3600)
    before = stove.clock.now()
    facts = stove.run().facts()
    assert facts["steep"] == deadline.data
    assert stove.clock.now() == before


def test_the_order_is_on_record_from_the_first_entry_and_again_when_the_run_is_taken_up(stove: Stove) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(ResumeLater):
        stove.run(stop, order={"leaves": "green"})
    assert RunRecord.of(stove.journal.entries()).order == {"leaves": "green"}
    assert stove.run(order={"leaves": "black"}).order == {"leaves": "black"}
    assert stove.journal.entries()[0].data == {"order": {"leaves": "green"}}


def test_a_run_that_is_held_stays_where_it_is_with_the_lease_and_then_checks_again(stove: Stove) -> None:
    stove.journal = journal = CountingJournal(stove.clock)
    held = ["no milk"]
    stove.clock.after(3600, held.clear)
    record = stove.run(hold=lambda: held[0] if held else None)
    assert record.finished
    assert stove.kinds("check")[:3] == ["intended", "paused", "resumed"]
    assert [entry.data for entry in journal.entries() if entry.kind is Kind.PAUSED] == [{"why": "no milk"}]
    assert [p.message for p in stove.told if p.kind == "paused"] == ["no milk"]
    gaps = [after - before for before, after in zip(journal.renewals, journal.renewals[1:], strict=False)]
    assert max(gaps) <= timedelta(seconds=5)
    clicked = next(entry.at for entry in journal.entries() if entry.kind is Kind.ACTING)
    assert timedelta(hours=1) <= clicked - journal.entries()[0].at <= timedelta(hours=1, seconds=15)


def test_held_before_an_act_it_checks_again_before_it_acts(stove: Stove) -> None:
    """The check was good an hour ago; by now there is no power."""
    held: list[str] = []
    stove.kitchen.surprises["check"] = [lambda: held.append("no milk")]
    stove.clock.after(3599, lambda: stove.kitchen.power(False))
    stove.clock.after(3600, held.clear)
    with pytest.raises(Blocked, match="no power"):
        stove.run(hold=lambda: held[0] if held else None)
    assert stove.kinds("switch-on") == ["intended", "paused", "resumed"]
    assert stove.kitchen.clicks == 0


def test_a_run_that_is_held_still_stops_when_told_to(stove: Stove) -> None:
    stop = threading.Event()
    stove.clock.after(60, stop.set)
    with pytest.raises(ResumeLater, match="asked to stop"):
        stove.run(stop, hold=lambda: "no milk")
    assert stove.run().finished


class Doze(Step):
    """Takes so long that what was checked before may no longer be so."""

    name, title = "doze", "close your eyes for a moment"

    def __init__(self, length: timedelta) -> None:
        self.length = length

    def intend(self, view: View) -> Data:
        return {"until": (view.now + self.length).isoformat()}

    def observe(self, view: View) -> Observation:
        return Reached() if view.now.isoformat() >= view.intent["until"] else NotYet("dozing")


@pytest.mark.parametrize(("minutes", "checks"), [(14, 1), (16, 2)])
def test_a_check_that_has_gone_stale_is_made_again_before_the_act(stove: Stove, minutes: int, checks: int) -> None:
    prepare, brew, serve = tea(stove.kitchen).phases
    check, switch_on = prepare.steps
    dozing = Phase("prepare", "Prepare", (check, Doze(timedelta(minutes=minutes)), switch_on))
    stove.run(plan=Plan((dozing, brew, serve), poll=timedelta(seconds=10), fresh=timedelta(minutes=15)))
    assert stove.kinds("check").count("reached") == checks
    assert stove.kinds("doze").count("reached") == 1
    clicked = next(e.at for e in stove.journal.entries() if e.step == "switch-on" and e.kind is Kind.ACTING)
    last_check = [e.at for e in stove.journal.entries() if e.step == "check" and e.kind is Kind.REACHED][-1]
    assert clicked - last_check <= timedelta(minutes=15)
    assert stove.kitchen.clicks == 1


def test_the_plan_says_what_to_call_the_end(stove: Stove) -> None:
    named = replace(tea(stove.kitchen), outcome=lambda facts: f"{len(facts['pour']['cups'])} cups")
    stove.run(plan=named)
    assert stove.last().data == {"outcome": "2 cups"}


def test_a_step_can_end_the_run_for_good(stove: Stove) -> None:
    stove.kitchen.surprises["boil"] = [Aborted("the guests have left")]
    with pytest.raises(Aborted):
        stove.run()
    assert stove.last().data == {"outcome": "aborted", "why": "the guests have left"}
    before = stove.journal.entries()
    assert stove.run().finished
    assert stove.journal.entries() == before


def test_how_a_goal_was_reached_may_be_worth_a_line(stove: Stove) -> None:
    class Sing(Step):
        name, title = "sing", "sing"

        def observe(self, view: View) -> Observation:
            return Reached(say="in tune")

    stove.run(plan=Plan((Phase("p", "P", (Sing(),)),)))
    assert [(p.kind, p.message) for p in stove.told if p.kind == "reached"] == [("reached", "in tune")]


class CountingJournal(MemoryJournal):
    """Says when the lease was renewed, and loses it when told to."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.clock = clock
        self.renewals = [clock.now()]
        self.loses_at: int | None = None

    def renew(self) -> None:
        self.renewals.append(self.clock.now())

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        if len(self.entries()) == self.loses_at:
            raise LeaseLost("taken over")
        return super().append(kind, phase, step, data)


def test_the_lease_is_renewed_every_few_seconds_also_while_the_world_cannot_be_read(stove: Stove) -> None:
    journal = CountingJournal(stove.clock)
    stove.journal = journal
    stove.kitchen.surprises["boil"] = [Transient("steam")] * 9
    stove.run()
    gaps = [after - before for before, after in zip(journal.renewals, journal.renewals[1:], strict=False)]
    assert max(gaps) <= timedelta(seconds=5)
    assert stove.clock.now() - journal.renewals[-1] <= timedelta(seconds=5)


@pytest.mark.parametrize("entries", range(1, 12))
def test_whoever_loses_the_lease_stops_at_its_next_write_and_does_nothing_more(stove: Stove, entries: int) -> None:
    journal = CountingJournal(stove.clock)
    journal.loses_at = entries
    stove.journal = journal
    with pytest.raises(LeaseLost):
        stove.run()
    assert len(journal.entries()) == entries
    acted = sum(entry.kind is Kind.ACTING for entry in journal.entries())
    assert stove.kitchen.clicks + len(stove.kitchen.poured) == acted


class Vow(Step):
    """Asks to act, and cannot."""

    name, title = "vow", "promise"

    def observe(self, view: View) -> Observation:
        return NotYet("idle", act=True)


class Nonsense(Step):
    """States a fact that no journal can hold."""

    name, title = "nonsense", "state the unspeakable"

    def observe(self, view: View) -> Observation:
        return Reached({"what": object()})


def test_a_step_that_asks_to_act_and_cannot_is_a_bug_and_says_so(stove: Stove) -> None:
    with pytest.raises(Corrupt, match="'vow'"):
        Runner(Plan((Phase("p", "P", (Vow(),)),)), stove.journal, stove.clock).run()


def test_a_fact_that_json_cannot_express_is_found_by_the_first_test(stove: Stove) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Runner(Plan((Phase("p", "P", (Nonsense(),)),)), stove.journal, stove.clock).run()


def test_step_names_are_keys_so_they_must_not_repeat() -> None:
    with pytest.raises(Corrupt, match="repeat in the plan: vow"):
        Plan((Phase("a", "A", (Vow(),)), Phase("b", "B", (Vow(),))))
