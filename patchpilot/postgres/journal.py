"""The durable run journal, and the lease that says who may write to it.

One lease per environment and cluster. Each acquisition raises its fencing token; every write carries the token and is
refused once somebody else has taken over, however late the write arrives. Leases run on PostgreSQL's clock.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, NoReturn, Self

from psycopg.types.json import Jsonb

from patchpilot.clock import SYSTEM, Clock
from patchpilot.dsn import masked
from patchpilot.engine.journal import Entry, Kind
from patchpilot.engine.plan import Data
from patchpilot.errors import Corrupt, LeaseLost, LockHeld, PatchpilotError, Transient, Usage
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.holder import Holder
from patchpilot.postgres.migrate import migrations
from patchpilot.postgres.queries import queries

LEASE = timedelta(seconds=30)
"""How long a holder that nobody can ask keeps its lease: a pilot on another host, say, that was killed."""


LATELY = timedelta(hours=1)
"""How long a run that finished, but whose process died before it could say so, is taken up by the same command."""


@dataclass(frozen=True)
class Lease:
    """Who holds a run, or held it last."""

    token: int
    holder: Holder
    since: datetime
    until: datetime
    running: bool
    """Whether it is still good by PostgreSQL's clock. Its holder may be dead all the same."""

    @property
    def live(self) -> bool:
        """Whether a rival has to wait."""
        return self.running and not self.holder.is_certainly_dead()


@dataclass(frozen=True)
class Run:
    """One run, as a listing shows it."""

    id: str
    environment: str
    cluster: str
    created_at: datetime
    outcome: str | None = None
    """How it ended: ``done``, ``nothing-to-do`` or ``aborted``; None while it is unfinished."""
    finished_at: datetime | None = None
    lease: Lease | None = None
    """None if the cluster's lease has gone on to a later run."""
    last: Entry | None = None
    """Its newest entry; of the data only ``why``."""

    @property
    def state(self) -> str:
        """The outcome; or ``running``; or how it was left: ``paused``, ``contradicted`` or ``interrupted``.

        A run that was told to pause is ``paused`` while its process waits, too.
        """
        if self.outcome is not None:
            return self.outcome
        if self.lease and self.lease.live:
            return "paused" if self.last and self.last.kind is Kind.PAUSED else "running"
        if self.last and self.last.kind in {Kind.PAUSED, Kind.CONTRADICTED}:
            return str(self.last.kind)
        return "interrupted"


class RunJournal:
    """The journal of one run, for whoever holds its lease: see :class:`patchpilot.engine.journal.Journal`.

    As a context manager it renews the lease in the background, so that a long query or API call does not cost it,
    and gives it back at the end.
    """

    def __init__(
        self, database: Database, environment: str, cluster: str, run_id: str, token: int, ttl: timedelta, clock: Clock
    ) -> None:
        self.run_id = run_id
        self.token = token
        self._database = database
        self._clock = clock
        self._ttl = ttl
        self._lease = {"environment": environment, "cluster": cluster, "token": token}
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="patchpilot-lease", daemon=True)

    def entries(self) -> Sequence[Entry]:
        return entries(self._database, self.run_id)

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        at, content = self._clock.now(), masked(data or {})  # people's reasons, and errors from everywhere
        rows = self._database.fetch(
            queries("journal")["append"],
            {
                **self._lease,
                "entry_id": uuid.uuid4(),
                "at": at,
                "kind": str(kind),
                "phase": phase,
                "step": step,
                "data": Jsonb(content),
            },
        )
        if not rows:
            self._lost()
        return Entry(rows[0]["seq"], at, kind, phase, step, content)

    def renew(self) -> None:
        """Keep the lease for another term.

        :raises LeaseLost: if somebody else holds the run now.
        """
        if not self._database.execute(queries("journal")["renew_lease"], {**self._lease, "ttl": self._ttl}):
            self._lost()

    def release(self) -> None:
        """Let go at once. Without effect if somebody else holds the run by now."""
        self._database.execute(queries("journal")["release_lease"], self._lease)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._heart.join()
        with suppress(Transient):  # it runs out by itself
            self.release()

    def _beat(self) -> None:
        # The system's clock, always: a lease lives in real time, whatever clock the run is driven by.
        while not SYSTEM.wait(self._over, self._ttl.total_seconds() / 3):
            try:
                self.renew()
            except Transient:
                continue
            except PatchpilotError:
                return  # lost; the run finds out at its next write

    def _lost(self) -> NoReturn:
        raise LeaseLost(
            f"run {self.run_id} was taken over by another process: this one has stopped and wrote nothing more. "
            "Look with `patchpilot status`"
        )


def open_run(
    database: Database,
    environment: str,
    cluster: str,
    holder: Holder | None = None,
    ttl: timedelta = LEASE,
    *,
    clock: Clock = SYSTEM,
) -> RunJournal:
    """Take the cluster's lease and its unfinished run, or start a new run if there is none.

    A lease that ran out is taken over, and so is one whose holder is certainly dead: after a ``kill -9`` on this
    host the same command goes on at once. A run that has just been finished by a process that died before it could
    give its lease back is taken up as well, once: the same command then says that it is done.

    :param holder: who asks; this process by default.
    :param ttl: how long the lease lasts without being renewed.
    :param clock: dates the entries; the clock that the run is driven by.
    :raises LockHeld: another live process has the lease; the message names it.
    """
    claim = uuid.uuid4()
    asked = {
        "environment": environment,
        "cluster": cluster,
        "claim": claim,
        "holder": Jsonb(asdict(holder or Holder.here())),
        "ttl": ttl,
        "lately": LATELY,
        "run_id": f"{clock.now():%Y%m%d-%H%M%S}-{claim.hex[:6]}",
    }
    run_id, token = database.run(lambda connection: _acquire(connection, asked))
    return RunJournal(database, environment, cluster, run_id, token, ttl, clock)


def _acquire(connection: Connection, asked: dict[str, Any]) -> tuple[str, int]:
    """The run and the token. Repeated after a commit whose answer was lost, it finds its own claim."""
    sql = queries("journal")
    connection.execute(sql["make_lease"], asked)
    row = _one(connection.execute(sql["lock_lease"], asked).fetchone())
    if row["claim"] == asked["claim"]:
        return row["run_id"], row["token"]
    if row["token"] and _lease(row).live:
        raise LockHeld(_held(asked, row["run_id"], _lease(row)))
    found = connection.execute(sql["run_to_take_up"], asked).fetchone()
    if found is None:
        connection.execute(sql["make_run"], asked)
    else:
        asked = {**asked, "run_id": found["id"]}
    return asked["run_id"], _one(connection.execute(sql["take_lease"], asked).fetchone())["token"]


def _held(asked: dict[str, Any], run_id: str, lease: Lease) -> str:
    return (
        f"cluster {asked['cluster']!r} is held by run {run_id}: {lease.holder}, "
        f"since {lease.since:%Y-%m-%d %H:%M:%S %Z}. Follow it with `patchpilot status`; or stop that process and run "
        f"the same command again, which goes on from there (at once on that host, within "
        f"{asked['ttl'].total_seconds():.0f} s elsewhere)"
    )


def runs(
    database: Database, environment: str | None = None, cluster: str | None = None, *, limit: int = 50
) -> tuple[Run, ...]:
    """The newest runs, newest first."""
    asked = {"environment": environment, "cluster": cluster, "run_id": None, "limit": limit}
    return tuple(_run(row) for row in database.fetch(queries("journal")["runs"], asked))


def find_run(database: Database, run_id: str) -> Run:
    """The run with this id.

    :raises Usage: if there is none.
    """
    asked = {"environment": None, "cluster": None, "run_id": run_id, "limit": 1}
    rows = database.fetch(queries("journal")["runs"], asked)
    if not rows:
        raise Usage(f"there is no run {run_id!r}; list them with `patchpilot status`")
    return _run(rows[0])


def entries(database: Database, run_id: str) -> tuple[Entry, ...]:
    """The journal of a run, oldest entry first; empty if there is no such run.

    :raises Corrupt: an entry is of a kind that this version does not know.
    """
    return tuple(
        Entry(row["seq"], row["at"], _kind(row["kind"]), row["phase"], row["step"], row["data"])
        for row in database.fetch(queries("journal")["entries"], {"run_id": run_id})
    )


def outdated(database: Database) -> str | None:
    """What is wrong with the schema, in one line; None if it is exactly the one that this version needs."""
    applied = database.fetch(queries("journal")["newest_migration"])[0]["number"] or 0
    needed = migrations()[-1].number
    if applied == needed:
        return None
    return f"the schema is at migration {applied:04}, this version needs {needed:04}"


def _run(row: Row) -> Run:
    last = None
    if row["kind"] is not None:
        data = {"why": row["why"]} if row["why"] else {}
        last = Entry(0, row["at"], _kind(row["kind"]), row["phase"], row["step"], data)
    return Run(
        id=row["id"],
        environment=row["environment"],
        cluster=row["cluster"],
        created_at=row["created_at"],
        outcome=row["outcome"],
        finished_at=row["finished_at"],
        lease=_lease(row) if row["token"] else None,
        last=last,
    )


def _lease(row: Row) -> Lease:
    return Lease(row["token"], Holder(**row["holder"]), row["since"], row["until"], row["live"])


def _kind(text: str) -> Kind:
    try:
        return Kind(text)
    except ValueError:
        raise Corrupt(
            f"the journal has an entry of kind {text!r}, which this version does not know: upgrade it"
        ) from None


def _one(row: Row | None) -> Row:
    if row is None:
        raise Corrupt("PostgreSQL returned no row where there is always one: was the lease deleted by hand?")
    return row
