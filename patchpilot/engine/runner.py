"""The one loop that drives a plan: intend, observe, act, wait, and write everything down first.

The loop holds to four rules.

1. The intent is committed before anything is done, the intent to act before acting, the fact before going on.
2. A first run and a resumed one take the same path: they observe first and act only if they must.
3. Whatever interrupts an act (a kill, a lost connection) leaves an attempt without an outcome. The step sees it and
   decides; the runner never assumes that an act did or did not happen.
4. Every write carries the lease. A holder that lost it stops at its next write.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from patchpilot.clock import Clock
from patchpilot.engine.journal import Journal, Kind, RunRecord, plain
from patchpilot.engine.plan import Contradicted, Data, Effect, NotYet, Observation, Phase, Plan, Reached, Step, View
from patchpilot.errors import Aborted, LeaseLost, NothingToDo, PatchpilotError, ResumeLater, Transient

T = TypeVar("T")

RENEW_EVERY = timedelta(seconds=5)
"""How often the lease is renewed while waiting; far below the lease's own length."""

PATIENCE = timedelta(minutes=10)
"""How long one observation may fail transiently before the run stops resumably."""

FIRST_PAUSE = timedelta(seconds=1)
LONGEST_PAUSE = timedelta(seconds=30)
"""Pauses between looks at a world that cannot be read: 1 s, 2 s, 4 s ... 30 s."""


OUTCOMES: dict[type[PatchpilotError], str] = {NothingToDo: "nothing-to-do", Aborted: "aborted"}
"""The errors that end a run for good, and the outcome that goes on record. All others leave it resumable."""


_PASSED_ON: tuple[type[PatchpilotError], ...] = (LeaseLost, ResumeLater, Transient, *OUTCOMES)
"""The errors that are no contradiction of a step."""


class _Again(Exception):
    """Begin again with the first step whose fact does not stand: the world has had time to change."""


@dataclass(frozen=True)
class Progress:
    """What the runner tells whoever watches it, as it happens."""

    kind: str
    phase: str = ""
    step: str = ""
    message: str = ""


class Runner:
    """Drives one run of ``plan`` to its end, or to the next place where it can be taken up again.

    :param stop: set it to make the run checkpoint and stop: from a signal handler, for example.
    :param budget: stop at a checkpoint after this long; without it the run takes as long as it takes.
    :param notify: called with every :class:`Progress`; must not raise.
    :param order: what the run was asked to do. Journalled when it starts and each time it is taken up; the engine
        makes nothing of it.
    :param hold: asked at every checkpoint: why the run has to stay there for now, or None to go on.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        clock: Clock,
        *,
        stop: threading.Event | None = None,
        budget: timedelta | None = None,
        notify: Callable[[Progress], None] = lambda _: None,
        order: Data | None = None,
        hold: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._clock = clock
        self._stop = stop or threading.Event()
        self._ends = clock.monotonic() + budget.total_seconds() if budget is not None else None
        self._notify = notify
        self._order: Data = {"order": dict(order)} if order else {}
        self._hold = hold
        self._record = RunRecord()
        self._here: set[str] = set()  # the steps whose goal was reached in this process

    def run(self) -> RunRecord:
        """Drive the plan from wherever the journal says it is.

        :raises ResumeLater: stopped at a checkpoint; the same call goes on from there.
        :raises Transient: the world could not be read for too long; likewise.
        :raises PatchpilotError: what a step's contradiction asks for; likewise, once a person has seen to it.
        """
        self._record = RunRecord.of(self._journal.entries())
        if self._record.finished:
            return self._record
        self._open()
        try:
            while (pair := self._next()) is not None:
                with suppress(_Again):
                    self._drive(*pair)
        except tuple(OUTCOMES) as reason:
            outcome = next(name for kind, name in OUTCOMES.items() if isinstance(reason, kind))
            self._write(Kind.FINISHED, data={"outcome": outcome, "why": str(reason)})
            raise
        self._write(Kind.FINISHED, data={"outcome": self._plan.outcome(self._record.facts())})
        return self._record

    def _open(self) -> None:
        if self._record.started is None:
            self._write(Kind.STARTED, data=self._order)
            return
        phase, step = self._next() or self._plan.steps()[-1]
        self._write(Kind.RESUMED, phase.name, step.name, self._order)
        self._tell("resumed", phase, step, f"resuming from {phase.name}/{step.name}")

    def _next(self) -> tuple[Phase, Step] | None:
        """The first step whose fact does not stand."""
        return next((pair for pair in self._plan.steps() if not self._holds(pair[1])), None)

    def _holds(self, step: Step) -> bool:
        """Whether the step's fact stands, so that the step need not run."""
        if self._record.step(step.name).reached is None:
            return False
        return not step.volatile or step.name in self._here or self._is_history(step)

    def _is_history(self, step: Step) -> bool:
        """Whether an OBSERVABLE step after this one may have changed the world: looking again would prove nothing."""
        names = [later.name for _, later in self._plan.steps()]
        after = names.index(step.name) + 1
        return any(
            later.effect is Effect.OBSERVABLE and self._touched(later.name) for _, later in self._plan.steps()[after:]
        )

    def _is_premature(self, step: Step) -> bool:
        """Whether the step is about to change the world on the word of a fact that has had time to go stale."""
        if step.effect is not Effect.OBSERVABLE or self._touched(step.name):
            return False
        earlier = itertools.takewhile(lambda each: each is not step, (each for _, each in self._plan.steps()))
        volatile = [each for each in earlier if each.volatile and not self._is_history(each)]
        facts = [self._record.step(each.name).reached for each in volatile]
        return any(fact is None or self._clock.now() > fact.at + self._plan.fresh for fact in facts)

    def _touched(self, name: str) -> bool:
        """Whether the step may have changed the world."""
        record = self._record.step(name)
        return record.reached is not None or any(not attempt.refused for attempt in record.attempts)

    def _drive(self, phase: Phase, step: Step) -> None:
        """Bring one step to its goal."""
        try:
            self._intend(phase, step)
            self._tell("step", phase, step, step.title)
            while not self._turn(phase, step):
                pass
        except _PASSED_ON:
            raise
        except PatchpilotError as error:
            self._write(Kind.CONTRADICTED, phase.name, step.name, {"why": str(error), "exit": int(error.exit_code)})
            raise
        self._here.add(step.name)

    def _intend(self, phase: Phase, step: Step) -> None:
        """Journal the baseline, unless an earlier process did and it still counts."""
        record = self._record.step(step.name)
        redraw = step.effect is Effect.OBSERVABLE and not self._touched(step.name)
        if record.intent is None or record.reached is not None or redraw:
            now, before = self._clock.now(), record.intent.data if record.intent else {}
            blank = View(
                self._journal.run_id, now, self._record.facts(), since=now, intent=before,
                attempts=tuple(record.attempts),
            )  # fmt: skip
            self._write(Kind.INTENDED, phase.name, step.name, self._patiently(phase, step, lambda: step.intend(blank)))

    def _turn(self, phase: Phase, step: Step) -> bool:
        """Look once, and do what that asks for. True if the goal is reached."""
        self._checkpoint(phase, step)
        observation: Observation = self._patiently(phase, step, lambda: step.observe(self._view(step)))
        match observation:
            case Reached(fact, say):
                self._write(Kind.REACHED, phase.name, step.name, fact)
                self._tell("reached", phase, step, say)
                return True
            case Contradicted(error, seen):
                if seen:
                    self._remember(phase, step, seen)
                raise error
            case NotYet(act=True) as not_yet:
                if self._is_premature(step):
                    self._here.clear()
                    raise _Again
                self._remember(phase, step, not_yet.seen)
                self._act(phase, step)
            case NotYet() as not_yet:
                self._remember(phase, step, not_yet.seen)
                self._tell("waiting", phase, step, not_yet.why)
                self._wait(not_yet)
        return False

    def _act(self, phase: Phase, step: Step) -> None:
        self._write(Kind.ACTING, phase.name, step.name)
        self._tell("acting", phase, step, step.title)
        try:
            outcome = step.act(self._view(step))
        except Transient as error:
            # Like a kill: nobody knows whether it took effect. The attempt stays without an outcome; look again.
            self._tell("interrupted", phase, step, str(error))
            self._pause(self._plan.poll)
            return
        self._write(Kind.ACTED, phase.name, step.name, outcome)

    def _remember(self, phase: Phase, step: Step, seen: Data) -> None:
        if plain(seen) != self._record.step(step.name).seen:
            self._write(Kind.OBSERVED, phase.name, step.name, seen)

    def _view(self, step: Step) -> View:
        record, resumed = self._record.step(step.name), self._record.resumed
        intended_at = record.intent.at if record.intent else self._clock.now()
        return View(
            run_id=self._journal.run_id,
            now=self._clock.now(),
            facts=self._record.facts(),
            since=max(intended_at, resumed.at) if resumed else intended_at,
            intent=record.intent.data if record.intent else {},
            intended_at=intended_at,
            attempts=tuple(record.attempts),
            contradicted_at=record.contradicted.at if record.contradicted else None,
            seen=record.seen,
        )

    def _patiently(self, phase: Phase, step: Step, look: Callable[[], T]) -> T:
        """Look, and again with growing pauses while the world cannot be read."""
        gives_up = self._clock.monotonic() + PATIENCE.total_seconds()
        pause = FIRST_PAUSE
        while True:
            try:
                return look()
            except Transient as error:
                self._tell("retrying", phase, step, str(error))
                if self._clock.monotonic() >= gives_up:
                    self._write(Kind.PAUSED, phase.name, step.name, {"why": str(error)})
                    raise
            self._pause(pause)
            self._checkpoint(phase, step)
            pause = min(pause * 2, LONGEST_PAUSE)

    def _wait(self, not_yet: NotYet) -> None:
        left = self._plan.poll
        if not_yet.until is not None:
            left = max(min(not_yet.until - self._clock.now(), left), timedelta())
        self._pause(left)

    def _pause(self, length: timedelta) -> None:
        """Let ``length`` pass, or less if asked to stop, and keep the lease meanwhile."""
        left = length.total_seconds()
        while left > 0 and not self._clock.wait(self._stop, min(left, RENEW_EVERY.total_seconds())):
            left -= RENEW_EVERY.total_seconds()
            self._journal.renew()

    def _checkpoint(self, phase: Phase, step: Step) -> None:
        """A place where the run may stop, or stay. Everything known is already in the journal."""
        self._journal.renew()
        self._stop_if_asked(phase, step)
        if why := self._hold():
            self._stay(phase, step, why)

    def _stop_if_asked(self, phase: Phase, step: Step) -> None:
        spent = self._ends is not None and self._clock.monotonic() >= self._ends
        if not (self._stop.is_set() or spent):
            return
        why = "asked to stop" if self._stop.is_set() else "the time budget is spent"
        self._write(Kind.PAUSED, phase.name, step.name, {"why": why})
        raise ResumeLater(f"stopped in {phase.name}/{step.name}: {why}; run the same command again to go on")

    def _stay(self, phase: Phase, step: Step, why: str) -> None:
        """Stay here for as long as that is asked, with the lease; then begin again as a new process would."""
        self._write(Kind.PAUSED, phase.name, step.name, {"why": why})
        self._tell("paused", phase, step, why)
        while self._hold():
            self._pause(min(self._plan.poll, RENEW_EVERY))
            self._stop_if_asked(phase, step)
        self._write(Kind.RESUMED, phase.name, step.name, self._order)
        self._tell("resumed", phase, step, f"going on in {phase.name}/{step.name}")
        self._here.clear()
        raise _Again

    def _write(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> None:
        self._record.add(self._journal.append(kind, phase, step, plain(data or {})))

    def _tell(self, kind: str, phase: Phase, step: Step, message: str = "") -> None:
        self._notify(Progress(kind, phase.name, step.name, message))
