"""How a task's end that cannot be recorded is kept from changing how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.utils.log import get_logger

from patchpilot.errors import PatchpilotError

logger = get_logger(__name__)


@contextmanager
def left_to_recovery(task_id: str, request: Any) -> Iterator[None]:
    """A task has ended, and PostgreSQL is away for longer than anybody waits. That must not change how it ended, and
    Celery would call it failed if it heard of this. Its message stays in the outbox, so recovery sends it again."""
    try:
        yield
    except PatchpilotError as error:
        if request is None:
            raise
        request.patchpilot_keep = True
        logger.error("Task %s is left to recovery, its end was not recorded: %s", task_id, error)  # noqa: TRY400
