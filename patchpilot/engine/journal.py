"""The run journal: append-only, and all that a run remembers.

Whatever a run knows is a fold over its entries, so a run can be killed between any two of them. ``MemoryJournal`` is
for tests; the durable one is :mod:`patchpilot.postgres.journal`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from patchpilot.clock import Clock
from patchpilot.engine.plan import Attempt, Data
from patchpilot.errors import Corrupt


class Kind(StrEnum):
    """What an entry records."""

    STARTED = "started"
    RESUMED = "resumed"
    INTENDED = "intended"
    OBSERVED = "observed"
    ACTING = "acting"
    ACTED = "acted"
    REACHED = "reached"
    CONTRADICTED = "contradicted"
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(frozen=True)
class Entry:
    """One line of the journal. ``phase`` and ``step`` are empty for entries about the run as a whole."""

    seq: int
    at: datetime
    kind: Kind
    phase: str = ""
    step: str = ""
    data: Data = field(default_factory=dict)


class Journal(Protocol):
    """Where a run's entries are kept, by whoever holds the run's lease."""

    @property
    def run_id(self) -> str: ...

    def entries(self) -> Sequence[Entry]:
        """All entries of the run, oldest first."""

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        """Commit one entry.

        :raises LeaseLost: if somebody else holds the run now. Nothing is written then.
        :raises Transient: if the store could not be reached. The entry may have been written or not.
        """

    def renew(self) -> None:
        """Keep the lease. Called often while waiting.

        :raises LeaseLost: if somebody else holds the run now.
        """


class MemoryJournal:
    """A journal that lives and dies with the process."""

    def __init__(self, clock: Clock, run_id: str = "run", entries: Iterable[Entry] = ()) -> None:
        self.run_id = run_id
        self._clock = clock
        self._entries = list(entries)

    def entries(self) -> Sequence[Entry]:
        return tuple(self._entries)

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        entry = Entry(len(self._entries) + 1, self._clock.now(), kind, phase, step, data or {})
        self._entries.append(entry)
        return entry

    def renew(self) -> None:
        """Nobody contends for memory."""


def plain(data: Data) -> Data:
    """``data`` as every journal gives it back: lists for tuples, strings for keys.

    :raises TypeError: if JSON cannot express it.
    """
    content: Data = json.loads(json.dumps(dict(data)))
    return content


class RunState(StrEnum):
    """Where a run is, as far as the journal knows."""

    NEW = "new"
    UNDER_WAY = "under way"
    OVER = "over"


RUN_TRANSITIONS: dict[tuple[RunState, Kind], RunState] = {
    (RunState.NEW, Kind.STARTED): RunState.UNDER_WAY,
    (RunState.UNDER_WAY, Kind.RESUMED): RunState.UNDER_WAY,  # by a new process, or by this one after a pause
    (RunState.UNDER_WAY, Kind.FINISHED): RunState.OVER,
}
"""What may follow what, for the run as a whole. Steps are taken while it is under way, and nothing follows its end."""


class State(StrEnum):
    """Where a step is, as far as the journal knows."""

    NEW = "new"
    LOOKING = "looking"
    ACTING = "acting"
    """Told to act, and no word of it since: it may have taken effect or not."""
    REACHED = "reached"


TRANSITIONS: dict[tuple[State, Kind], State] = {
    (State.NEW, Kind.INTENDED): State.LOOKING,
    (State.LOOKING, Kind.INTENDED): State.LOOKING,  # taken up again before anything was done: the baseline is redrawn
    (State.LOOKING, Kind.OBSERVED): State.LOOKING,
    (State.LOOKING, Kind.ACTING): State.ACTING,
    (State.LOOKING, Kind.REACHED): State.REACHED,
    (State.LOOKING, Kind.CONTRADICTED): State.LOOKING,
    (State.LOOKING, Kind.PAUSED): State.LOOKING,
    (State.ACTING, Kind.ACTED): State.LOOKING,
    (State.ACTING, Kind.OBSERVED): State.ACTING,
    (State.ACTING, Kind.ACTING): State.ACTING,  # interrupted, looked, absent: once more
    (State.ACTING, Kind.REACHED): State.REACHED,  # interrupted, looked, there
    (State.ACTING, Kind.CONTRADICTED): State.ACTING,
    (State.ACTING, Kind.PAUSED): State.ACTING,
    (State.REACHED, Kind.INTENDED): State.LOOKING,  # a fact that went stale is established anew
    # Nobody could intend yet: the world could not be read, or forbids it.
    (State.NEW, Kind.CONTRADICTED): State.NEW,
    (State.NEW, Kind.PAUSED): State.NEW,
    (State.REACHED, Kind.CONTRADICTED): State.REACHED,
    (State.REACHED, Kind.PAUSED): State.REACHED,
}
"""What may follow what, for one step. Anything else in a journal means that it was tampered with."""


@dataclass
class StepRecord:
    """What the journal knows of one step."""

    state: State = State.NEW
    intent: Entry | None = None
    attempts: list[Attempt] = field(default_factory=list)
    seen: Data = field(default_factory=dict)
    contradicted: Entry | None = None
    reached: Entry | None = None

    def add(self, entry: Entry) -> None:
        """Take one more entry about this step into account.

        :raises Corrupt: if it cannot follow what came before.
        """
        state = TRANSITIONS.get((self.state, entry.kind))
        if state is None:
            raise Corrupt(
                f"entry {entry.seq} of the journal ({entry.kind} in {entry.phase}/{entry.step}) cannot follow "
                f"{self.state}: the journal was changed by somebody else"
            )
        self.state = state
        match entry.kind:
            case Kind.INTENDED:
                # A step that is established anew begins anew.
                self.intent, self.attempts, self.seen = entry, [], {}
                self.contradicted = self.reached = None
            case Kind.OBSERVED:
                self.seen = entry.data
            case Kind.ACTING:
                self.attempts.append(Attempt(entry.at))
            case Kind.ACTED:
                self.attempts[-1] = Attempt(self.attempts[-1].at, entry.data)
            case Kind.REACHED:
                self.reached = entry
            case Kind.CONTRADICTED:
                self.contradicted = entry


@dataclass
class RunRecord:
    """What the journal knows of a run: the fold over its entries."""

    state: RunState = RunState.NEW
    steps: dict[str, StepRecord] = field(default_factory=dict)
    started: Entry | None = None
    resumed: Entry | None = None
    """The last time it was taken up again."""
    finished: Entry | None = None

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> RunRecord:
        """Fold ``entries``, oldest first.

        :raises Corrupt: if they contradict each other.
        """
        record = cls()
        for entry in entries:
            record.add(entry)
        return record

    def step(self, name: str) -> StepRecord:
        """The record of the step called ``name``, empty if nothing is known of it."""
        return self.steps.setdefault(name, StepRecord())

    def facts(self) -> dict[str, Data]:
        """The facts of all steps that reached their goal."""
        return {name: step.reached.data for name, step in self.steps.items() if step.reached}

    @property
    def order(self) -> Data:
        """What the run was last asked to do; empty if nobody wrote it down."""
        last = self.resumed or self.started
        return dict(last.data.get("order", {})) if last else {}

    def add(self, entry: Entry) -> None:
        """Take one more entry into account.

        :raises Corrupt: if it cannot follow what came before.
        """
        of_run = entry.kind in {kind for _, kind in RUN_TRANSITIONS}
        state = RUN_TRANSITIONS.get((self.state, entry.kind)) if of_run else self.state
        if state is None or (self.state is not RunState.UNDER_WAY and not of_run):
            raise Corrupt(
                f"entry {entry.seq} of the journal ({entry.kind}) cannot follow: the run is {self.state}. "
                "The journal was changed by somebody else"
            )
        self.state = state
        match entry.kind:
            case Kind.STARTED:
                self.started = entry
            case Kind.RESUMED:
                self.resumed = entry
            case Kind.FINISHED:
                self.finished = entry
            case _:
                self.step(entry.step).add(entry)
