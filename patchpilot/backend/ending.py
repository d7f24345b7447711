"""How a task's end that cannot be recorded is kept from changing how it ended, and from being forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded
from celery._state import get_current_worker_task
from celery.utils.log import get_logger

from patchpilot.backend.config import CANARY, MESSAGE_ID, Journal
from patchpilot.backend.errbacks import are_called_elsewhere
from patchpilot.backend.fence import ASIDE
from patchpilot.clock import SYSTEM
from patchpilot.errors import PatchpilotError

logger = get_logger(__name__)

T = TypeVar("T")

LEFT = "is left to recovery"
LOST = "is lost unless its message is delivered again"


class Endings:
    """The ends of tasks.

    :param journal: of which messages there is a record.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def fate(self, request: Any) -> str:
        """What becomes of a task whose end is not recorded. Without PostgreSQL nobody can say more than what should be
        on record."""
        if self._journal is not Journal.REQUIRED:
            return LOST
        # A later task of a chain, whose part an earlier one returns, has no message yet.
        unknown = getattr(request, "delivery_info", None) and not getattr(request, MESSAGE_ID, None)
        return LOST if unknown else LEFT

    @contextmanager
    def left_to_recovery(self, task_id: str, request: Any) -> Iterator[None]:
        """A task has ended, and PostgreSQL is away for longer than anybody waits. That must not change how it ended,
        and Celery would call it failed if it heard of this. If its message is on record it stays there, so recovery
        sends it again."""
        try:
            yield
        except PatchpilotError as error:
            if request is None:
                raise
            request.patchpilot_keep = True
            logger.error("Task %s %s, its end was not recorded: %s", task_id, self.fate(request), error)  # noqa: TRY400

    def record(self, write: Callable[[], T]) -> T:
        """Record the end of the task that runs here, or of a later one of its chain.

        If nothing would bring the task back, wait for PostgreSQL however long that takes: a chord would wait for ever.
        A worker's main process, which ends what ran in another one, cannot wait: everybody would wait for it.

        :raises PatchpilotError: it cannot be recorded.
        """
        return self._insist(write) if self._waits() else write()

    def _waits(self) -> bool:
        task = get_current_worker_task()
        if task is None or task.name == CANARY or are_called_elsewhere():
            return False
        return not task.request.is_eager and self.fate(task.request) is LOST

    @staticmethod
    def _insist(write: Callable[[], T]) -> T:
        request, told = get_current_worker_task().request, False
        while True:
            try:
                if told:
                    SYSTEM.sleep(ASIDE)
                return write()
            except SoftTimeLimitExceeded:  # it strikes once, and the task's body has ended
                logger.warning("%s[%s] ends in spite of its soft time limit", request.task, request.id)
            except PatchpilotError as error:
                if not told:
                    logger.warning("%s[%s] waits before it ends: %s", request.task, request.id, error)
                    told = True
