"""What a plan is made of: phases, their steps, and what a step may see and say.

A step owns one goal and at most one effect. It never loops, sleeps, retries or writes the journal: the runner does.
It must hold to one rule, which is what makes a resumed run and a first run the same thing:

    *Look before acting.* ``observe`` says whether the goal is reached, from the world alone. ``act`` is called only
    after ``observe`` asked for it, and after the intent to act is on record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from patchpilot.errors import Corrupt, PatchpilotError

Data = Mapping[str, Any]
"""What the journal stores: a mapping that JSON can express."""


class Effect(StrEnum):
    """What a step does to the world, and hence how it survives ``kill -9``."""

    READ = "read"
    """Nothing: repeat it."""
    OBSERVABLE = "observable"
    """A change that can be seen afterwards: the baseline is in the intent; look before acting again. A resumed run
    draws the baseline anew if nothing was done yet."""
    PUBLISH = "publish"
    """Messages sent: each is claimed in the database before it leaves, so a repetition sends only what is missing."""


@dataclass(frozen=True)
class Reached:
    """The goal is reached. ``fact`` goes into the journal and is what later steps and the report see.

    :param say: one short line for a person, if how it was reached is worth one.
    """

    fact: Data = field(default_factory=dict)
    say: str = ""


@dataclass(frozen=True)
class NotYet:
    """The goal is not reached.

    :param why: one short line for a person.
    :param act: true asks the runner to act now; false, to wait and look again.
    :param until: when to look again, if later than the usual poll interval.
    :param seen: what is worth remembering. Journalled whenever it changes, and handed back as ``View.seen``.
    """

    why: str
    act: bool = False
    until: datetime | None = None
    seen: Data = field(default_factory=dict)


@dataclass(frozen=True)
class Contradicted:
    """The goal cannot be reached as things are. The error says who has to do what; the run stays resumable.

    :param seen: what is worth remembering, as for :class:`NotYet`.
    """

    error: PatchpilotError
    seen: Data = field(default_factory=dict)


Observation = Reached | NotYet | Contradicted


@dataclass(frozen=True)
class Attempt:
    """One time the runner set out to act. Without an outcome it was interrupted: it may have taken effect or not."""

    at: datetime
    outcome: Data | None = None

    @property
    def interrupted(self) -> bool:
        return self.outcome is None

    @property
    def refused(self) -> bool:
        """Whether the far side said that it did nothing."""
        return self.outcome is not None and bool(self.outcome.get("refused"))


@dataclass(frozen=True)
class View:
    """What a step may know: the journal's side of the story. The world it reads for itself."""

    run_id: str
    now: datetime
    facts: Mapping[str, Data]
    """Facts of the steps before, by step name."""
    since: datetime
    """When this step began, or a new process took it up again. Patience counts from here; deadlines do not."""
    intent: Data = field(default_factory=dict)
    intended_at: datetime | None = None
    attempts: tuple[Attempt, ...] = ()
    contradicted_at: datetime | None = None
    """When the step last gave up. Somebody started the run again after that."""
    seen: Data = field(default_factory=dict)
    """What the step last asked to remember, in this process or an earlier one."""


class Step(ABC):
    """One goal. Subclasses set ``name`` (the durable key: never change it), ``title`` and ``effect``."""

    name: str
    title: str
    effect: Effect = Effect.READ
    volatile: bool = False
    """A volatile fact goes stale: a resumed run establishes it anew, and so does one that has waited for longer than
    :attr:`Plan.fresh`, until an OBSERVABLE step has come after it."""

    def intend(self, view: View) -> Data:
        """The baseline, journalled before anything else: what the world looked like before this step.

        ``view.intent`` is the one before, if there was one, and ``view.attempts`` are those made since: they are
        forgotten with it.

        :raises Transient: when the world could not be read; the runner tries again.
        """
        return {}

    @abstractmethod
    def observe(self, view: View) -> Observation:
        """Look at the world. Must not change it.

        :raises Transient: when the world could not be read; the runner tries again.
        """

    def act(self, view: View) -> Data:
        """Do the one thing. Called only when :meth:`observe` asked for it.

        Returns what to record of it. A true value under ``refused`` means that the far side said it did nothing.

        :raises Transient: when it is unknown whether it took effect; the runner looks again before anything else.
        """
        raise Corrupt(f"step {self.name!r} asked to act but has no act")  # a bug in the step, found by its first test


@dataclass(frozen=True)
class Phase:
    """A named group of steps, in order. The unit that people see."""

    name: str
    title: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """Phases in order. Step names are unique across the plan, because facts are looked up by them."""

    phases: tuple[Phase, ...]
    poll: timedelta = timedelta(seconds=15)
    """How often to look again while nothing says otherwise."""
    fresh: timedelta = timedelta(minutes=15)
    """How old a volatile fact may be when an OBSERVABLE step acts on its word."""
    outcome: Callable[[Mapping[str, Data]], str] = lambda _: "done"
    """What to call the end of a run that reached every goal, from its facts."""

    def __post_init__(self) -> None:
        names = [step.name for _, step in self.steps()]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise Corrupt(f"step names repeat in the plan: {', '.join(sorted(repeated))}")

    def steps(self) -> tuple[tuple[Phase, Step], ...]:
        """Every step with its phase, in the order they run."""
        return tuple((phase, step) for phase in self.phases for step in phase.steps)
