"""Whose a result is. A task id may be used twice, and what one message of it came to says nothing of the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from celery.canvas import Signature
from celery.states import READY_STATES

from patchpilot.backend.message import origin

NO_MESSAGE = str(UUID(int=0))
"""Stands for the message of a task that has ended without one."""

_unsent: ContextVar[Signature | None] = ContextVar("patchpilot_unsent", default=None)


@contextmanager
def unsent(callback: Signature) -> Iterator[None]:
    """Inside, the callback of a chord that failed is ended: it was never sent."""
    token = _unsent.set(callback)
    try:
        yield
    finally:
        _unsent.reset(token)


def whose(task_id: str, state: str, request: Any) -> dict[str, str | None]:
    """Of which message a result is, and of which group that is; '' for none.

    Nothing is said of what is not final, or of a result that somebody stores who has no message of the task.
    """
    message_id, group_id, callback = None, None, _unsent.get()
    if state not in READY_STATES:
        pass
    elif request is not None and str(request.id) == str(task_id):
        message_id = origin(request)
        group_id = request.group or (None if message_id is None else "")
    elif request is None and callback is not None and callback.id == task_id:
        # In the header of another chord it is a part of that one.
        message_id = NO_MESSAGE
        group_id = callback.options.get("group_id") if callback.options.get("chord") is not None else ""
    return {"result_of": message_id, "result_group": None if group_id is None else str(group_id)}
