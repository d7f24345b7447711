"""One pass over a site: look, decide, act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Self

from celery import Celery

from patchpilot.backend.heartbeat import STALE
from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator, PatchpilotError, Transient
from patchpilot.postgres.connection import Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.diagnose import diagnose
from patchpilot.recovery.evidence import Collector, Evidence, Message, Where
from patchpilot.recovery.findings import Applied, Finding, Window
from patchpilot.recovery.remedy import Remedies
from patchpilot.valkey.broker import Broker
from patchpilot.workers.application import Site, application
from patchpilot.workers.canaries import purge

SQL = queries("recovery")


class Recovery:
    """Finds what a failover lost on one site, and re-creates exactly that, once.

    Any number of recoveries may run at once, beside workers: each remedy is guarded by a row that one of them gets.

    :param stale: a worker that gave no sign of life for this long counts as dead. At least twice the heartbeat's pause.
    :param complain: told about a finding that could not be remedied, and why; the pass goes on with the next one.
    """

    def __init__(
        self,
        site: Site,
        *,
        clock: Clock = SYSTEM,
        stale: timedelta = STALE,
        complain: Callable[[Finding, PatchpilotError], None] = lambda _finding, _error: None,
    ) -> None:
        self._site = site
        self._database = Database(site.dsn, clock=clock)
        self._broker = Broker(site.endpoint, site.key_prefix)
        self._apps: dict[str, Celery] = {}
        self._clock = clock
        self._complain = complain
        self._stale = stale

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._broker.close()
        self._database.close()
        for app in self._apps.values():
            app.backend.client.connection_pool.disconnect()
            app.backend.database.close()
            app.close()

    def survey(self, window: Window) -> tuple[Finding, ...]:
        """What is stuck, and why. Changes nothing.

        :raises Transient: if PostgreSQL or the broker cannot be read.
        """
        return diagnose(self._collect(window))

    def recover(self, window: Window, *, run_id: str | None = None) -> tuple[Applied, ...]:
        """Remedy what can be remedied, and return what this pass did; not what somebody else did first.

        :param run_id: the run of the pilot that asks for it.
        :raises Transient: if PostgreSQL, the broker or the way to it failed. What was done stays done; call again.
        """
        return self.sweep(window, run_id=run_id)[1]

    def sweep(self, window: Window, *, run_id: str | None = None) -> tuple[tuple[Finding, ...], tuple[Applied, ...]]:
        """As :meth:`recover`; returns everything that was found, and what was done."""
        # Before looking: a part that returns from now on asks PostgreSQL, and one that returned before is seen below.
        self._database.execute(SQL["distrust_counts"])
        purge(self._database, self._app("json"))
        evidence = self._collect(window)
        messages = {message.message_id: message for message in evidence.messages}
        ended = [key for key, message in messages.items() if message.where is Where.ENDED]
        if ended:
            self._database.execute(SQL["close_ended"], {"message_ids": ended})
        remedies = Remedies(self._database, self._app, run_id)
        findings = diagnose(evidence)
        done = [it for it in findings if it.curable and self._try(remedies, it, messages)]
        return findings, tuple(Applied.of(finding, self._clock.now()) for finding in done)

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

    def _collect(self, window: Window) -> Evidence:
        return Collector(self._database, self._broker, self._app("json"), self._clock, self._stale).collect(window)

    def _app(self, serializer: str) -> Celery:
        if serializer not in self._apps:
            self._apps[serializer] = application(self._site, serializer)
        return self._apps[serializer]

    def _try(self, remedies: Remedies, finding: Finding, messages: Mapping[str, Message]) -> bool:
        try:
            return remedies.apply(finding, messages)
        except (NeedsOperator, Transient) as error:
            # One that cannot be remedied now must not keep the others from it.
            self._complain(finding, error)
            return False
