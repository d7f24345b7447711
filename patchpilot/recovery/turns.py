"""Whose turn it is to sweep, where many could.

Any number of recoveries may run at once: each remedy is guarded. But after a failover every worker reconnects in the
same second, and hundreds of them reading all queues would be a second disturbance. So they take turns, by a row in
PostgreSQL with a lease. The lease is for economy, not for safety: one that ends too early means two sweeps at once.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries

SQL = queries("sweeps")

LEASE = timedelta(minutes=1)
"""After this long another worker may sweep, should this one have died."""


class Turn(StrEnum):
    """The answer to who asks for it."""

    OURS = "ours"
    TAKEN = "taken"
    """Somebody sweeps now: ask again."""
    COVERED = "covered"
    """Somebody has, and began late enough to see what there was to see."""


class Turns:
    """The turns of one broker's workers.

    :param broker: its name in the record.
    :param holder: who asks, a UUID.
    """

    def __init__(self, database: Database, broker: str, holder: str) -> None:
        self._database = database
        self._key = {"broker": broker, "holder": holder}

    def take(self, since: timedelta) -> Turn:
        """Ask for a turn, unless a whole sweep began in the time ``since`` that went by.

        :raises PatchpilotError: PostgreSQL cannot be asked.
        """
        asked = {**self._key, "since": since, "lease": LEASE}
        if self._database.fetch(SQL["take"], asked):
            return Turn.OURS
        return Turn.COVERED if self._database.fetch(SQL["covered"], asked) else Turn.TAKEN

    def end(self, *, whole: bool) -> None:
        """The turn is over.

        :param whole: the sweep came to its end.
        :raises PatchpilotError: PostgreSQL cannot be asked. The lease ends by itself.
        """
        self._database.execute(SQL["end"], {**self._key, "whole": whole})
