"""How the application would publish a callback, recorded with the chord.

Recovery publishes callbacks without having the application's code. What the application decides by its configuration
and its task classes (queue, priority, serialiser) is therefore resolved where it is known, when the chord is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Celery
from celery.canvas import Signature, maybe_signature
from kombu.utils.functional import maybe_list

# Of all publishing options these decide where a message goes and what it looks like.
_RECORDED = ("priority", "serializer", "compression", "delivery_mode", "exchange", "routing_key")


def routes(app: Celery, callback: Signature) -> dict[str, dict[str, Any]]:
    """For each task in ``callback``: the options it would be published with, by task name."""
    return {name: _route(app, name) for name in task_names(app, callback)}


def task_names(app: Celery, callback: Signature) -> list[str]:
    """The tasks in ``callback``, by name."""
    return sorted(set(_task_names(app, callback)))


_recorded: ContextVar[dict[str, dict[str, Any]]] = ContextVar("patchpilot_routes", default={})  # noqa: B039 - never changed


@contextmanager
def recorded_routes(of_chord: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Inside, an application whose ``task_routes`` is :func:`as_recorded` publishes as the chord's own would."""
    token = _recorded.set(of_chord)
    try:
        yield
    finally:
        _recorded.reset(token)


def as_recorded(name: str, *_: Any, **__: Any) -> dict[str, Any] | None:
    """A Celery router: the route that was recorded for the task called ``name``."""
    return _recorded.get().get(name)


def _task_names(app: Celery, signature: Any) -> Iterator[str]:
    signature = maybe_signature(signature, app=app)
    if signature is None:
        return
    kwargs = signature.kwargs or {}
    match signature.get("subtask_type"):
        case "group" | "chain":
            for task in kwargs.get("tasks", ()):
                yield from _task_names(app, task)
        case "chord":
            for task in maybe_tasks(kwargs.get("header")):
                yield from _task_names(app, task)
            yield from _task_names(app, kwargs.get("body"))
        case _:
            yield signature.task
    for option in ("link", "link_error"):
        # One signature may stand without a list around it, and a signature is a dict.
        for link in maybe_list(signature.options.get(option)) or ():
            yield from _task_names(app, link)


def maybe_tasks(header: Any) -> list[Any]:
    """The tasks of a chord header, which is a group or a list."""
    tasks = getattr(header, "tasks", header)
    return list(tasks or ())


def _route(app: Celery, name: str) -> dict[str, Any]:
    task = app.tasks.get(name)
    options = dict(task._get_exec_options()) if task is not None else {}
    options = app.amqp.router.route(
        {key: value for key, value in options.items() if value is not None}, name, task_type=task
    )
    recorded = {key: options[key] for key in _RECORDED if options.get(key) is not None}
    recorded["exchange"] = getattr(recorded.get("exchange"), "name", recorded.get("exchange"))
    queue = options.get("queue")
    if queue is not None:
        recorded["queue"] = getattr(queue, "name", queue)
        exchange = getattr(queue, "exchange", None)
        if exchange is not None and exchange.type not in ("direct", None):
            # A queue alone says where a message ends; for these the exchange decides.
            recorded |= {"exchange": exchange.name, "routing_key": recorded.get("routing_key") or queue.routing_key}
            del recorded["queue"]
    recorded.setdefault("serializer", app.conf.task_serializer)
    return {key: value for key, value in recorded.items() if value is not None}
