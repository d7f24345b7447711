"""The canary: how a worker shows that it works, and does not only answer.

A worker may answer remote control and yet take no message: its consumer may be gone since a reconnect, its pool may be
blocked, or its pool's connections lead to a node that is no primary any more. So each worker consumes one more queue,
of its own, in the same way as all others, and the pilot puts a tiny task and a tiny chord into it. What comes back has
gone the whole way: broker, consumer, pool, PostgreSQL, and for the chord the count in Valkey and the callback.

A canary leaves nothing. Its messages are not journalled, not fenced, not acknowledged (so none is delivered again),
and expire. It says that it came back in the worker's own row, and a chord's callback removes the chord.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, signals
from celery.utils.log import get_logger
from kombu.entity import Exchange, Queue
from psycopg.types.json import Jsonb

from patchpilot.backend.config import CANARY
from patchpilot.backend.instance import this_worker
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

PARTS = 2
"""Tasks in the header of a canary chord."""

SQL = queries("canaries")


def queue_of(instance: str) -> Queue:
    """The queue of the worker ``instance``: a list in Valkey that is there only while a canary waits in it.

    It is never declared, because declaring it would leave a binding behind.
    """
    name = f"{CANARY}.{instance}"
    return Queue(name, Exchange(CANARY, type="direct"), routing_key=name, no_declare=True, no_ack=True)


def chord_of(token: str) -> str:
    """The group id of the canary chord that carries ``token``."""
    return f"{CANARY}.{token}"


def install(app: Celery) -> None:
    """Register the task with ``app``; in a worker, have it consume its queue as well."""
    if app.finalized:
        _register(app)
    else:
        app.on_after_finalize.connect(lambda **_: _register(app), weak=False)
    # By then the queues asked for with -Q are selected. A backend that is loaded later is loaded for the banner, which
    # is still before the worker consumes. (`use_fast_trace_task` is what Celery sets in its workers, and only there.)
    signals.celeryd_after_setup.connect(_consume, weak=False, dispatch_uid="patchpilot.canary")
    if getattr(app, "use_fast_trace_task", False):
        _consume(app=app)


def _register(app: Celery) -> None:
    if CANARY not in app.tasks:
        # Binding writes the application's defaults on the class, so each application has one of its own.
        app.register_task(type("Canary", (Canary,), {})())


def _consume(instance: Any = None, app: Celery | None = None, **_: Any) -> None:
    app = app or instance.app
    if CANARY in app.tasks:
        app.amqp.queues.select_add(queue_of(this_worker()))


class Canary(Task):  # type: ignore[misc]
    """Celery's plain task, whatever the application's own tasks are based on."""

    name = CANARY
    ignore_result = True
    acks_late = False
    reject_on_worker_lost = False
    store_errors_even_if_ignored = False

    def run(self, results: list[int] | None = None, *, step: str, token: str) -> int:
        """Come back.

        :param results: of the header, for the callback of a chord.
        :param step: ``task``, ``part`` (of a chord's header) or ``chord`` (its callback).
        """
        complete = step == "task" or (step == "chord" and results == [1] * PARTS)
        if complete:
            row = {"instance": this_worker(), "proof": Jsonb({step: token})}
            self.app.backend.database.execute(SQL["came_back"], row)
        if step == "chord":
            self.app.backend.database.execute(SQL["close"], {"group_id": chord_of(token)})
        return 1
