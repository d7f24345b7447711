"""A worker whose pool process dies just before its broker's connection does.

Celery is told that a process of its pool has died when the process closes its end of a pipe. It stops listening to
that pipe and looks whether the process is gone, and a moment too early it is not: then it stays in the pool until the
next look, some seconds later. A connection to the broker that is lost within these seconds stops the worker for good:
listening anew, Celery trips over the one process that it had stopped listening to ("file descriptor is None").
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps


class Listening(bootsteps.StartStopStep):  # type: ignore[misc]
    """Before the consumer begins, the first time or again: let Celery listen to every process of its pool."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        pool = getattr(parent.pool, "_pool", None)  # prefork's; other pools have no processes
        for process in getattr(pool, "_pool", ()):
            if getattr(process, "_sentinel_poll", 0) is None:
                del process._sentinel_poll  # Celery takes a new one then, and is told once more that it has died
