"""Sending a canary task and a canary chord to one worker."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

from celery import Celery

from patchpilot.backend.canary import PARTS, chord_of, queue_of
from patchpilot.backend.config import CANARY
from patchpilot.workers.application import backend_of


def send(app: Celery, connection: Any, instance: str, expires: timedelta) -> str:
    """Send both into the queue of the worker ``instance``. Returns the token that they carry.

    :param app: a stand-in for the worker's application.
    :param connection: to the broker.
    :param expires: after which nobody runs them any more.
    """
    token, queue, seconds = str(uuid4()), queue_of(instance), expires.total_seconds()

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
