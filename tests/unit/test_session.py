"""How long an answer of PostgreSQL is waited for: silence counts, not work."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import psycopg
import pytest

from patchpilot.clock import FakeClock
from patchpilot.postgres.session import impatient

NOTHING, SOMETHING = 0, 1


class Waiting:
    """What psycopg would wait for, step by step."""

    def __init__(self, patience: float) -> None:
        self.clock = FakeClock()
        self.given_up = 0
        self.arrives = True
        self._gen = impatient(self._work(), patience, self.clock, lambda _wants: self.arrives, self._give_up)
        next(self._gen)

    def _work(self) -> Generator[Any, Any, str]:
        for _ in range(3):
            while not (yield "wants to read"):
                pass
        return "done"

    def _give_up(self) -> None:
        self.given_up += 1

    def after(self, seconds: float, ready: int) -> None:
        self.clock.sleep(seconds)
        assert self._gen.send(ready) == "wants to read"  # type: ignore[comparison-overlap]

    def end(self) -> object:
        with pytest.raises(StopIteration) as end:
            self._gen.send(SOMETHING)  # type: ignore[arg-type]
        return end.value.value


def test_what_goes_on_may_take_as_long_as_it_likes() -> None:
    waiting = Waiting(patience=10)
    for _ in range(2):
        waiting.after(9, NOTHING)
        waiting.after(9, SOMETHING)
    waiting.after(9, NOTHING)
    assert waiting.end() == "done"
    assert waiting.given_up == 0


def test_silence_ends() -> None:
    waiting = Waiting(patience=10)
    waiting.after(9, SOMETHING)
    waiting.after(9, NOTHING)
    with pytest.raises(psycopg.OperationalError, match="no answer for 10 s"):
        waiting.after(1, NOTHING)
    assert waiting.given_up == 1


def test_old_versions_of_psycopg_always_say_that_something_arrived() -> None:
    waiting = Waiting(patience=10)
    waiting.arrives = False
    waiting.after(9, SOMETHING)
    with pytest.raises(psycopg.OperationalError, match="no answer for 10 s"):
        waiting.after(1, SOMETHING)
    assert waiting.given_up == 1
