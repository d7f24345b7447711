"""Processes that do one thing at a time, when they are told to: what lets a test choose how they interleave.

Each is a thread that stops at a gate before whatever others could notice: an entry of the journal, a call, a pause.
Only one of them runs at any moment, and never while the test does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from patchpilot.clock import FakeClock
from patchpilot.errors import PatchpilotError
from tests.crash.killing import Kill

PATIENCE = 60.0


class Puppet:
    """One process.

    :param body: what it does; given the puppet, so that it can stop at gates.
    """

    def __init__(self, name: str, clock: FakeClock, body: Callable[[Puppet], object]) -> None:
        self.name = name
        self.at = "the beginning"
        """The gate at which it stands."""
        self.since = clock.now()
        """Since when it stands there."""
        self.wakes: datetime | None = None
        """Until when it sleeps, if that is what it does."""
        self.fate: BaseException | None = None
        """What ended it; None while it lives, and after a good end."""
        self._clock = clock
        self._body = body
        self._killed = False
        self._go, self._stood = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def step(self) -> None:
        """Let it go on to its next gate, or to its end."""
        self._go.release()
        assert self._stood.acquire(timeout=PATIENCE), f"{self.name} got stuck after {self.at}"
        if self.at == "the end":
            self._thread.join()
            if isinstance(self.fate, Exception) and not isinstance(self.fate, PatchpilotError):
                raise self.fate

    def kill(self) -> None:
        """Kill it where it stands."""
        self._killed = True
        self.step()
        assert not self.alive, f"{self.name} survived at {self.at}"

    def gate(self, at: str, wakes: datetime | None = None) -> None:
        """Stop here until told to go on. Called by the body."""
        self.at, self.since, self.wakes = at, self._clock.now(), wakes
        self._stood.release()
        self._go.acquire()
        self.wakes = None
        if self._killed:
            raise Kill(at)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                self._body(self)
        except BaseException as fate:  # noqa: BLE001 - whatever it is, it is this process's end and not the test's
            self.fate = fate
        self.at = "the end"
        self._stood.release()


class PuppetClock:
    """The time as one process sees it. It passes only while the test says so."""

    def __init__(self, clock: FakeClock, puppet: Puppet) -> None:
        self._clock = clock
        self._puppet = puppet

    def now(self) -> datetime:
        return self._clock.now()

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._puppet.gate("asleep", self._clock.now() + timedelta(seconds=seconds))

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self.sleep(seconds)
        return event.is_set()


class Gated:
    """Something that several processes share, as one of them sees it: it stops before each call of ``calls``, and once
    more before it learns what came of those that are ``effects``."""

    def __init__(self, inner: Any, puppet: Puppet, calls: frozenset[str], effects: frozenset[str]) -> None:
        self._inner = inner
        self._puppet = puppet
        self._calls = calls
        self._effects = effects

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._calls | self._effects:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self._puppet.gate(name)
            answer = found(*arguments, **options)
            if name in self._effects:
                self._puppet.gate(f"{name}, answered")
            return answer

        return call
