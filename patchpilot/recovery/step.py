"""The step of a Celery worker that recovers what its broker lost: see :func:`patchpilot.install`."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger

from patchpilot.recovery.sweeper import Sweeper, sweeper_of

logger = get_logger(__name__)


class Recovering(bootsteps.StartStopStep):  # type: ignore[misc]
    """Tells the sweeper that the worker's consumer has connected to the broker, the first time or again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._sweeper: Sweeper | None = None

    def start(self, parent: Any) -> None:
        try:
            self._sweeper = self._sweeper or sweeper_of(parent.app)
        except Exception as error:  # noqa: BLE001 - a worker that cannot recover can still work
            logger.error("This worker does not recover what its broker loses: %s", error)  # noqa: TRY400
        else:
            self._sweeper.connected()

    def stop(self, parent: Any) -> None:
        """The connection is lost. What is to be swept is swept all the same."""

    def shutdown(self, parent: Any) -> None:
        if self._sweeper is not None:
            self._sweeper.close()
