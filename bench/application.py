"""The application under measurement: tasks that do nothing, on the set-up that the environment names."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery


def application(settings: dict[str, Any]) -> Celery:
    """An application with these settings and the tasks ``bench.part`` and ``bench.callback``."""
    app = Celery("bench", set_as_current=False)
    app.conf.update(
        task_acks_late=True, worker_prefetch_multiplier=4, broker_connection_retry_on_startup=True,
        task_default_queue="bench", **settings,
    )  # fmt: skip

    @app.task(name="bench.part", shared=False)
    def part(number: int) -> int:
        return number

    @app.task(name="bench.callback", shared=False)
    def callback(results: list[int]) -> int:
        return len(results)

    return app


if "BENCH_SETTINGS" in os.environ:
    app = application(json.loads(os.environ["BENCH_SETTINGS"]))
