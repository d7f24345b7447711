"""Where several processes keep one run's journal: in PostgreSQL, or in memory with a lease that works in the same way.

Both live on the fake clock of the test: a lease lasts so long after it was last renewed, and the certainly dead hold
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Entry, Journal, Kind
from patchpilot.engine.plan import Data
from patchpilot.errors import LeaseLost, LockHeld
from patchpilot.postgres.connection import Database
from patchpilot.postgres.holder import Holder
from patchpilot.postgres.journal import RunJournal, open_run
from tests.crash.puppets import Puppet

LEASE = timedelta(seconds=30)

Written = tuple[int, Entry]
"""An entry, and the token that it was written under."""


class Held(Journal, Protocol):
    """A journal under a lease."""

    @property
    def token(self) -> int: ...

    def release(self) -> None: ...


class Store(Protocol):
    """The journal that all of them want to write."""

    @property
    def token(self) -> int:
        """The token of whoever has the lease, or had it last."""

    @property
    def free(self) -> bool:
        """Whether the next who asks gets it."""

    def open(self, holder: Puppet, *, remote: bool) -> Held:
        """Take the lease.

        :param remote: on another host, so that nobody can tell whether it is dead.
        :raises LockHeld: somebody else has it.
        """

    def bury(self, dead: Puppet) -> None:
        """Let it be known, on its own host, that a process was killed."""

    def written(self) -> Sequence[Written]:
        """The journal of the first run: whoever comes after its end begins another one, and finds nothing to do."""


class MemoryStore:
    """The lease of :mod:`patchpilot.postgres.journal`, without PostgreSQL."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.token = 0
        self.until = clock.now()
        self.lines: list[Written] = []
        self._holder: tuple[Puppet, bool] | None = None

    @property
    def free(self) -> bool:
        return self.until <= self.clock.now()

    def open(self, holder: Puppet, *, remote: bool) -> Held:
        if not self.free:
            raise LockHeld("somebody else has it")
        self.token += 1
        self.until = self.clock.now() + LEASE
        self._holder = (holder, remote)
        return _MemoryJournal(self, self.token)

    def bury(self, dead: Puppet) -> None:
        if self._holder == (dead, False):
            self.until = self.clock.now()

    def written(self) -> Sequence[Written]:
        return tuple(self.lines)


class _MemoryJournal:
    run_id = "run"

    def __init__(self, store: MemoryStore, token: int) -> None:
        self._store = store
        self.token = token

    def entries(self) -> Sequence[Entry]:
        return tuple(entry for _, entry in self._store.lines)

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        self._check()
        entry = Entry(len(self._store.lines) + 1, self._store.clock.now(), kind, phase, step, data or {})
        self._store.lines.append((self.token, entry))
        return entry

    def renew(self) -> None:
        self._check()
        self._store.until = self._store.clock.now() + LEASE

    def release(self) -> None:
        if self.token == self._store.token:
            self._store.until = self._store.clock.now()

    def _check(self) -> None:
        if self.token != self._store.token:
            raise LeaseLost("taken over")


class PostgresStore:
    """The real one. PostgreSQL's own clock is kept out of it: a lease has run out when the fake clock says so."""

    def __init__(self, database: Database, cluster: str, clock: FakeClock) -> None:
        self._database = database
        self._cluster = cluster
        self._clock = clock
        self._until = clock.now()
        self._holder: Puppet | None = None

    @property
    def token(self) -> int:
        rows = self._database.fetch("SELECT token FROM patchpilot.lease WHERE cluster = %s", [self._cluster])
        return int(rows[0]["token"]) if rows else 0

    @property
    def free(self) -> bool:
        return self._until <= self._clock.now()

    def open(self, holder: Puppet, *, remote: bool) -> Held:
        if self.free:
            self._database.execute("UPDATE patchpilot.lease SET until = now() WHERE cluster = %s", [self._cluster])
        who = replace(Holder.here(), host="elsewhere", machine="another") if remote else Holder.here()
        journal = open_run(self._database, "test", self._cluster, who, timedelta(days=1), clock=self._clock)
        self._holder = holder
        self.renewed()
        return _PostgresJournal(self, journal)

    def bury(self, dead: Puppet) -> None:
        """As if its pid were another process's by now. Of one on another host that proves nothing."""
        if self._holder is dead:
            self._database.execute(
                """UPDATE patchpilot.lease SET holder = holder || '{"began": "0"}' WHERE cluster = %s""",
                [self._cluster],
            )
            [row] = self._database.fetch("SELECT holder FROM patchpilot.lease WHERE cluster = %s", [self._cluster])
            if Holder(**row["holder"]).is_certainly_dead():
                self._until = self._clock.now()

    def renewed(self) -> None:
        self._until = self._clock.now() + LEASE

    def released(self) -> None:
        self._until = self._clock.now()

    def written(self) -> Sequence[Written]:
        rows = self._database.fetch(
            """SELECT run_entry.token, seq, at, kind, phase, step, data FROM patchpilot.run_entry
               WHERE run_id = (SELECT id FROM patchpilot.run WHERE cluster = %s ORDER BY created_at LIMIT 1)
               ORDER BY seq""",
            [self._cluster],
        )
        return [
            (row["token"], Entry(row["seq"], row["at"], Kind(row["kind"]), row["phase"], row["step"], row["data"]))
            for row in rows
        ]


class _PostgresJournal:
    def __init__(self, store: PostgresStore, journal: RunJournal) -> None:
        self._store = store
        self._journal = journal
        self.run_id, self.token = journal.run_id, journal.token

    def entries(self) -> Sequence[Entry]:
        return self._journal.entries()

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        return self._journal.append(kind, phase, step, data)

    def renew(self) -> None:
        self._journal.renew()
        self._store.renewed()

    def release(self) -> None:
        if self.token == self._store.token:
            self._journal.release()
            self._store.released()
