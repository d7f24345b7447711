"""The Celery result backend ``patchpilot+redis://``.

Results, membership and callbacks are PostgreSQL's; notifications are Valkey's. The class builds on Celery's Redis
backend for connecting, key names and serialising, and replaces whatever a failover could lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery import Celery, signals, states
from celery._state import get_current_task
from celery.canvas import Signature
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from redis.exceptions import RedisError

from patchpilot.backend import canary, errbacks
from patchpilot.backend.chords import Chords, Waiting
from patchpilot.backend.config import CALLBACK_OF, CANARY, MESSAGE_ID, Counting
from patchpilot.backend.counter import Counter
from patchpilot.backend.ending import LEFT
from patchpilot.backend.fence import Fence, stop_renewal
from patchpilot.backend.finishing import Finished, Finisher, Note
from patchpilot.backend.heartbeat import Heartbeat
from patchpilot.backend.message import Part
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.results import SQL, Results
from patchpilot.backend.whose import unsent, whose
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Row

logger = get_logger(__name__)


class Backend(Results):
    """Results that survive a failover, and chords that do."""

    # Celery skips a redelivered task that has succeeded, before its part is returned and its start is known, if this
    # is set together with worker_deduplicate_successful_tasks. The fence does what that setting asks for.
    persistent = False

    def __init__(self, *args: Any, app: Celery, **kwargs: Any) -> None:
        super().__init__(*args, app=app, **kwargs)
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

    # -- the end of a task --------------------------------------------------------------------------------------

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        if request is not None and state == states.SUCCESS:
            request.patchpilot_done = task_id  # its result, its part, its message and its start go in one statement
        done = partial(super().mark_as_done, task_id, result, request, store_result, state)
        with self.endings.left_to_recovery(task_id, request):
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
        if isinstance(exc, WorkerLostError) and get_current_task() is None and self._comes_back(request):
            # Acknowledged early, and its process was killed in the middle. It has not failed: it has not ended. Its
            # message stays in the outbox, and recovery sends it again once the lease of the dead process is over.
            logger.error("Task %s is left to recovery: its process was killed", task_id)
            return
        with self.endings.left_to_recovery(task_id, request):
            super().mark_as_failure(task_id, exc, *args, **kwargs)
            self._ended_outside(request)

    def _comes_back(self, request: Any) -> bool:
        """Whether recovery would run a task again: a callback, or what follows another task. Both are fenced."""
        try:
            return self.fence.runs_again(request)
        except PatchpilotError:
            return bool(getattr(request, CALLBACK_OF, None)) or self.endings.fate(request) is LEFT

    def _had_succeeded(self, task_id: str, request: Any) -> bool:
        """Whether a worker's main process ends a task that came to its end by itself."""
        if get_current_task() is not None or errbacks.are_called_elsewhere():
            return False
        message_id = getattr(request, MESSAGE_ID, None)
        asked = {
            "task_id": str(task_id), "result_of": whose(task_id, states.SUCCESS, request)["result_of"],
            "message_id": message_id, "recorded": message_id is not None and self.endings.fate(request) is LEFT,
        }  # fmt: skip
        try:
            return bool(self.database.fetch(SQL["succeeded"], asked))
        except PatchpilotError:
            return False

    def mark_as_revoked(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        request = kwargs.get("request")
        with self.endings.left_to_recovery(task_id, request):
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
        task_id, group_id, fate = str(request.id), str(request.group), self.endings.fate(request)
        try:
            chord = self.endings.record(lambda: self._returned(request, state, result))
            fate = LEFT  # its part is on record
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
                "Chord %s %s, from part %s on: %s", group_id, fate, task_id, error, exc_info=not expected
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
        with errbacks.in_place_of(callback), unsent(callback):
            return super().chord_error_from_stack(callback, exc)

    def leave_parts(self, group_id: str, parts: Sequence[Row]) -> bool:
        """Leave what the parts of a failed chord returned where Celery's Redis backend would have left it. False if
        Valkey is away."""
        try:
            encoded = [self.encode([1, it["task_id"], it["state"], self.decode(it["payload"])]) for it in parts]
        except Exception as error:  # noqa: BLE001 - what cannot be decoded must not keep the chord from failing
            logger.info("The parts of chord %s are in PostgreSQL only: %r", group_id, error)
            return True
        return self.counter.leave(group_id, encoded, self._keys_expire(), ordered=self._chord_zset)

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
    if task is None:
        return
    request = task.request
    stop_renewal(request)
    backend = task.app.backend
    if state is None or not isinstance(backend, Backend):  # it was interrupted, or is none of ours
        return
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
