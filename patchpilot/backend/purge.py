"""The purge: what is over goes, in small batches beside the traffic. What is open stays, however old it is."""

from __future__ import annotations

from datetime import timedelta

from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries

SQL = queries("purge")

BATCH = 1000
"""Rows removed in one transaction: few enough to hold no lock for long."""


ROUNDS = (("messages",), ("results",), ("saved_groups",), ("parts", "chords"), ("starts",))
"""In which order, and what in turns: chords go when their parts have gone, results when their messages have."""


def purge(database: Database, retention: timedelta, batch: int = BATCH) -> dict[str, int]:
    """Remove results past their expiry, and chords, starts and left-over messages that ended ``retention`` ago.

    :param batch: how many rows to remove in one transaction.
    :returns: how many rows went, by what they were.
    :raises PatchpilotError: if PostgreSQL cannot be reached. What went is gone; call again.
    """
    asked = {"retention": retention, "batch": batch}
    removed = dict.fromkeys(SQL, 0)
    for kinds in ROUNDS:
        while any(gone := [database.execute(SQL[kind], asked) for kind in kinds]):
            for kind, number in zip(kinds, gone, strict=True):
                removed[kind] += number
    return removed
