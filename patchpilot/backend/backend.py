"""The Celery result backend ``patchpilot+redis://``.

Results, membership and callbacks are PostgreSQL's; counting and notifications are Valkey's. The class builds on
Celery's Redis backend for connecting, key names and serialising, and replaces whatever a failover could lose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from billiard.exceptions import WorkerLostError
from celery import signals, states
from celery._state import get_current_task
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from celery.result import result_from_tuple
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from redis.exceptions import ReadOnlyError, RedisError

from patchpilot.backend import canary
from patchpilot.backend.chords import Chords, Note
from patchpilot.backend.config import CALLBACK_OF, CANARY, MESSAGE_ID, Config
from patchpilot.backend.counter import Counter
from patchpilot.backend.fence import Fence
from patchpilot.backend.heartbeat import Heartbeat
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.waiting import ResultConsumer
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("results")


class Backend(RedisBackend):  # type: ignore[misc]
    """Results that survive a failover, and chords that do."""

    ResultConsumer = ResultConsumer

    # PostgreSQL keeps results until they are purged.
    supports_autoexpire = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = Config.of(self.app)
        self.connection_errors: tuple[type[Exception], ...] = (*self.connection_errors, ReadOnlyError)
        self.database = database(self.config.dsn, self.config.postgres_budget)
        self.chords = Chords(self.app, self.database, self, self.config.claim_lease)
        self.counter = Counter(lambda: self.client, self.get_key_for_group, self.config.valkey_budget)
        self.outbox = Outbox(self.app, self.database)
        self.fence = Fence(self.app, self.database, self.config.fence_lease)
        self.outbox.install()
        self.fence.install()
        Heartbeat(self.database).install()
        canary.install(self.app)
        signals.task_postrun.connect(_on_postrun, weak=False, dispatch_uid="patchpilot.postrun")

    # -- results ------------------------------------------------------------------------------------------------

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        payload = self.encode(meta)
        self.database.execute(SQL["store"], {"task_id": task_id, "state": state, "meta": ensure_bytes(payload)})
        if state in states.READY_STATES:
            self._notify(task_id, payload)
        return result

    def _notify(self, task_id: str, payload: Any) -> None:
        """Wake whoever waits for the result. A hint: they find it in PostgreSQL anyway."""
        try:
            self.client.publish(self.get_key_for_task(task_id), payload)
        except RedisError as error:
            logger.debug("Nobody was notified of the result of %s: %r", task_id, error)

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        for row in self.database.fetch(SQL["get"], {"task_ids": [str(task_id)]}):
            meta: dict[str, Any] = self.decode_result(row["meta"])
            return meta
        return {"status": states.PENDING, "result": None}

    def task_result_exists(self, task_id: str) -> bool:
        return bool(self.database.fetch(SQL["get"], {"task_ids": [str(task_id)]}))

    def mget(self, keys: Iterable[Any]) -> list[Any]:
        """The encoded results under Celery's keys, None where there is none."""
        task_ids = [self._strip_prefix(key) for key in keys]
        found = {row["task_id"]: row["meta"] for row in self.database.fetch(SQL["get"], {"task_ids": task_ids})}
        return [found.get(task_id) for task_id in task_ids]

    def ready_metas(self, task_ids: Iterable[str]) -> list[dict[str, Any]]:
        """The decoded results of those of ``task_ids`` that are done."""
        rows = self.database.fetch(SQL["get"], {"task_ids": [str(task_id) for task_id in task_ids]})
        metas = [self.decode_result(row["meta"]) for row in rows]
        return [meta for meta in metas if meta["status"] in states.READY_STATES]

    def _forget(self, task_id: str) -> None:
        self.database.execute(SQL["forget"], {"task_id": task_id})

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = self.encode({"result": result.as_tuple()})
        self.database.execute(SQL["save_group"], {"group_id": group_id, "meta": ensure_bytes(payload)})
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        for row in self.database.fetch(SQL["get_group"], {"group_id": group_id}):
            meta: dict[str, Any] = self.decode(row["meta"])
            meta["result"] = result_from_tuple(meta["result"], self.app)
            return meta
        return None

    def _delete_group(self, group_id: str) -> None:
        self.database.execute(SQL["delete_group"], {"group_id": group_id})

    # -- the end of a task --------------------------------------------------------------------------------------

    def mark_as_failure(self, task_id: str, exc: Any, *args: Any, **kwargs: Any) -> None:
        request = kwargs.get("request")
        if isinstance(exc, WorkerLostError) and getattr(request, CALLBACK_OF, None) and get_current_task() is None:
            # Acknowledged early, and its process was killed in the middle. It has not failed: it has not ended. Its
            # message stays in the outbox, and recovery sends it again once the lease of the dead process is over.
            logger.error("Callback %s is left to recovery: its process was killed", task_id)
            return
        super().mark_as_failure(task_id, exc, *args, **kwargs)
        self._ended_outside(request)

    def mark_as_revoked(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        super().mark_as_revoked(task_id, *args, **kwargs)
        self._ended_outside(kwargs.get("request"))

    def _ended_outside(self, request: Any) -> None:
        """A worker's main process ended a task: lost, timed out, revoked or expired. No postrun signal follows."""
        message_id = getattr(request, MESSAGE_ID, None)
        if message_id and get_current_task() is None:
            self.outbox.end(message_id)

    # -- chords -------------------------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: Any, body: Signature, **_: Any) -> None:
        group_id, results = header_result_args[:2]
        self.chords.open(group_id, list(results), body)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        self.chords.grow(chord_id, result.id)
        self.ensure(lambda: self.client.incr(self.get_key_for_group(chord_id, ".t")), ())

    def on_connection_error(self, max_retries: int, exc: Exception, intervals: Any, retries: int) -> Any:
        self.client.connection_pool.disconnect()
        return super().on_connection_error(max_retries, exc, intervals, retries)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """A header task ended. Whatever goes wrong here, its own outcome stands: recovery finishes what is left."""
        task_id, group_id = request.id, request.group
        if not task_id or not group_id:
            return
        try:
            chord = self.chords.return_part(group_id, task_id, state, result)
            if chord is None and group_id.startswith(CANARY):
                return  # nobody waits for it any more
            if chord is None:  # sent by a producer that does not use this backend yet
                super().on_chord_part_return(request, state, result, **kwargs)
            elif chord.live and (chord.distrusted or self._counted(request)):
                self.finish_chord(group_id)
        except EncodeError:
            raise
        except Exception as error:
            request.patchpilot_keep = True  # its message stays in the outbox, or nothing would tell of the part
            expected = isinstance(error, PatchpilotError | RedisError)
            logger.error(  # noqa: TRY400 - a traceback only for what nobody foresaw
                "Chord %s is left to recovery, from part %s on: %s", group_id, task_id, error, exc_info=not expected
            )

    def _counted(self, request: Any) -> bool:
        """Count this part in Valkey. True if that may have completed the chord."""
        member = f"{request.id}:{request.group_index}"
        return self.counter.add(request.group, member, int(self.chord_expires or 0))

    def finish_chord(self, group_id: str, note: Note | None = None) -> bool:
        """Dispatch the callback of a complete chord, once. For workers and for recovery alike.

        :param note: what to write down in the transaction that marks the chord as finished.
        :returns: whether this call did it.
        """
        finished = self.chords.finish(group_id, note)
        if finished:
            self.counter.clear(group_id)
        return finished


def _on_postrun(task: Any = None, state: str | None = None, retval: Any = None, **_: Any) -> None:
    """A task ended in this process: its message and, for a callback, its start are over."""
    backend = task.app.backend if task is not None else None
    if state is None or not isinstance(backend, Backend):
        return
    request = task.request
    again = state == states.REJECTED and getattr(retval, "requeue", False)
    if (start := getattr(request, "patchpilot_start", None)) is not None:
        backend.fence.end(start, again=again)
    message_id = getattr(request, MESSAGE_ID, None)
    if message_id and not again and not getattr(request, "patchpilot_keep", False):
        backend.outbox.end(message_id)
