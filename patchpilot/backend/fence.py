"""The fence: a task that is delivered twice runs once, and one whose worker died runs again.

After a failover the broker may deliver a callback a second time: the pop or the acknowledgement was among the lost
writes, or recovery pushed it again. Every such delivery has the same task id. So each start of a callback is claimed
in PostgreSQL, under a lease that is renewed while it runs. A second delivery of a finished callback is acknowledged
without running. A second delivery of one that runs elsewhere is dropped too: its message stays in the outbox until
the callback has ended, so recovery delivers it again should its runner die. One that is not there waits.

A task id alone does not name an execution: a frozen signature that is applied again has the same one. What does is the
task id within a scope. For a callback that is its chord; for what follows another task (the next one of its chain, a
link) it is the message of that task, because should it run twice, both runs publish what follows; for everything else
it is the message itself. A retry or a replacement belongs to what the task before it belonged to.

The fence sits around ``Task.run``, where raising ``Ignore`` ends a task without a result and without an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, LiteralString
from uuid import uuid4
from weakref import WeakKeyDictionary, ref

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, signals
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject
from celery.utils.log import get_logger
from celery.utils.nodenames import gethostname

from patchpilot.backend.config import CALLBACK_OF, MESSAGE_ID, FenceMode
from patchpilot.backend.instance import is_gone, this_process
from patchpilot.backend.message import attempt_of, following, name_links, scope_of
from patchpilot.clock import SYSTEM
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("fence")

DEATHS = 5
"""What has been begun so often, and whose process was killed each time, is not begun again: it has failed."""

ASIDE = 1.0
"""Seconds to wait before it is asked again whether a task may start."""


@dataclass(frozen=True)
class Start:
    """One execution of a fenced task."""

    task_id: str
    attempt: str
    """Retries and replacements: a retry is a start of its own."""
    scope: str
    owner: str

    def row(self) -> dict[str, Any]:
        return {"task_id": self.task_id, "attempt": self.attempt, "scope": self.scope, "owner": self.owner}


class Fence:
    """The fence of one application in this process.

    :param lease: how long after its last renewal a start counts as dead.
    :param on_repetition: told about a delivery that does not run because its task has run already.
    """

    def __init__(
        self, app: Celery, database: Database, mode: FenceMode, lease: timedelta, on_repetition: Callable[[Any], None]
    ) -> None:
        self._app = app
        self._database = database
        self._mode = mode
        self._lease = lease
        self._on_repetition = on_repetition

    def install(self) -> None:
        """Put the fence around every task of the application, now and whenever tasks are added."""
        if self._mode is FenceMode.OFF:
            return
        if self._app.finalized:
            self._wrap_all()
        else:
            self._app.on_after_finalize.connect(self._wrap_all, weak=False)
        # Modules imported later bring tasks of their own; a worker has imported all of its by then.
        for moment in (signals.celeryd_after_setup, signals.worker_process_init):
            moment.connect(self._wrap_all, weak=False, dispatch_uid=f"patchpilot.fence.{id(self._app)}")

    def _wrap_all(self, **_: Any) -> None:
        for task in list(self._app.tasks.values()):
            if not getattr(task.run, "patchpilot", False):
                task.run = self._guarded(task, task.run)
                if task.__trace__ is not None:  # the worker built its tracer before it first needed a backend
                    task.__trace__ = build_tracer(task.name, task, self._app.loader, gethostname(), app=self._app)

    def _guarded(self, task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            request = task.request
            name_links(request)
            request.patchpilot_following = following(request)
            scope = self._scope(request)
            if scope is None or request.called_directly or getattr(request, "patchpilot_start", None):
                return run(*args, **kwargs)
            start = self._begin(request, scope, acks_late=bool(task.acks_late))
            request.patchpilot_start = start
            _renewals[request] = _Renewal(request, self, start, self._lease)
            return run(*args, **kwargs)

        guarded.patchpilot = True  # type: ignore[attr-defined]
        return guarded

    def _scope(self, request: Any) -> str | None:
        """What the start of this task belongs to; None if it needs no fence."""
        return scope_of(vars(request), everything=self._mode is FenceMode.ALL)

    def _begin(self, request: Any, scope: str, *, acks_late: bool) -> Start:
        """Claim the start of a task, and wait for as long as nobody can tell whether it may run.

        Without PostgreSQL nobody knows whether it ran: neither run it nor call it failed. Nor give its message back: if
        that was acknowledged early, Celery would drop it. And a claim that was given up may be carried out later: it is
        ours only if the same owner asks again. A soft time limit that strikes meanwhile is not heard of: it strikes
        once, and is meant for work that has not begun.

        :raises Ignore: it has run already, or is running and on record.
        :raises Reject: it is running, not on record and not acknowledged yet: its message goes back to its queue.
        """
        start = Start(str(request.id), attempt_of(vars(request)), scope, str(uuid4()))
        told = False
        while True:
            try:
                reason = self._claim(request, start, acks_late=acks_late)
                if reason is None:
                    return start
                if not told:
                    logger.warning("%s[%s] waits before it starts: %s", request.task, request.id, reason)
                    told = True
                SYSTEM.sleep(ASIDE)
            except SoftTimeLimitExceeded:
                logger.warning("%s[%s] still waits, and begins without its soft time limit", request.task, request.id)

    def _claim(self, request: Any, start: Start, *, acks_late: bool) -> str | None:
        """Claim the start of a task. Why it has to wait; None if it may run."""
        try:
            if self._is_claimed(request, start):
                return None
        except PatchpilotError as error:
            return str(error)
        if not acks_late:
            return "it runs elsewhere, and nothing would bring it back"
        SYSTEM.sleep(ASIDE)
        raise Reject(f"{request.id} runs elsewhere", requeue=True)

    def _is_claimed(self, request: Any, start: Start) -> bool:
        """Claim the start of a task. False if it runs elsewhere, and nothing would bring it back should that one die.

        :raises Ignore: it has run already, or is running and on record.
        """
        if self._start(start):
            return True
        on_record = self._is_on_record(request)  # before the look: an execution that ends takes the message off it
        rows = self._database.fetch(SQL["look"], start.row())
        if rows and not rows[0]["finished"] and is_gone(rows[0]["worker"]) and self._start(start, rows[0]["worker"]):
            logger.warning("%s[%s] runs again: its process died", request.task, request.id)
            return True
        if rows and not rows[0]["finished"]:
            if not on_record:
                return False
            # Not ours to end: the message stays in the outbox for as long as the other execution lives.
            request.patchpilot_keep = True
        else:
            self._on_repetition(request)
        logger.warning("%s[%s] was delivered again and is not run again", request.task, request.id)
        raise Ignore

    def _is_on_record(self, request: Any) -> bool:
        message_id = getattr(request, MESSAGE_ID, None)
        return bool(message_id and self._database.fetch(SQL["on_record"], {"message_id": message_id}))

    def _start(self, start: Start, gone: str = "") -> bool:
        row = {**start.row(), "worker": this_process(), "lease": self._lease, "gone": gone}
        return bool(self._database.fetch(SQL["start"], row))

    def renew(self, start: Start) -> bool:
        """False if somebody else has it."""
        try:
            return bool(self._database.execute(SQL["renew"], {**start.row(), "lease": self._lease}))
        except PatchpilotError as error:
            logger.warning("The lease of task %s was not renewed: %s", start.task_id, error)
            return True

    def end(self, start: Start, message_id: str | None) -> None:
        """The execution is over, and its message with it."""
        self._record(SQL["end"], start, {"message_id": message_id})

    def end_for_others(self, request: Any) -> None:
        """A task was ended from outside of its process: whoever ran it does so no more."""
        scope = self._scope(request) if self._mode is not FenceMode.OFF else None
        if scope is not None:
            start = Start(str(request.id), attempt_of(vars(request)), scope, owner="")
            try:
                self._database.execute(SQL["end_for_others"], start.row())
            except PatchpilotError as error:
                logger.error("The end of task %s was not recorded: %s", start.task_id, error)  # noqa: TRY400

    def runs_again(self, request: Any) -> bool:
        """Whether a task whose process was killed runs again if recovery sends it again, and recovery can. Not what has
        killed its process every time.

        :raises PatchpilotError: if PostgreSQL cannot be asked.
        """
        scope = scope_of(vars(request), everything=False)
        if scope is None or self._mode is FenceMode.OFF:  # where nobody counts, only callbacks do
            return bool(getattr(request, CALLBACK_OF, None))
        start = Start(str(request.id), attempt_of(vars(request)), scope, owner="")
        asked = {**start.row(), "message_id": getattr(request, MESSAGE_ID, None), "most": DEATHS}
        return bool(self._database.fetch(SQL["runs_again"], asked))

    def give_up(self, start: Start) -> None:
        """Its message goes back to the queue: the next delivery may run."""
        self._record(SQL["give_up"], start, {})

    def _record(self, sql: LiteralString, start: Start, more: dict[str, Any]) -> None:
        try:
            self._database.execute(sql, {**start.row(), **more})
        except PatchpilotError as error:
            logger.error("The end of task %s was not recorded: %s", start.task_id, error)  # noqa: TRY400


class _Renewal:
    """Renews the lease of a start, from a thread of its own, until the task is over: what follows it is published, and
    its end recorded, when its body has long ended.

    :param request: of the task. Nobody has it any more when the task is over, even if nobody said so.
    """

    def __init__(self, request: Any, fence: Fence, start: Start, lease: timedelta) -> None:
        self._request = ref(request)
        self._fence = fence
        self._start = start
        self._every = lease.total_seconds() / 3
        self._over = threading.Event()
        try:
            threading.Thread(target=self._work, name="patchpilot-lease", daemon=True).start()
        except RuntimeError as error:
            logger.error("Task %s runs, and its lease is not renewed: %s", start.task_id, error)  # noqa: TRY400

    def stop(self) -> None:
        self._over.set()

    def _work(self) -> None:
        while not SYSTEM.wait(self._over, self._every) and self._request() is not None:
            if not self._fence.renew(self._start) and not self._over.is_set():
                logger.error("Task %s lost its lease while it runs; it may run twice", self._start.task_id)


_renewals: WeakKeyDictionary[Any, _Renewal] = WeakKeyDictionary()
"""By request, and not in it: applications copy and serialise those."""


def stop_renewal(request: Any) -> None:
    """The task of ``request`` is over, in whatever way."""
    renewal = _renewals.pop(request, None)
    if renewal is not None:
        renewal.stop()
