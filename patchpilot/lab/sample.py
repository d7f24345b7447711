"""The application under rehearsal: payrolls. Each chord computes the hours of some employees and settles their plan.

With stock Celery its settings are the best for a failover that Celery has. With patchpilot they are the same, and what
`patchpilot.install` adds where they say nothing: its transport.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from pathlib import Path
from typing import Any

from celery import Celery

import patchpilot
from patchpilot.clock import SYSTEM
from patchpilot.lab.ledger import Ledger

Plan = dict[str, dict[str, list[int]]]
"""plan -> date -> employee ids"""

app = Celery("payroll")
app.conf.update(
    broker_url=os.environ.get("LAB_BROKER", "redis://127.0.0.1:1/0"),
    result_backend=os.environ.get("LAB_BACKEND"),
    patchpilot_database=os.environ.get("LAB_POSTGRES"),
    broker_channel_error_retry=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "visibility_timeout": 10,
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 5,
    },
    result_backend_always_retry=True,
    result_backend_transport_options={"additional_connection_errors": ["redis.exceptions.ReadOnlyError"]},
    redis_socket_timeout=5.0,
    redis_socket_connect_timeout=2.0,
    redis_backend_health_check_interval=5,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_publish_retry_policy={"max_retries": 60, "interval_start": 0.05, "interval_step": 0.1, "interval_max": 0.5},
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=True,
)
if str(app.conf.result_backend).startswith("patchpilot+"):
    patchpilot.install(app)


def chord_of(message: dict[str, Any]) -> tuple[str, int | None]:
    """What a queued message of this application is for: its chord and, if it asks for hours, whose."""
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    if message["headers"]["task"] == hours.name:
        named = dict(zip(("chord", "employee"), args, strict=False)) | kwargs
        return str(named["chord"]), int(named["employee"])
    return str(kwargs["chord"] if "chord" in kwargs else args[1]), None


def _ledger() -> Ledger:
    return Ledger(Path(os.environ["LAB_LEDGER"]))


@app.task  # type: ignore[untyped-decorator]
def hours(chord: str, employee: int, work_ms: int) -> int:
    """Compute one employee's hours: some milliseconds of waiting, as for a database."""
    SYSTEM.wait(threading.Event(), work_ms / 1000)
    _ledger().write("part", chord, part=employee)
    return employee * 8


@app.task  # type: ignore[untyped-decorator]
def settle(results: list[int], chord: str, plan: Plan) -> int:
    """Settle a plan. The results must be those of its employees, in order."""
    employees = [employee for dates in plan.values() for ids in dates.values() for employee in ids]
    right = results == [employee * 8 for employee in employees]
    _ledger().write("callback", chord, right=right, got="" if right else repr(results)[:200])
    return sum(results)
