"""What a worker holds: the messages it has taken and that are not at their end.

Celery's own answer (``inspect query_task``) goes by task id and forgets a retry or a replaced task, which has the id of
the task before it, and does not know what waits for its ETA or its rate limit on older versions. So workers answer for
themselves, by message: everything that the channel has delivered and nobody acknowledged, whatever it waits for, and
everything acknowledged early that is being run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from patchpilot.backend.config import MESSAGE_ID
from patchpilot.backend.fence import INSTANCE

COMMAND = "patchpilot_held"
"""The remote control command: which of these messages does this worker hold?"""


def install() -> None:
    """Teach this process's worker the command. Only for worker processes: it loads Celery's worker."""
    from celery.worker.control import Panel, inspect_command

    if COMMAND not in Panel.data:
        inspect_command(name=COMMAND, args=[("message_ids", list)])(_held)


def _held(state: Any, message_ids: Iterable[str] = (), **_: Any) -> dict[str, Any]:
    """Answer the command: this worker instance, and those of ``message_ids`` that it holds."""
    held = set(_delivered(state.consumer)) | set(_running())
    return {"instance": INSTANCE, "held": sorted(held & set(message_ids))}


def _delivered(consumer: Any) -> Iterable[str]:
    # kombu's record of what was delivered and not yet acknowledged; it strikes what was acknowledged ("dirty") lazily.
    qos = getattr(getattr(getattr(consumer, "task_consumer", None), "channel", None), "qos", None)
    delivered, acknowledged = getattr(qos, "_delivered", None) or {}, getattr(qos, "_dirty", ())
    for tag, message in list(delivered.items()):
        if tag not in acknowledged and (found := (message.headers or {}).get(MESSAGE_ID)):
            yield found


def _running() -> Iterable[str]:
    from celery.worker import state

    for request in (*state.active_requests, *state.reserved_requests):
        if found := request.request_dict.get(MESSAGE_ID):
            yield found
