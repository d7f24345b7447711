"""Shadow mode: Celery's own Redis backend does everything, and the record is written beside it.

A team that does not trust patchpilot yet can watch for a week what it would have found. Nothing may disturb the
application meanwhile, so nothing here waits for PostgreSQL: what is to be written is handed to a thread that writes it
in order. If PostgreSQL is away or slow, records are dropped and counted, and the application never hears of it.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from celery import signals
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from celery.utils.functional import _regen
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import ensure_bytes

from patchpilot.backend.chords import Chords
from patchpilot.backend.config import MESSAGE_ID, Config, Journal
from patchpilot.backend.dispatch import Work, callback_of
from patchpilot.backend.heartbeat import Heartbeat
from patchpilot.backend.message import Message
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.purge import purge
from patchpilot.clock import SYSTEM, Backoff
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("chords")

BACKLOG = 10_000
"""How many records may wait to be written before more are dropped."""

TRIES, PAUSE = 100, 0.05
"""How often, and after how many seconds, a record is tried again that came too early: the end of a message, say, whose
producer is slower to write it down than a worker is to run it."""

PATIENCE = 5.0
"""Seconds without an answer after which PostgreSQL counts as away, unless somebody says otherwise."""

LAST_SECONDS = 2.0
"""How long a worker that shuts down waits for what is still to be written."""


# The chords whose callback this process has just published.
_dispatched: set[str] = set()


class TooEarly(Exception):
    """What this record is about has not been written down yet, by another process."""


class _Early(NamedTuple):
    """A record that came too early."""

    due: float
    """When it is tried again, on the monotonic clock."""
    work: Work
    tries: int
    """How many are left."""


class Recorder:
    """Writes what it is given, in order, in a thread of its own, and drops what it cannot write."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pid = 0
        self._starting = threading.Lock()
        self._waiting: queue.Queue[Work] = queue.Queue(BACKLOG)
        self._again = False
        self.dropped = 0

    def put(self, work: Work) -> None:
        """Have ``work`` written some time soon, and again if it raises :class:`TooEarly`. Returns at once."""
        try:
            if self._pid != os.getpid():  # a thread does not survive a fork
                self._start()
        except RuntimeError as error:  # the interpreter is at its end, or no thread is to be had
            self._drop(str(error))
            return
        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            self._drop("too much is waiting")

    def flush(self, seconds: float = LAST_SECONDS) -> None:
        """Wait until everything is written, for ``seconds`` at most."""
        patience = Backoff(SYSTEM, seconds, first=0.01, longest=0.1)
        while self._waiting.unfinished_tasks and self._pid == os.getpid() and patience.pause():
            pass

    def _start(self) -> None:
        with self._starting:
            if self._pid != os.getpid():
                self._waiting = queue.Queue(BACKLOG)
                threading.Thread(target=self._write, name="patchpilot-shadow", daemon=True).start()
                self._pid = os.getpid()
                atexit.register(self.flush)  # a script is over sooner than its last records are written

    def _write(self) -> None:
        early: deque[_Early] = deque()
        while True:
            work, tries = self._next(early)
            try:
                self._database.run(work)
            except TooEarly:
                if tries > 1 and len(early) < BACKLOG:
                    early.append(_Early(SYSTEM.monotonic() + PAUSE, work, tries - 1))
                    continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the application must not hear of it
                self._drop(str(error))
            self._waiting.task_done()

    def _next(self, early: deque[_Early]) -> tuple[Work, int]:
        """What is written next, as soon as there is something: what came too early waits without anybody else, and is
        tried again in turns with what has come since."""
        pause = early[0].due - SYSTEM.monotonic() if early else None
        self._again = not self._again and pause is not None and pause <= 0
        if not self._again:
            with suppress(queue.Empty):
                return self._waiting.get(timeout=pause if pause is None else max(pause, 0)), TRIES
        _, work, tries = early.popleft()
        return work, tries

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # the first, second, fourth, eighth ...
            logger.warning("Shadow mode: %d records dropped so far: %s", self.dropped, why)


class ShadowBackend(RedisBackend):  # type: ignore[misc]
    """Celery's Redis backend, watched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = Config.of(self.app)
        patience = self.config.postgres_timeout or PATIENCE
        self.database = Database(self.config.dsn, budget=0, patience=patience)
        self.recorder = Recorder(self.database)
        journal = Journal.OFF if self.config.journal is Journal.OFF else Journal.WARN
        self.outbox = ShadowOutbox(
            self.app, self.database, journal, shadow=True, strict=self.config.strict, run=self.recorder.put
        )
        self.chords = Chords(self.app, self.database, self, self.outbox, self.config)
        self.outbox.install()
        Heartbeat(Database(self.config.dsn, budget=0, patience=patience), self.outbox.identity).install()
        signals.task_postrun.connect(_on_postrun, weak=False, dispatch_uid="patchpilot.shadow.postrun")
        for end in (signals.worker_process_shutdown, signals.worker_shutdown):
            end.connect(self._on_shutdown, weak=False, dispatch_uid=f"patchpilot.shadow.{id(self.app)}")

    def apply_chord(self, header_result_args: Any, body: Signature, **kwargs: Any) -> None:
        super().apply_chord(header_result_args, body, **kwargs)
        group_id, results = header_result_args[:2]
        if not isinstance(results, _regen):  # forcing a generator would be a difference
            self._quietly(lambda: self.chords.open(group_id, results, body, shadow=True))

    def add_to_chord(self, group_id: str, result: Any) -> None:
        super().add_to_chord(group_id, result)
        self._quietly(lambda: self.recorder.put(self.chords.growing(group_id, result.id)))

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        if not request.group:
            super().on_chord_part_return(request, state, result, **kwargs)
            return
        with callback_of(request.group):
            super().on_chord_part_return(request, state, result, **kwargs)
        # Its message may have ended before this is written, so what was dispatched is told and not asked for.
        dispatched = request.group in _dispatched
        _dispatched.discard(request.group)
        self._quietly(lambda: self._record_part(request, state, result, dispatched))

    def cleanup(self) -> None:
        """Remove what is over from the record. Celery's own results expire by themselves."""
        with suppress(PatchpilotError):
            purge(self.database, self.config.retention)

    def _record_part(self, request: Any, state: str, result: Any, dispatched: bool) -> None:
        payload = ensure_bytes(self.encode(self.encode_result(result, state)))
        row = {
            "group_id": str(request.group), "task_id": str(request.id), "position": request.group_index or 0,
            "state": state, "payload": payload, "dispatched": dispatched,
        }  # fmt: skip
        self.recorder.put(lambda connection: _return_part(connection, row))

    def _quietly(self, record: Callable[[], None]) -> None:
        try:
            record()
        except EncodeError:
            raise  # strict, and says so: that is what it was asked for
        except Exception:  # a record is not worth a task
            logger.exception("Shadow mode: something was not recorded")

    def _on_shutdown(self, **_: Any) -> None:
        self.recorder.flush()


class ShadowOutbox(Outbox):
    """Written by producers and workers, each in its own time."""

    def publish(self, message: Message, producer: Any) -> None:
        super().publish(message, producer)
        if message.callback_of is not None:
            _dispatched.add(message.callback_of)

    def end(self, message_id: str) -> None:
        def write(connection: Connection) -> None:
            if not connection.execute(queries("outbox")["end"], {"message_ids": [message_id]}).rowcount:
                raise TooEarly

        self._run(write)


def _return_part(connection: Connection, row: dict[str, Any]) -> None:
    if connection.execute(SQL["return_part"], row).fetchone() is None:
        raise TooEarly
    connection.execute(SQL["shadow_over"], row)


def _on_postrun(task: Any = None, state: str | None = None, **_: Any) -> None:
    backend = task.app.backend if task is not None else None
    message_id = getattr(task.request, MESSAGE_ID, None) if task is not None else None
    if state is not None and message_id and isinstance(backend, ShadowBackend):
        backend.outbox.end(message_id)
