"""What a worker says of itself when it is asked: what it consumes, how busy it is, and how it is set up.

A remote control command, answered by the worker's main process. Never a secret: of the broker only the address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from patchpilot.backend.canary import queue_of
from patchpilot.backend.config import CANARY
from patchpilot.backend.instance import this_worker

COMMAND = "patchpilot_about"

SETTINGS = (
    "broker_channel_error_retry", "broker_connection_retry", "broker_connection_max_retries",
    "task_acks_late", "task_reject_on_worker_lost", "worker_prefetch_multiplier", "task_serializer",
)  # fmt: skip
TRANSPORT_OPTIONS = ("socket_timeout", "health_check_interval", "visibility_timeout")

REDIS_PORT = 6379


def install() -> None:
    """Teach this process's worker the command. Only for worker processes: it loads Celery's worker."""
    from celery.worker.control import Panel, inspect_command

    if COMMAND not in Panel.data:
        inspect_command(name=COMMAND)(_about)


def _about(state: Any, **_: Any) -> dict[str, Any]:
    from celery.worker import state as at_work

    consumer = state.consumer
    consumed = [queue.name for queue in getattr(consumer.task_consumer, "queues", ())]
    connection = consumer.connection
    return {
        "instance": this_worker(),
        "queues": sorted(name for name in consumed if not name.startswith(CANARY)),
        "canary": queue_of(this_worker()).name in consumed,
        "processes": getattr(consumer.pool, "num_processes", None),
        "running": dict(Counter(request.name for request in at_work.active_requests)),
        "broker": [getattr(connection, "hostname", None), getattr(connection, "port", None) or REDIS_PORT],
        "settings": _settings(state.app.conf, getattr(connection, "transport_options", None) or {}),
    }


def _settings(conf: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """As they are in effect: of the connection at work, which our transport completes."""
    found = {name: conf.get(name) for name in SETTINGS}
    found |= {f"broker_transport_options.{name}": options.get(name) for name in TRANSPORT_OPTIONS}
    return {name: value if isinstance(value, (bool, int, float, str)) else None for name, value in found.items()}
