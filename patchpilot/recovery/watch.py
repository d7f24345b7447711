"""One pass after another until told to stop, whatever goes away meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator
from patchpilot.recovery.inventory import Backlog
from patchpilot.recovery.sweep import Sweep


@dataclass(frozen=True)
class Pass:
    """One pass that came to its end."""

    sweep: Sweep
    backlog: Backlog
    seconds: float = 0.0
    """How long it took."""


class Audience(Protocol):
    """Who is told how it goes."""

    def passed(self, done: Pass) -> None:
        """A pass came to its end."""

    def failed(self, error: Exception) -> None:
        """A pass did not: what it had done by then stays done."""


class Audiences:
    """Several of them."""

    def __init__(self, *audiences: Audience) -> None:
        self._audiences = audiences

    def passed(self, done: Pass) -> None:
        for audience in self._audiences:
            audience.passed(done)

    def failed(self, error: Exception) -> None:
        for audience in self._audiences:
            audience.failed(error)


def watch(
    look: Callable[[], tuple[Sweep, Backlog]],
    every: timedelta,
    stop: threading.Event,
    audience: Audience,
    *,
    afresh: Callable[[], None],
    clock: Clock = SYSTEM,
) -> None:
    """Make passes, ``every`` so long after the end of the one before, until ``stop`` is set; then end the present one.

    :param look: one pass.
    :param afresh: called after a pass that failed, so that the next one does not meet the connections of this one.
    :raises NeedsOperator: by the very first pass: what is set up wrong does not get better by waiting. Later on it is a
        failure as any other, because what was right may be restored, fail over, or be migrated meanwhile.
    """
    proven = False
    while not stop.is_set():
        began = clock.monotonic()
        try:
            sweep, backlog = look()
        except Exception as error:  # whatever it is, the next pass may fare better, and somebody counts on it
            if not proven and isinstance(error, NeedsOperator):
                raise
            audience.failed(error)
            afresh()
        else:
            proven = True
            audience.passed(Pass(sweep, backlog, clock.monotonic() - began))
        clock.wait(stop, every.total_seconds())
