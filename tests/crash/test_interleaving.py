"""Hypothesis interleaves processes that want the same run: killed, doubled, frozen, told stale things.

The engine, the phases, the pilot's adapter and the simulator are the real ones; nodes are made of paper, and the clock
is a fake. The journal is one in memory with the lease of the durable one; in fewer examples it is the durable one.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Entry, Kind, RunRecord
from patchpilot.engine.runner import Runner
from patchpilot.errors import LeaseLost, LockHeld, PatchpilotError, Transient
from patchpilot.lab import scenario as scenarios
from patchpilot.phases import runbook
from patchpilot.postgres.connection import Database
from patchpilot.recovery.findings import Window
from tests.crash.killing import Kill
from tests.crash.puppets import Gated, Puppet, PuppetClock
from tests.crash.simulated import SimulatedWorld, lab_settings
from tests.crash.stores import LEASE, Held, MemoryStore, PostgresStore, Store
from tests.crash.world import World, desk

SCENARIOS = (
    "stale-answers", "slow-to-show", "bad-day", "lost-answer", "vanishing", "second-failover", "failover-in-grace",
    "slow-sync",
)  # fmt: skip
"""Some that end well, and in which nobody but the pilot starts the update."""

PROMPT = timedelta(seconds=1)
"""How long a request may take from its announcement in the journal until it reaches AWS. Of one that is held up for
longer than the lease and `runbook.settle`, and arrives all the same, nothing is promised: AWS takes no token."""

CALLS = frozenset({"update_actions", "group", "events", "survey"})
EFFECTS = frozenset({"apply", "recover"})
GATES = (
    "acting trigger/trigger", "apply", "apply, answered", "acted trigger/trigger", "reached trigger/trigger",
    "observed watch/watch", "reached watch/watch", "intended grace/grace", "reached grace/grace",
    "acting recover/recover", "recover", "recover, answered", "reached verify/verify", "finished /",
)  # fmt: skip
"""Where it is worst to be killed, or to be overtaken."""

MOST_PROCESSES = 3
MOST_STEPS = 20_000


a_process = st.integers(0, MOST_PROCESSES - 1)


class Interleaving(RuleBasedStateMachine):
    """Processes of one run.

    :param keep: makes the store of the journal.
    """

    def __init__(self, keep: Callable[[FakeClock], Store]) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.store = keep(self.clock)
        self.directory = tempfile.TemporaryDirectory(prefix="patchpilot-interleaving-")
        self.names = itertools.count(1)
        self.processes: list[Puppet] = []

    @initialize(name=st.sampled_from(SCENARIOS))
    def begin(self, name: str) -> None:
        played = scenarios.read(scenarios.find(name))
        self.world = SimulatedWorld(self.clock, played)
        self.settings = lab_settings(played)
        self._start(remote=False)

    @property
    def alive(self) -> list[Puppet]:
        return [process for process in self.processes if process.alive]

    @property
    def finished(self) -> bool:
        return any(entry.kind is Kind.FINISHED for _, entry in self.store.written())

    # What can happen.

    @precondition(lambda self: len(self.alive) < MOST_PROCESSES and not self.finished)
    @rule(remote=st.booleans())
    def somebody_gives_the_command(self, remote: bool) -> None:
        self._start(remote=remote)

    @precondition(lambda self: self.alive)
    @rule(which=a_process, steps=st.integers(1, 12))
    def goes_on(self, which: int, steps: int) -> None:
        self._go(self.alive[which % len(self.alive)], steps)

    @precondition(lambda self: self.alive)
    @rule(which=a_process, gate=st.sampled_from(GATES))
    def goes_on_until(self, which: int, gate: str) -> None:
        process = self.alive[which % len(self.alive)]
        for _ in range(MOST_STEPS):
            if not process.alive or process.at == gate:
                return
            self._step(process)

    @precondition(lambda self: self.alive)
    @rule(which=a_process, steps=st.integers(0, 12))
    def is_killed(self, which: int, steps: int) -> None:
        """And the command given again at once, unless there are no steps."""
        self._kill(self.alive[which % len(self.alive)])
        if steps and not self.finished:
            self._go(self._start(remote=False), steps)

    @precondition(lambda self: self.alive and len(self.alive) < MOST_PROCESSES and not self.finished)
    @rule(steps=st.integers(1, 12))
    def is_overtaken(self, steps: int) -> None:
        """Everybody freezes for so long that the lease runs out, and somebody else is the first to go on."""
        self._pass(LEASE.total_seconds() + 1)
        self._go(self._start(remote=False), steps)

    @rule(seconds=st.sampled_from([0.3, 2, 12, 300]))
    def everybody_freezes(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(arrives=st.booleans())
    def an_answer_will_be_lost(self, arrives: bool) -> None:
        self.world.surprises["applied" if arrives else "apply"] = [Transient("the answer was lost")]

    # What has to be true all the time.

    @invariant()
    def the_update_was_asked_for_once_at_most(self) -> None:
        assert len(self.world.aws.requests) <= 1

    @invariant()
    def nobody_wrote_after_the_next_one_had_taken_over(self) -> None:
        tokens = [token for token, _ in self.store.written()]
        assert tokens == sorted(tokens)

    @invariant()
    def the_journal_makes_sense(self) -> None:
        entries = [entry for _, entry in self.store.written()]
        assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
        RunRecord.of(entries)

    def teardown(self) -> None:
        """Once it is undisturbed the run ends well."""
        try:
            if not any(_is_a_bug(process.fate) for process in self.processes):
                self._end()
        finally:
            for process in self.alive:
                process.kill()
            self.directory.cleanup()

    def _end(self) -> None:
        for process in self.alive:
            self._kill(process)
        if not self.store.free:
            self._pass(LEASE.total_seconds() + 1)
        self.world.surprises.clear()
        if not self.finished:
            self._to_the_end(self._start(remote=False))
        self._ended_well()

    def _ended_well(self) -> None:
        entries = [entry for _, entry in self.store.written()]
        record = RunRecord.of(entries)
        assert record.finished
        assert record.finished.data["outcome"] == "done"
        assert len(self.world.aws.requests) == 1
        recovered = [remedy.id for _, remedy in self.world.remedies]
        assert len(recovered) == len(set(recovered))
        assert not any(finding.curable for finding in self.world.stuck.values())
        claims = record.facts()["verify"]["claims"]
        assert claims
        assert all(claim["holds"] for claim in claims)

    # How.

    def _start(self, *, remote: bool) -> Puppet:
        process = Puppet(f"process {next(self.names)}", self.clock, lambda it: self._pilot(it, remote=remote))
        self.processes.append(process)
        return process

    def _pilot(self, process: Puppet, *, remote: bool) -> None:
        free = self.store.free
        try:
            held = self.store.open(process, remote=remote)
        except LockHeld:
            assert not free
            raise
        assert free
        journal = _Watched(self.store, held, process)
        world = cast(World, Gated(self.world, process, CALLS, EFFECTS))
        window = Window(self.settings.recovery.min_age, self.settings.recovery.max_age)
        plan = runbook(desk(world, journal, Path(self.directory.name), runbook=self.settings.runbook, window=window))
        try:
            Runner(plan, journal, PuppetClock(self.clock, process)).run()
        except Kill:
            raise
        except BaseException:
            held.release()
            raise
        held.release()

    def _step(self, process: Puppet) -> None:
        if process.wakes is not None and process.wakes > self.clock.now():
            self._pass((process.wakes - self.clock.now()).total_seconds())
        if process.alive:
            process.step()

    def _go(self, process: Puppet, steps: int) -> None:
        for _ in range(steps):
            if process.alive:
                self._step(process)

    def _kill(self, process: Puppet) -> None:
        process.kill()
        self.store.bury(process)

    def _pass(self, seconds: float) -> None:
        """Let time pass for everybody; a request that was announced does not take longer than it may."""
        for process in self.alive:
            if process.at == "apply" and self.clock.now() + timedelta(seconds=seconds) > process.since + PROMPT:
                process.step()
        self.clock.sleep(seconds)

    def _to_the_end(self, process: Puppet) -> None:
        for _ in range(MOST_STEPS):
            if not process.alive:
                assert process.fate is None, process.fate
                return
            self._step(process)
        raise AssertionError(f"{process.name} does not come to an end: it is at {process.at}")


def _is_a_bug(fate: BaseException | None) -> bool:
    return fate is not None and not isinstance(fate, (PatchpilotError, Kill))


class _Watched:
    """A journal whose writes are watched: who lost the lease writes nothing, and hears of it."""

    def __init__(self, store: Store, held: Held, process: Puppet) -> None:
        self._store = store
        self._held = held
        self._process = process
        self.run_id = held.run_id
        self.entries, self.renew = held.entries, held.renew

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Any = None) -> Entry:
        self._process.gate(f"{kind} {phase}/{step}")
        before, lost = len(self._store.written()), self._store.token != self._held.token
        try:
            entry = self._held.append(kind, phase, step, data)
        except LeaseLost:
            assert lost
            assert len(self._store.written()) == before
            raise
        assert not lost
        return entry


def interleave(keep: Callable[[FakeClock], Store], examples: int, *, shrink: bool = True) -> None:
    phases = [phase for phase in Phase if shrink or phase is not Phase.shrink]
    rules = settings(
        max_examples=examples, stateful_step_count=30, deadline=None, phases=phases,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(lambda: Interleaving(keep), settings=rules)  # type: ignore[no-untyped-call]


def on_postgresql(dsn: str, examples: int) -> None:
    clusters = (f"cluster-{number}" for number in itertools.count())
    with closing(Database(dsn)) as database:
        # To make a failure smaller takes too long here; one that is about the lease fails in memory as well.
        interleave(lambda clock: PostgresStore(database, next(clusters), clock), examples, shrink=False)


@pytest.mark.timeout(900)  # a failure is made smaller before it is shown, and that takes minutes
def test_some_interleavings() -> None:
    interleave(MemoryStore, 40)


@pytest.mark.timeout(900)
def test_some_interleavings_on_postgresql(migrated: str) -> None:
    on_postgresql(migrated, 3)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_many_interleavings() -> None:
    interleave(MemoryStore, 1000)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_many_interleavings_on_postgresql(migrated: str) -> None:
    on_postgresql(migrated, 60)
