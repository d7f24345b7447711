"""Whether a worker that is silent has had the time to give a sign of life.

While PostgreSQL is away nobody can give one. When it is back, those that live need a moment before they are heard of
again, and recovery is often there before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from patchpilot.backend.heartbeat import RETURNS
from patchpilot.clock import Clock
from patchpilot.durations import LEAST_SILENCE


class Contact:
    """Since when one process has been in contact with PostgreSQL.

    An outage that nobody notices between two contacts is too short to make a living worker count as dead.

    :param stale: a worker counts as dead that was silent for this long.
    """

    def __init__(self, clock: Clock, stale: timedelta) -> None:
        self._clock = clock
        self._enough = min(stale, RETURNS).total_seconds()
        self._since = self._last = float("-inf")
        self._dead: dict[str, datetime] = {}

    def renew(self) -> None:
        """PostgreSQL has just answered."""
        before, self._last = self._last, self._clock.monotonic()
        if self._last - before > LEAST_SILENCE.total_seconds():
            self._since = self._last

    def owed(self, silent: Mapping[str, datetime]) -> set[str]:
        """Which of these workers may live all the same: PostgreSQL has not been there for long enough since.

        :param silent: those that were not heard of for too long: instance -> when each was last heard of. It is
            PostgreSQL's answer: this renews the contact.
        """
        self.renew()
        if self._last - self._since >= self._enough:
            self._dead = dict(silent)  # whatever becomes of PostgreSQL from now on
        return {instance for instance, seen_at in silent.items() if self._dead.get(instance) != seen_at}
