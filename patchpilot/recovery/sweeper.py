"""A worker that recovers: some time after it has connected to its broker, in a thread beside its work.

The thread is one of the worker's main process, which goes on answering remote control meanwhile: recovery asks this
worker as it asks all others. Whatever goes wrong here is a line in the log and another try.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from celery import Celery
from celery.utils.log import get_logger

from patchpilot.backend.identity import Identity
from patchpilot.backend.instance import this_worker
from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Database
from patchpilot.recovery.at_hand import at_hand
from patchpilot.recovery.findings import Finding, Window
from patchpilot.recovery.sweep import Recovery, Sweep
from patchpilot.recovery.turns import Turn, Turns

logger = get_logger(__name__)

SLACK = timedelta(seconds=30)
"""Workers that reconnect within so long of the first of them, or a tenth of the age, are covered by its sweep."""

PAUSE = timedelta(seconds=15)
"""Between two tries to get a turn, and after a sweep that failed."""


@dataclass(frozen=True)
class Pace:
    """When to sweep."""

    min_age: timedelta
    """After a connection was made, and again after a sweep that could not settle all."""
    every: timedelta | None = None
    """And then again so often; None for never."""

    @property
    def slack(self) -> timedelta:
        return min(SLACK, self.min_age / 10)


class Sweeper:
    """Sweeps when it is time.

    :param once: asks for a turn, with the time that has passed since a sweep was due, and sweeps if it gets one.
        Returns the turn, and whether everything that was found is settled.
    """

    def __init__(self, once: Callable[[timedelta], tuple[Turn, bool]], pace: Pace, clock: Clock = SYSTEM) -> None:
        self._once = once
        self._pace = pace
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None
        self._due: float | None = None
        self._next = 0.0

    def connected(self) -> None:
        """The worker has just connected to its broker: what was lost meanwhile is old enough after a while."""
        with self._lock:
            self._schedule(self._pace.min_age)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="patchpilot-sweeper", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """The worker shuts down. A sweep under way may be cut short: another one finishes what it left."""
        self._over = True
        self._changed.set()

    def try_now(self) -> float | None:
        """What is due is tried. Seconds until the next try, None if there will be none before a new connection."""
        with self._lock:
            due, now = self._due, self._clock.monotonic()
            if due is None or now < self._next:
                return None if due is None else self._next - now
        try:
            turn, settled = self._once(timedelta(seconds=max(now - due, 0)))
        except Exception as error:  # a worker must not suffer from what is to help it
            expected = isinstance(error, PatchpilotError)
            logger.warning("Recovery did not get through, it is tried again: %s", error, exc_info=not expected)
            turn, settled = Turn.TAKEN, False
        with self._lock:
            if self._due != due:
                pass  # connected anew meanwhile: that is what counts
            elif turn is Turn.TAKEN:
                self._next = self._clock.monotonic() + PAUSE.total_seconds()
            elif not settled:
                self._schedule(self._pace.min_age)
            elif self._pace.every is not None:
                self._schedule(self._pace.every)
            else:
                self._due = None
            return None if self._due is None else max(self._next - self._clock.monotonic(), 0)

    def _schedule(self, after: timedelta) -> None:
        self._due = self._clock.monotonic() + after.total_seconds()
        self._next = self._due + self._pace.slack.total_seconds()
        self._changed.set()

    def _run(self) -> None:
        while not self._over:
            self._changed.clear()
            pause = self.try_now()
            if pause is None:
                self._changed.wait()
            else:
                self._clock.wait(self._changed, pause)


def sweeper_of(app: Celery) -> Sweeper:
    """The sweeper of a worker of ``app``.

    :raises ImproperlyConfigured: a setting is wrong.
    :raises NeedsOperator: its broker is no Redis.
    """
    site, config = at_hand(app)
    window = Window(config.recovery_min_age, config.recovery_max_age)
    broker = Identity(app).home or ""
    recovery = Recovery(site, complain=_complain)  # one for all sweeps: each makes an application

    def once(since: timedelta) -> tuple[Turn, bool]:
        with Database(site.dsn) as database:
            turns = Turns(database, broker, this_worker())
            if (turn := turns.take(since)) is not Turn.OURS:
                return turn, True
            whole = False
            try:
                sweep = recovery.sweep(window)
                whole = True
            finally:
                recovery.disconnect()
                turns.end(whole=whole)
        return turn, _told(sweep)

    return Sweeper(once, Pace(config.recovery_min_age, config.recovery_every))


def _told(sweep: Sweep) -> bool:
    """Log what was done. Whether everything that was found is settled, as far as recovery can."""
    for it in sweep.applied:
        logger.warning("Recovered %s %s by %s (%s): %s", it.kind, it.id, it.remedy, it.diagnosis, it.reason)
    unknown = sum(finding.unknown for finding in sweep.findings)
    logger.info("Recovery swept: %d found, %d recovered", len(sweep.findings), len(sweep.applied))
    return not sweep.left and not unknown


def _complain(finding: Finding, error: PatchpilotError) -> None:
    logger.warning("Not recovered: %s %s: %s", finding.kind, finding.id, error)
