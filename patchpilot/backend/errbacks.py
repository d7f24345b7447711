"""Errbacks of a chord that recovery ends: called where their code is.

Celery calls an errback that takes ``request, exc, traceback`` in the process in which something failed, and sends one
that takes a task id as a message. Which of the two it is only its code tells, and recovery has none of it. So recovery
sends each errback to where it says itself, or else to the workers of the callback, which are there if anybody is; and
there Celery does with it what it always does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from celery import Celery, Task
from celery.app.task import Context
from celery.canvas import maybe_signature

from patchpilot.backend.routes import as_recorded, maybe_tasks

ERRBACK = "patchpilot.errback"
"""The name of the task that calls one errback."""

_OF_REQUEST = ("id", "task", "args", "kwargs", "root_id", "parent_id")
"""What an errback of the new kind gets to know of what failed."""

_PLACE = ("queue", "exchange", "routing_key")

_ROUTING = (*_PLACE, "priority", "serializer", "compression")

_callback: ContextVar[Any] = ContextVar("patchpilot_errbacks_callback", default=None)
_elsewhere: ContextVar[bool] = ContextVar("patchpilot_errbacks_elsewhere", default=False)


@contextmanager
def called_by_workers() -> Iterator[None]:
    """Inside, errbacks are sent to workers to be called there."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def are_called_elsewhere() -> bool:
    """Whether this process does not know the errbacks' code."""
    return _elsewhere.get()


@contextmanager
def in_place_of(callback: Any) -> Iterator[None]:
    """Inside, errbacks are those of a chord that does not call ``callback``."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def send(app: Celery, request: Any, error: Any) -> None:
    """Send the errbacks of ``request`` to be called.

    :param error: what happened, as a result backend encodes it.
    """
    failed = {name: value for name in _OF_REQUEST if (value := getattr(request, name, None)) is not None}
    for errback in request.errbacks:
        signature = app.signature(errback)
        app.send_task(
            ERRBACK, kwargs={"errback": signature, "failed": failed, "error": error}, task_id=str(uuid4()),
            ignore_result=True, **_route(app, signature),
        )  # fmt: skip


def _route(app: Celery, errback: Any) -> dict[str, Any]:
    route = as_recorded(errback.task) or {}
    if not _some(_PLACE, errback.options) and (place := _place(app, _callback.get())):
        route = {name: value for name, value in route.items() if name not in _PLACE} | place
    return {**route, **_some(_ROUTING, errback.options)}


def _place(app: Celery, callback: Any) -> dict[str, Any]:
    """Where the first message of a callback would go."""
    while (signature := maybe_signature(callback, app=app)) is not None:
        if own := _some(_PLACE, signature.options):
            return own
        kwargs = signature.kwargs or {}
        within = maybe_tasks(kwargs.get("tasks")) or maybe_tasks(kwargs.get("header"))
        if signature.get("subtask_type") not in ("group", "chain", "chord") or not within:
            return _some(_PLACE, as_recorded(signature.task) or {})
        callback = within[0]
    return {}


def _some(names: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name in names if (value := options.get(name)) is not None}


def install(app: Celery) -> None:
    """Register the task with ``app``."""
    if app.finalized:
        _register(app)
    else:
        app.on_after_finalize.connect(lambda **_: _register(app), weak=False)


def _register(app: Celery) -> None:
    if ERRBACK not in app.tasks:
        # Binding writes the application's defaults on the class, so each application has one of its own.
        app.register_task(type("Errback", (Errback,), {})())


class Errback(Task):  # type: ignore[misc]
    """Celery's plain task, whatever the application's own tasks are based on."""

    name = ERRBACK
    ignore_result = True

    def run(self, errback: Any, failed: dict[str, Any], error: Any) -> None:
        """Call one errback, or send it: as Celery does with errbacks of its kind."""
        backend = self.app.backend
        request = Context({**failed, "errbacks": [errback], "delivery_info": {}})
        backend.call_errbacks(request, backend.exception_to_python(error))
