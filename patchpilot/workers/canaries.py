"""Sending a canary task and a canary chord to one worker, and removing what is left of them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any
from uuid import uuid4

from celery import Celery

from patchpilot.backend.canary import PARTS, chord_of, queue_of
from patchpilot.backend.config import CANARY
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.workers.application import backend_of

SQL = queries("canaries")


EXPIRES = timedelta(minutes=10)
"""After this a canary that nobody took is dropped by whoever finds it: longer than any pilot waits for one."""


def send(app: Celery, connection: Any, instance: str) -> str:
    """Send both into the queue of the worker ``instance``. Returns the token that they carry.

    :param app: a stand-in for the worker's application.
    :param connection: to the broker.
    """
    token, queue, seconds = str(uuid4()), queue_of(instance), EXPIRES.total_seconds()

    def fly(step: str, **options: Any) -> None:
        app.send_task(
            CANARY, kwargs={"step": step, "token": token}, queue=queue, expires=seconds, ignore_result=True,
            connection=connection, add_to_parent=False, **options,
        )  # fmt: skip

    fly("task")
    # A chord as Celery's canvas makes it, step by step, because the canvas takes no connection.
    group_id, header = chord_of(token), [app.AsyncResult(str(uuid4())) for _ in range(PARTS)]
    body = app.signature(CANARY, kwargs={"step": "chord", "token": token}, task_id=str(uuid4()), queue=queue.name)
    body.set(expires=seconds, ignore_result=True)
    backend = backend_of(app)
    backend.apply_chord((group_id, header), body)
    backend.set_chord_size(group_id, PARTS)
    for index, part in enumerate(header):
        fly("part", task_id=part.id, group_id=group_id, group_index=index, chord=body)
    return token


def purge(database: Database, app: Celery, brokers: Collection[str], group_ids: Collection[str] = ()) -> None:
    """Remove the canary chords called ``group_ids``, and all of ``brokers`` that are older than any canary lasts."""
    asked = {"group_ids": list(group_ids), "age": EXPIRES, "brokers": sorted(brokers)}
    gone = database.fetch(SQL["purge"], asked)
    for row in gone:
        backend_of(app).counter.clear(row["group_id"])
