"""One pass over a site: look, decide, act."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from celery import Celery

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator, PatchpilotError, Transient
from patchpilot.postgres.connection import Row
from patchpilot.postgres.queries import queries
from patchpilot.postgres.record import Record
from patchpilot.recovery.diagnose import diagnose, quiet
from patchpilot.recovery.evidence import Collector, Evidence, Message, Where
from patchpilot.recovery.findings import KINDS, Applied, Finding, Kind, Window
from patchpilot.recovery.housekeeping import servers
from patchpilot.recovery.inventory import Backlog, Elsewhere, backlog, elsewhere
from patchpilot.recovery.plan import Change, Plan, compare
from patchpilot.recovery.quiet import Quiet
from patchpilot.recovery.remedy import Remedies
from patchpilot.recovery.strays import sweep_up
from patchpilot.valkey.broker import Broker
from patchpilot.workers.application import Site, application
from patchpilot.workers.canaries import purge
from patchpilot.workers.contact import Contact

SQL = queries("recovery")

BATCH = 100
"""How many findings are remedied with one round of statements."""


@dataclass(frozen=True)
class Sweep:
    """One pass: what was found, what was done about it, and where the world had moved on from a plan."""

    findings: tuple[Finding, ...]
    applied: tuple[Applied, ...] = ()
    changes: tuple[Change, ...] = ()
    quiet: Quiet = field(default_factory=Quiet)
    """What else is open."""

    @property
    def left(self) -> int:
        """How many of the findings that can be remedied were not. One may have taken two remedies, and what was done
        further out was not found."""
        curable = Counter((it.kind, it.id) for it in self.findings if it.curable)
        return (curable - Counter((it.kind, it.id) for it in self.applied)).total()


class Recovery:
    """Finds what a failover lost on one site, and re-creates exactly that, once.

    Any number of recoveries may run at once, beside workers: each remedy is guarded by a row that one of them gets.

    :param stale: a worker that gave no sign of life for this long counts as dead. At least twice the heartbeat's pause;
        what the site says by default.
    :param complain: told about a finding that could not be remedied, and why; the pass goes on with the next one.
    """

    def __init__(
        self,
        site: Site,
        *,
        clock: Clock = SYSTEM,
        stale: timedelta | None = None,
        complain: Callable[[Finding, PatchpilotError], None] = lambda _finding, _error: None,
    ) -> None:
        self._site = site
        self._database = Record(site.dsn, clock=clock)
        self._broker = Broker(site.endpoint, site.key_prefix, site.broker, site.sep, site.unacked)
        self._servers = servers(site)
        self._apps: dict[str, Celery] = {}
        self._clock = clock
        self._complain = complain
        self._stale = site.dead_after if stale is None else stale
        self._contact = Contact(clock, self._stale)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, for good."""
        self.disconnect()
        for app in self._apps.values():
            app.close()

    def disconnect(self) -> None:
        """Close all connections. The next pass opens new ones, to whatever the addresses lead to by then."""
        self._broker.close()
        for server in self._servers:
            server.close()
        self._database.close()
        for app in self._apps.values():
            app.backend.client.connection_pool.disconnect()
            app.backend.database.close()

    def survey(
        self, window: Window, only: Collection[Kind] = KINDS, ids: Collection[str] | None = None
    ) -> tuple[Finding, ...]:
        """What is stuck, and why. Changes nothing.

        :param ids: look at these chords and tasks only.
        :raises Transient: if PostgreSQL or the broker cannot be read.
        """
        return self.look(window, only, ids).findings

    def look(self, window: Window, only: Collection[Kind] = KINDS, ids: Collection[str] | None = None) -> Sweep:
        """As :meth:`survey`; with what else is open.

        :raises Transient: if PostgreSQL or the broker cannot be read.
        """
        evidence = self._collect(window)
        return Sweep(_chosen(diagnose(evidence), only, ids), quiet=quiet(evidence))

    def backlog(self) -> Backlog:
        """How many chords are open, and how old the oldest is.

        :raises Transient: if PostgreSQL cannot be read.
        """
        return backlog(self._database)

    def recover(self, window: Window, *, run_id: str | None = None) -> tuple[Applied, ...]:
        """Remedy what can be remedied, and return what this pass did; not what somebody else did first.

        :param run_id: the run of the pilot that asks for it.
        :raises Transient: if PostgreSQL, the broker or the way to it failed. What was done stays done; call again.
        """
        return self.sweep(window, run_id=run_id).applied

    def sweep(
        self,
        window: Window,
        *,
        run_id: str | None = None,
        only: Collection[Kind] = KINDS,
        ids: Collection[str] | None = None,
        assume_lost: bool = False,
        plan: Plan | None = None,
    ) -> Sweep:
        """As :meth:`recover`; returns everything that was found, and what was done.

        :param only: leave other kinds of findings alone.
        :param ids: leave other chords and tasks alone, those around them as well; a chord's callback goes by the
            chord's id.
        :param assume_lost: take for lost what a worker may have that is alive and does not answer, and what workers
            seem to refuse.
        :param plan: do only what is in it, as far as it is still so.
        """
        names = self._broker.names()
        # Before looking: a part that returns from now on asks PostgreSQL, and one that returned before is seen below.
        self._database.execute(SQL["distrust_counts"], {"brokers": sorted(names)})
        self._contact.renew()
        purge(self._database, self._app("json"), names)
        evidence = self._collect(window, assume_lost=assume_lost)
        messages = {message.message_id: message for message in evidence.messages}
        ended = [message for message in evidence.messages if message.where is Where.ENDED]
        if ended:
            seen = {"message_ids": [it.message_id for it in ended], "resends": [it.resends for it in ended]}
            self._database.execute(SQL["close_ended"], seen)
        findings = _chosen(diagnose(evidence), only, ids)
        agreed, changes = (findings, ()) if plan is None else compare(plan, findings, only)
        remedies = Remedies(self._database, self._app, run_id, self._complain)
        curable = [finding for finding in agreed if finding.curable]
        done: list[Finding] = []
        outwards = plan is None and ids is None and "chord" in only
        for start in range(0, len(curable), BATCH):
            done += self._try(remedies, curable[start : start + BATCH], messages, outwards=outwards)
        with suppress(Transient):  # a later pass finds what is left
            sweep_up(self._database, self._servers, names, window.min_age)
        now = self._clock.now()
        return Sweep(findings, tuple(Applied.of(finding, now) for finding in done), changes, quiet(evidence))

    def elsewhere(self) -> tuple[Elsewhere, ...]:
        """What is open of other brokers that share the record: no pass of this recovery looks at it.

        :raises Transient: if PostgreSQL or the broker cannot be read.
        """
        return elsewhere(self._database, self._broker.names())

    def applied(self, run_id: str) -> tuple[Applied, ...]:
        """Every remedy that was applied for the run ``run_id``, in order."""
        return tuple(self._applied(run_id))

    def _applied(self, run_id: str) -> Iterator[Applied]:
        for row in self._database.fetch(SQL["applied"], {"run_id": run_id}):
            yield Applied(
                at=row["applied_at"], kind=row["kind"], id=row["subject"], diagnosis=row["diagnosis"],
                remedy=row["remedy"], reason=row["reason"], callback=row["callback"],
            )  # fmt: skip

    def repeated_starts(self, age: timedelta) -> list[Row]:
        """Callbacks of the last ``age`` that started more than once because a worker died inside them."""
        return self._database.fetch(SQL["repeated_starts"], {"since": self._clock.now() - age})

    def _collect(self, window: Window, *, assume_lost: bool = False) -> Evidence:
        app = self._app("json")
        collector = Collector(self._database, self._broker, app, self._clock, self._stale, self._contact)
        evidence = collector.collect(window, assume_lost=assume_lost)
        self._contact.renew()
        return evidence

    def _app(self, serializer: str) -> Celery:
        if serializer not in self._apps:
            self._apps[serializer] = application(self._site, serializer)
        return self._apps[serializer]

    def _try(
        self, remedies: Remedies, batch: Sequence[Finding], messages: Mapping[str, Message], *, outwards: bool
    ) -> Iterable[Finding]:
        try:
            return remedies.apply(batch, messages, outwards=outwards)
        except (NeedsOperator, Transient) as error:
            # A batch that cannot be remedied now must not keep the others from it.
            for finding in batch:
                self._complain(finding, error)
            return ()


def _chosen(
    findings: Sequence[Finding], only: Collection[Kind], ids: Collection[str] | None = None
) -> tuple[Finding, ...]:
    return tuple(it for it in findings if it.kind in only and (ids is None or it.id in ids))
