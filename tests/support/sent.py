"""A chord on a stage, sent so that one of its writes can be lost."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from celery import Signature, chord

from patchpilot.lab.processes import until
from tests.support.stage import (
    WAIT,
    Side,
    Stage,
)

slow = pytest.mark.slow


def on(*sides: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", sides, indirect=True, ids=str)


def slowly(case: Side | str) -> Any:
    return pytest.param(case, marks=slow, id=str(case))


class Sent:
    """A chord whose tasks and whose callback have queues of their own, and ids that are known before it is sent.

    :param alone: which of its tasks waits in a queue by itself. A worker that loses its connection leaves what it has
        taken besides unacknowledged, which would be another loss.
    """

    def __init__(
        self, stage: Stage, *header: Signature, alone: int | None = None, errback: Signature | None = None
    ) -> None:
        self.stage = stage
        self.parts, self.after, self.alone = stage.queue("parts"), stage.queue("after"), stage.queue("alone")
        self.ids = [str(uuid.uuid4()) for _ in header]
        self.callback = str(uuid.uuid4())
        for place, (task, task_id) in enumerate(zip(header, self.ids, strict=True)):
            links = task.tasks if hasattr(task, "tasks") else [task]
            for link in links:
                link.set(queue=self.alone if place == alone else self.parts)
            links[-1].set(task_id=task_id)  # a chain's result is that of its last task
        body = stage.tasks.total().set(queue=self.after, task_id=self.callback)
        if errback is not None:
            body = body.on_error(errback)
        self.canvas = chord(header, body, app=stage.app)
        self.result: Any = None

    def send(self) -> None:
        self.result = self.canvas.apply_async()

    def send_and_take_all_but_one(self, *others: str) -> None:
        """Until nothing is left but the task that waits by itself."""
        self.send()
        self.stage.consume(self.parts, *others)
        self.stage.await_rest(self.alone)

    def send_and_take_parts(self) -> None:
        """Until the callback waits in its queue."""
        self.send()
        self.stage.consume(self.parts)
        until(lambda: self.stage.waiting(self.after) == 1, seconds=WAIT, what="the callback was sent")
        self.stage.await_rest(self.after)

    def is_stuck(self, *ledger: str) -> bool:
        """Nothing goes on by itself: this is what ran, and nothing waits.

        :returns: whether that is the end of it, as there is nothing to recover with.
        """
        self.stage.await_rest()
        assert self.stage.ledger() == sorted(ledger)
        return self.stage.side.stock

    def is_done(self, *ledger: str, value: int | None = None) -> None:
        """This is what ran, no more and no less, and recovery has nothing left to do."""
        for line in ledger:
            self.stage.await_line(line, ledger.count(line))
        self.stage.await_rest()
        assert self.stage.ledger() == sorted(ledger)
        if value is not None:
            assert self.result.get(timeout=WAIT) == value
        self.stage.nothing_to_recover()


def adds(stage: Stage, number: int = 3) -> list[Signature]:
    return [stage.tasks.add(i, i) for i in range(number)]


ADDS = ("add 0 0", "add 1 1", "add 2 2")
