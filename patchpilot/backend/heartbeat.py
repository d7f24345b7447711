"""A worker's sign of life in PostgreSQL.

Recovery asks workers over the broker what they hold. One that does not answer may be dead, or busy, or still
reconnecting after a failover; only the first of these has lost its messages. A worker that is alive says so here,
past the broker, every few seconds, and as long as it does, what it may hold is not taken for lost.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from celery import signals
from celery.utils.log import get_logger

from patchpilot.backend import about, holdings
from patchpilot.backend.identity import Identity
from patchpilot.backend.instance import this_worker
from patchpilot.clock import SYSTEM
from patchpilot.durations import HEARTBEAT
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import QUIET, Database
from patchpilot.postgres.queries import queries
from patchpilot.postgres.session import CONNECT_TIMEOUT

logger = get_logger(__name__)

STALE = timedelta(seconds=10)
"""A worker that was not heard of for this long is probably dead: nobody waits longer for its answer."""

RETURNS = HEARTBEAT + timedelta(seconds=QUIET + CONNECT_TIMEOUT)
"""A worker that is alive is heard of again so soon after PostgreSQL is back, if not before: an attempt to connect that
began while it was away has to fail first, and then it pauses."""

LAST_SECONDS = 5.0
"""How long a worker that shuts down waits until its end is recorded."""

SQL = queries("workers")


class Heartbeat:
    """Says that this worker is alive, from when it is ready until it shuts down."""

    def __init__(self, database: Database, identity: Identity) -> None:
        self._database = database
        self._identity = identity
        self._over = threading.Event()

    def install(self) -> None:
        """Begin when the worker is ready. Nothing happens in a process that is no worker."""
        signals.worker_ready.connect(self._begin, weak=False, dispatch_uid="patchpilot.heartbeat.begin")
        signals.worker_shutdown.connect(self._end, weak=False, dispatch_uid="patchpilot.heartbeat.end")

    def _begin(self, sender: Any = None, **_: Any) -> None:
        self._over.clear()
        holdings.install()
        about.install()
        name = getattr(sender, "hostname", None) or "worker"
        broker = None
        if (connection := getattr(sender, "connection", None)) is not None:
            broker = self._identity.of(connection)
            self._identity.leave(connection)
        threading.Thread(target=self._beat, args=(name, broker), name="patchpilot-heartbeat", daemon=True).start()

    def _beat(self, name: str, broker: str | None) -> None:
        heard = True
        while not self._over.is_set():
            try:
                self._database.execute(SQL["seen"], {"instance": this_worker(), "name": name, "broker": broker})
                heard = True
            except Exception as error:  # noqa: BLE001 - whatever it is, the next sign of life may succeed
                if heard:  # once is enough
                    logger.warning("No sign of life was left in PostgreSQL: %s", error)
                heard = False
            SYSTEM.wait(self._over, HEARTBEAT.total_seconds())

    def _end(self, **_: Any) -> None:
        self._over.set()
        # In a thread: a PostgreSQL that answers nothing must not keep the worker from shutting down.
        last_word = threading.Thread(target=self._say_gone, name="patchpilot-gone", daemon=True)
        last_word.start()
        last_word.join(LAST_SECONDS)

    def _say_gone(self) -> None:
        try:
            self._database.execute(SQL["gone"], {"instance": this_worker()})
        except PatchpilotError as error:
            logger.info("The worker's end was not recorded: %s", error)
