"""A toy plan that uses all the engine has: make tea. It knows no node, no chord and no cloud."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from patchpilot.clock import FakeClock
from patchpilot.engine.plan import (
    Attempt,
    Contradicted,
    Data,
    Effect,
    NotYet,
    Observation,
    Phase,
    Plan,
    Reached,
    Step,
    View,
)
from patchpilot.errors import Blocked, NothingToDo, Transient, Unsafe

SETTLE = timedelta(seconds=20)


@dataclass
class Kitchen:
    """The world: a kettle that takes two minutes, and a switch whose effect shows five seconds late."""

    clock: FakeClock
    mains: bool = True
    clicks: int = 0
    shows_on: bool = False
    boiled: bool = False
    poured: set[str] = field(default_factory=set)
    thirsty: bool = True
    surprises: dict[str, list[BaseException | Callable[[], object]]] = field(default_factory=dict)
    """What the next looks or acts of a step meet, by step name: something to raise or something that happens."""

    def trip(self, name: str) -> None:
        if not self.surprises.get(name):
            return
        surprise = self.surprises[name].pop(0)
        if isinstance(surprise, BaseException):
            raise surprise
        surprise()

    def power(self, on: bool) -> None:
        self.mains = on

    def click(self) -> None:
        """Not idempotent: a second click would switch it off."""
        self.clicks += 1
        self.clock.after(5, lambda: setattr(self, "shows_on", True))
        self.clock.after(120, lambda: setattr(self, "boiled", True))


@dataclass
class _Kitchened(Step):
    kitchen: Kitchen


class Check(_Kitchened):
    name, title, volatile = "check", "is there power", True

    def observe(self, view: View) -> Observation:
        self.kitchen.trip(self.name)
        if not self.kitchen.thirsty:
            return Contradicted(NothingToDo("nobody is thirsty"))
        return Reached({"at": view.now.isoformat()}) if self.kitchen.mains else Contradicted(Blocked("no power"))


class SwitchOn(_Kitchened):
    name, title, effect = "switch-on", "switch the kettle on", Effect.OBSERVABLE

    def intend(self, view: View) -> Data:
        return {"on": self.kitchen.shows_on, "drawn": view.now.isoformat()}

    def observe(self, view: View) -> Observation:
        if self.kitchen.shows_on:
            return Reached({"clicks": len(view.attempts)})
        last = view.attempts[-1] if view.attempts else None
        if last is None or (last.interrupted and view.now >= last.at + SETTLE) or self._forgiven(last, view):
            return NotYet("off", act=True)
        if last.refused:
            return Contradicted(Unsafe("the switch is stuck"))
        return NotYet("clicked", until=last.at + SETTLE)

    def _forgiven(self, last: Attempt, view: View) -> bool:
        """Whether it was refused, and somebody has started the run again since."""
        return last.refused and last.at < view.since

    def act(self, view: View) -> Data:
        self.kitchen.trip(self.name)
        if not self.kitchen.mains:
            return {"refused": "no power"}
        self.kitchen.click()
        self.kitchen.trip("switch-on: answer")
        return {"clicked": True}


class Boil(_Kitchened):
    name, title = "boil", "wait until it boils"

    def observe(self, view: View) -> Observation:
        self.kitchen.trip(self.name)
        assert view.intended_at
        if self.kitchen.boiled:
            return Reached({"began": view.intended_at.isoformat()})
        minutes = (view.now - view.intended_at) // timedelta(minutes=1)
        return NotYet("still cold", seen={"minutes": (minutes,)})


class Steep(_Kitchened):
    name, title = "steep", "let it steep"

    def intend(self, view: View) -> Data:
        return {"until": (view.now + timedelta(minutes=3)).isoformat()}

    def observe(self, view: View) -> Observation:
        until = datetime.fromisoformat(view.intent["until"])
        return Reached(view.intent) if view.now >= until else NotYet("steeping", until=until)


class Pour(_Kitchened):
    name, title, effect = "pour", "fill the cups", Effect.PUBLISH
    cups = ("hers", "his")

    def observe(self, view: View) -> Observation:
        empty = [cup for cup in self.cups if cup not in self.kitchen.poured]
        return NotYet("empty cups", act=True) if empty else Reached({"cups": sorted(self.kitchen.poured)})

    def act(self, view: View) -> Data:
        cup = next(cup for cup in self.cups if cup not in self.kitchen.poured)
        self.kitchen.poured.add(cup)
        self.kitchen.trip(self.name)
        return {"cup": cup}


def tea(kitchen: Kitchen) -> Plan:
    return Plan(
        (
            Phase("prepare", "Prepare", (Check(kitchen), SwitchOn(kitchen))),
            Phase("brew", "Brew", (Boil(kitchen), Steep(kitchen))),
            Phase("serve", "Serve", (Pour(kitchen),)),
        ),
        poll=timedelta(seconds=10),
    )


ANSWER_LOST = Transient("the answer was lost")
