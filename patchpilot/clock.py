"""Time. The only file that may read the time or sleep: everything else asks a :class:`Clock`.

That is what lets a 40-minute rotation be tested in milliseconds: :class:`FakeClock` advances at once when somebody
sleeps, and makes scheduled changes of the world happen on the way.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def now(self) -> datetime:
        """The wall-clock time, timezone-aware, in UTC. For anything that is written down."""

    def monotonic(self) -> float:
        """Seconds since some moment, never going back. For measuring how long something took."""

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass. Values of zero or less return at once."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until ``event`` is set, for ``seconds`` at most. True if it is set."""


class SystemClock:
    """The real time."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(max(seconds, 0))


class FakeClock:
    """A time that passes only when somebody sleeps.

    :param start: the first moment; any aware datetime.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = start
        self._start = start
        self._order = itertools.count()
        self._due: list[tuple[datetime, int, Callable[[], None]]] = []

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return (self._now - self._start).total_seconds()

    def sleep(self, seconds: float) -> None:
        target = self._now + timedelta(seconds=max(seconds, 0))
        while self._due and self._due[0][0] <= target:
            moment, _, change = heapq.heappop(self._due)
            self._now = max(self._now, moment)
            change()
        self._now = target

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self.sleep(seconds)
        return event.is_set()

    def after(self, seconds: float, change: Callable[[], None]) -> None:
        """Make ``change`` happen ``seconds`` from now, while somebody sleeps across that moment."""
        heapq.heappush(self._due, (self._now + timedelta(seconds=seconds), next(self._order), change))


SYSTEM = SystemClock()


class Backoff:
    """Growing pauses within a budget: 0.05 s, 0.1 s, 0.2 s ... up to ``longest``.

    :param budget: how long to go on in all, in seconds.
    """

    def __init__(self, clock: Clock, budget: float, first: float = 0.05, longest: float = 1.0) -> None:
        self._clock = clock
        self._deadline = clock.monotonic() + budget
        self._pause = first
        self._longest = longest

    def pause(self) -> bool:
        """Sleep before the next try. False, at once, if the budget is spent."""
        left = self._deadline - self._clock.monotonic()
        if left <= 0:
            return False
        self._clock.sleep(min(self._pause, left))
        self._pause = min(self._pause * 2, self._longest)
        return True
