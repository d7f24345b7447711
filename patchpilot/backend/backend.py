"""The Celery result backend ``patchpilot+redis://``.

Results, membership and callbacks are PostgreSQL's; notifications are Valkey's. The class builds on Celery's Redis
backend for connecting, key names and serialising, and replaces whatever a failover could lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery import Celery, signals, states
from celery._state import get_current_task
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from celery.exceptions import TaskRevokedError
from celery.result import result_from_tuple
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from redis.exceptions import ReadOnlyError, RedisError

from patchpilot.backend import canary, errbacks
from patchpilot.backend.chords import Chords, Waiting, waiting
from patchpilot.backend.config import CALLBACK_OF, CANARY, MESSAGE_ID, Config, Counting
from patchpilot.backend.counter import Counter
from patchpilot.backend.ending import left_to_recovery
from patchpilot.backend.fence import Fence
from patchpilot.backend.finishing import Finished, Finisher, Note
from patchpilot.backend.heartbeat import Heartbeat
from patchpilot.backend.install import RESULTS, set_unless_set
from patchpilot.backend.message import Part
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.purge import purge
from patchpilot.backend.sockets import insisting
from patchpilot.backend.versions import check_celery
from patchpilot.backend.waiting import ResultConsumer
from patchpilot.backend.whose import unsent, whose
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Row, database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("results")


class Backend(RedisBackend):  # type: ignore[misc]
    """Results that survive a failover, and chords that do."""

    ResultConsumer = ResultConsumer

    # PostgreSQL keeps results until they are purged: by `patchpilot db purge`, or by Celery beat's daily clean-up.
    supports_autoexpire = False

    # Celery skips a redelivered task that has succeeded, before its part is returned and its start is known, if this
    # is set together with worker_deduplicate_successful_tasks. The fence does what that setting asks for.
    persistent = False

    def __init__(self, *args: Any, app: Celery, **kwargs: Any) -> None:
        check_celery()
        set_unless_set(app.conf, RESULTS)
        super().__init__(*args, app=app, **kwargs)
        self.connparams: dict[str, Any] = insisting(self.connparams)
        self.config = Config.of(self.app)
        self.connection_errors: tuple[type[Exception], ...] = (*self.connection_errors, ReadOnlyError)
        self.database = database(
            self.config.dsn,
            budget=self.config.postgres_budget,
            patience=self.config.patience,
            prepare=self.config.prepared_statements,
        )
        self.outbox = Outbox(self.app, self.database, self.config.journal, strict=self.config.strict)
        self.chords = Chords(self.app, self.database, self, self.outbox, self.config)
        self.finisher = Finisher(self.app, self.database, self, self.outbox, self.config)
        self.counter = Counter(lambda: self.client, self.get_key_for_group, self.config.valkey_budget)
        self.fence = Fence(self.app, self.database, self.config.fence, self.config.fence_lease, self._on_repetition)
        self.outbox.install()
        self.fence.install()
        Heartbeat(self.database, self.outbox.identity).install()
        canary.install(self.app)
        errbacks.install(self.app)
        signals.task_postrun.connect(_on_postrun, weak=False, dispatch_uid="patchpilot.postrun")

    # -- results ------------------------------------------------------------------------------------------------

    def _store_result(
        self, task_id: str | None, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        if task_id is None:  # nobody can ask for it: the error of a chord with a chain for a body, before Celery 5.6
            return result
        payload = self._meta(task_id, result, state, traceback, request)
        row = {"task_id": str(task_id), "state": state, "meta": ensure_bytes(payload), "expires": self.lifetime(state)}
        row |= whose(task_id, state, request)
        try:
            if getattr(request, "patchpilot_done", None) == task_id:
                request.patchpilot_part = waiting(self.database.fetch(SQL["finish"], row | self._end(request, result)))
                request.patchpilot_ended = True
            else:
                self.database.execute(SQL["store"], row)
        except PatchpilotError as error:
            if state not in states.READY_STATES:  # STARTED, RETRY, progress: not worth a task
                logger.warning("State %s of %s was not recorded: %s", state, task_id, error)
                return result
            raise
        self._notify(task_id, payload)
        return result

    def _meta(self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        if errbacks.are_called_elsewhere():
            meta["children"] = []  # recovery stores what a worker would have: there, a task is current
        return self.encode(meta)

    def revoked(self, task_id: str, reason: str) -> bytes:
        """The result of a task that was revoked or has expired, as it is stored."""
        error = self.encode_result(TaskRevokedError(reason), states.REVOKED)
        payload: bytes = ensure_bytes(self._meta(task_id, error, states.REVOKED))
        return payload

    def _end(self, request: Any, result: Any) -> dict[str, Any]:
        """What a successful task leaves behind besides its result: a part of a chord, a message, a start."""
        in_chord = request.chord is not None and request.group
        start = getattr(request, "patchpilot_start", None)
        nothing = {"scope": None, "attempt": None, "owner": None}
        return {
            **(nothing if start is None else start.row()),
            "group_id": str(request.group) if in_chord else None,
            "position": request.group_index or 0,
            "payload": ensure_bytes(self.encode(result)) if in_chord else None,
            "message_id": getattr(request, MESSAGE_ID, None),
        }

    def lifetime(self, state: str) -> timedelta | None:
        """How long a result is kept; None for ever."""
        failures = getattr(self, "failure_expires", self.expires)  # since Celery 5.7
        seconds = failures if state == states.FAILURE else self.expires
        return timedelta(seconds=seconds) if seconds else None

    def _notify(self, task_id: str, payload: Any) -> None:
        """Wake whoever waits for the result, and tell ``on_message`` of a state. A hint: it is in PostgreSQL anyway."""
        try:
            self.client.publish(self.get_key_for_task(task_id), payload)
        except (RedisError, OSError) as error:
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
        self.database.execute(SQL["forget"], {"task_id": str(task_id)})

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = ensure_bytes(self.encode({"result": result.as_tuple()}))
        row = {"group_id": str(group_id), "meta": payload, "expires": self.lifetime(states.SUCCESS)}
        self.database.execute(SQL["save_group"], row)
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        for row in self.database.fetch(SQL["get_group"], {"group_id": str(group_id)}):
            meta: dict[str, Any] = self.decode(row["meta"])
            meta["result"] = result_from_tuple(meta["result"], self.app)
            return meta
        return None

    def _delete_group(self, group_id: str) -> None:
        self.database.execute(SQL["delete_group"], {"group_id": str(group_id)})

    def cleanup(self) -> None:
        """Remove what is over. Celery beat calls this once a day, by its task ``celery.backend_cleanup``."""
        removed = purge(self.database, self.config.retention)
        logger.info("Purged %s", ", ".join(f"{number} {what}" for what, number in removed.items()))

    # -- the end of a task --------------------------------------------------------------------------------------

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        if request is not None and state == states.SUCCESS:
            request.patchpilot_done = task_id  # its result, its part, its message and its start go in one statement
        done = partial(super().mark_as_done, task_id, result, request, store_result, state)
        with left_to_recovery(task_id, request):
            try:
                done()
            except SoftTimeLimitExceeded:  # it strikes once, and the task's body has ended in time
                done()

    def mark_as_failure(self, task_id: str, exc: Any, *args: Any, **kwargs: Any) -> None:
        request = kwargs.get("request")
        if request is not None and self._had_succeeded(task_id, request):
            # A limit or a kill struck when its end was on record already, while its part returned.
            logger.warning("Task %s had succeeded before it was ended from outside: %r", task_id, exc)
            self._see_to_chord(request)
            self._ended_outside(request)
            return
        if isinstance(exc, WorkerLostError) and getattr(request, CALLBACK_OF, None) and get_current_task() is None:
            # Acknowledged early, and its process was killed in the middle. It has not failed: it has not ended. Its
            # message stays in the outbox, and recovery sends it again once the lease of the dead process is over.
            logger.error("Callback %s is left to recovery: its process was killed", task_id)
            return
        with left_to_recovery(task_id, request):
            super().mark_as_failure(task_id, exc, *args, **kwargs)
            self._ended_outside(request)

    def _had_succeeded(self, task_id: str, request: Any) -> bool:
        """Whether a worker's main process ends a task that came to its end by itself."""
        if get_current_task() is not None or errbacks.are_called_elsewhere():
            return False
        asked = {"task_id": str(task_id), "result_of": whose(task_id, states.SUCCESS, request)["result_of"]}
        try:
            return bool(self.database.fetch(SQL["succeeded"], asked))
        except PatchpilotError:
            return False

    def mark_as_revoked(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        request = kwargs.get("request")
        with left_to_recovery(task_id, request):
            super().mark_as_revoked(task_id, *args, **kwargs)
            self._ended_outside(request)

    def _ended_outside(self, request: Any) -> None:
        """A worker's main process ended a task: lost, timed out, revoked or expired. No postrun signal follows."""
        message_id = getattr(request, MESSAGE_ID, None)
        if message_id and get_current_task() is None:
            self.fence.end_for_others(request)
            self.outbox.end(message_id)

    # -- chords -------------------------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: Any, body: Signature, **_: Any) -> None:
        group_id, results = header_result_args[:2]
        self.chords.open(str(group_id), results, body)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        self.chords.generated(str(group_id), chord_size)
        # Celery also counts a group at the end of a chain in a header, whose parts return to the chord around it.
        if self.config.counting is Counting.VALKEY and self.outbox.opens(str(group_id)):
            try:
                self.counter.expect(group_id, chord_size, self._keys_expire())
            except RedisError as error:
                self._distrust(str(group_id), error)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        if not self.chords.grow(str(chord_id), str(result.id)):
            super().add_to_chord(chord_id, result)  # sent by a producer that does not use this backend yet

    def on_connection_error(self, max_retries: int, exc: Exception, intervals: Any, retries: int) -> Any:
        self.client.connection_pool.disconnect()
        return super().on_connection_error(max_retries, exc, intervals, retries)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """A header task ended. Whatever goes wrong here, its own outcome stands: recovery finishes what is left."""
        if not request.id or not request.group:
            return
        task_id, group_id = str(request.id), str(request.group)
        try:
            chord = self._returned(request, state, result)
            if chord is None and group_id.startswith(CANARY):
                return  # nobody waits for it any more
            if chord is None:  # sent by a producer that does not use this backend yet
                super().on_chord_part_return(request, state, result, **kwargs)
            elif chord.live and (chord.ready is not False if chord.counted_here else self._counted(request)):
                self.finish_chord(group_id, spare=request.chord)
        except (EncodeError, SoftTimeLimitExceeded):
            raise
        except Exception as error:
            request.patchpilot_keep = True  # its message stays in the outbox, or nothing would tell of the part
            expected = isinstance(error, PatchpilotError | RedisError)
            logger.error(  # noqa: TRY400 - a traceback only for what nobody foresaw
                "Chord %s is left to recovery, from part %s on: %s", group_id, task_id, error, exc_info=not expected
            )

    def _returned(self, request: Any, state: str, result: Any) -> Waiting | None:
        """Record the part, unless that was done together with the task's result."""
        this = Part(str(request.group), str(request.id), request.group_index or 0)
        if getattr(request, "patchpilot_ended", False):
            part: Waiting | None = request.patchpilot_part
        else:
            part = self.chords.return_part(this, state, result)
        if part is not None and part.live and part.unforeseen:
            part = self.chords.return_unforeseen(this, state, result)
        return part

    def _counted(self, request: Any) -> bool:
        """Count this part in Valkey. True if that may have completed the chord, or if Valkey cannot tell."""
        try:
            return self.counter.add(request.group, f"{request.id}:{request.group_index}", self._keys_expire())
        except RedisError as error:
            self._distrust(str(request.group), error)
            return True

    def _distrust(self, group_id: str, error: RedisError) -> None:
        """Valkey did not take what it should count. PostgreSQL knows it anyway."""
        self.chords.distrust(group_id)
        logger.warning("The parts of chord %s are counted in PostgreSQL from here on: %r", group_id, error)

    def _keys_expire(self) -> int:
        """The time to live of a chord's keys in seconds; 0 for none. Before Celery 5.7 it was that of results."""
        return int(getattr(self, "chord_expires", self.expires) or 0)

    def finish_chord(self, group_id: str, spare: Any = None) -> bool:
        """Dispatch the callback of a chord, if it is complete and nobody else does.

        :param spare: the callback, should it not be on record.
        :returns: whether this call did it.
        :raises Exception: what kept it from being finished; it is left to recovery then.
        """
        finished = self.finish_chords([group_id], spare=spare)
        for error in finished.failed.values():
            raise error
        return bool(finished.done)

    def finish_chords(self, group_ids: Sequence[str], note: Note | None = None, spare: Any = None) -> Finished:
        """Dispatch the callbacks of complete chords, each once. For workers and for recovery alike.

        :param note: what to write down in the transaction that marks the chords as finished.
        """
        finished = self.finisher.finish(group_ids, note, spare)
        for group_id in finished.counted_in_valkey:
            self.counter.clear(group_id)
        return finished

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        if errbacks.are_called_elsewhere():
            errbacks.send(self.app, request, self.prepare_exception(exc, "json"))
        else:
            super()._call_task_errbacks(request, exc, traceback)

    def call_errbacks(self, request: Any, exc: Exception) -> None:
        """Call the errbacks of what failed elsewhere, or send them: as Celery does with errbacks of their kind."""
        super()._call_task_errbacks(request, exc, None)

    def chord_error_from_stack(self, callback: Signature, exc: Any = None) -> Any:
        with unsent(callback):
            return super().chord_error_from_stack(callback, exc)

    def leave_parts(self, group_id: str, parts: Sequence[Row]) -> None:
        """Leave what the parts of a failed chord returned where Celery's Redis backend would have left it."""
        try:
            encoded = [self.encode([1, it["task_id"], it["state"], self.decode(it["payload"])]) for it in parts]
        except Exception as error:  # noqa: BLE001 - what cannot be decoded must not keep the chord from failing
            logger.info("The parts of chord %s are in PostgreSQL only: %r", group_id, error)
        else:
            self.counter.leave(group_id, encoded, self._keys_expire(), ordered=self._chord_zset)

    def _on_repetition(self, request: Any) -> None:
        """A task that has run is not run again. But its process may have died before it saw to its chord."""
        if request.chord is not None and request.group:
            self.finish_chord(str(request.group), spare=request.chord)

    def _see_to_chord(self, request: Any) -> None:
        try:
            self._on_repetition(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not change how the task ended
            logger.error("Chord %s is left to recovery: %r", request.group, error)  # noqa: TRY400


def _on_postrun(task: Any = None, state: str | None = None, retval: Any = None, **_: Any) -> None:
    """A task ended in this process: its message and its start are over, unless they went with its result."""
    backend = task.app.backend if task is not None else None
    if state is None or not isinstance(backend, Backend):
        return
    request = task.request
    if getattr(request, "patchpilot_keep", False) or getattr(request, "patchpilot_ended", False):
        return
    start, message_id = getattr(request, "patchpilot_start", None), getattr(request, MESSAGE_ID, None)
    if state == states.REJECTED and getattr(retval, "requeue", False):
        if start is not None:
            backend.fence.give_up(start)
    elif start is not None:
        backend.fence.end(start, message_id)
    elif message_id:
        backend.outbox.end(message_id)
