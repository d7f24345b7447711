"""The purge: what is over goes, in small batches beside the traffic. What is open stays, however old it is."""

from __future__ import annotations

from datetime import timedelta

from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries

SQL = queries("purge")

BATCH = 1000
"""Rows removed in one transaction: few enough to hold no lock for long."""


def purge(database: Database, retention: timedelta, batch: int = BATCH) -> dict[str, int]:
    """Remove results past their expiry, and chords, starts and left-over messages that ended ``retention`` ago.

    :returns: how many rows went, by what they were.
    :raises PatchpilotError: if PostgreSQL cannot be reached. What went is gone; call again.
    """
    asked = {"retention": retention, "batch": batch}
    removed = dict.fromkeys(SQL, 0)
    for what, sql in SQL.items():
        while gone := database.execute(sql, asked):
            removed[what] += gone
    return removed
