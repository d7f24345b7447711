"""The fence is around every task, whenever the task was registered."""

from __future__ import annotations

from datetime import timedelta

import pytest
from celery import Celery, signals

from patchpilot.backend.config import FenceMode
from patchpilot.backend.fence import Fence
from patchpilot.postgres.connection import Database

pytestmark = pytest.mark.backend


def test_every_task_is_fenced_whenever_it_was_registered() -> None:
    app = Celery("late", broker="memory://", set_as_current=False)

    @app.task
    def early() -> int:
        return 1

    Fence(
        app, Database("postgresql://127.0.0.1:1/x"), FenceMode.ALL, timedelta(seconds=1), lambda _request: None
    ).install()
    app.finalize()
    assert app.tasks[early.name].run.patchpilot

    @app.task(lazy=False)
    def late() -> int:
        return 2

    assert not hasattr(app.tasks[late.name].run, "patchpilot")
    signals.worker_process_init.send(sender=None)
    assert app.tasks[late.name].run.patchpilot
    # Called like a function, a task is no delivery: the fence stays out of it, and so does PostgreSQL.
    assert (early(), late()) == (1, 2)
