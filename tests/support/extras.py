"""More tasks of the test application, for workers started with ``-I tests.support.extras``.

Every start of a task is one more line of the ledger, whatever the task itself writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery import Task, chain, chord, group, signals
from celery.exceptions import Ignore

from tests.support.shop import add, app, hold, note, total, write


@signals.task_prerun.connect(weak=False)  # type: ignore[untyped-decorator]
def on_start(task_id: str, task: Task, **_: Any) -> None:
    if "SHOP_LEDGER" in os.environ:
        write(f"start {task.name.rpartition('.')[2]} {task_id}/{task.request.retries}")


def starts(ledger: list[str]) -> dict[str, int]:
    """How often each task ran, by name. Fails if one execution is there twice."""
    lines = [line.split()[1:] for line in ledger if line.startswith("start ")]
    assert len({tuple(line) for line in lines}) == len(lines), f"something ran twice: {lines}"
    names = sorted(name for name, _ in lines)
    return {name: names.count(name) for name in dict.fromkeys(names)}


@app.task
def fail(*_: Any, message: str = "no") -> None:
    raise ValueError(message)


@app.task
def wail(task_id: str) -> None:
    """An errback of the old kind: sent as a message of its own, with the id of what failed."""


@app.task
def mourner(request: Any, exc: Any, traceback: Any, label: str = "mourner") -> None:
    """An errback of the new kind: called in the process of what failed."""
    write(f"{label} {type(exc).__name__}")


@app.task
def mourns_long(request: Any, exc: Any, traceback: Any, gate: str) -> None:
    """An errback that waits until the file ``gate`` exists."""
    hold(None, gate, label="mourning")


@app.task
def constant(value: Any, *_: Any) -> Any:
    return value


@app.task(bind=True)
def becomes(self: Task, *_: Any, canvas: Any) -> Any:
    """Be replaced by a canvas."""
    return self.replace(app.signature(canvas))


@app.task(bind=True)
def becomes_chord(self: Task, value: int) -> Any:
    return self.replace(chord([add.s(value, 1), add.s(value, 2)], total.s()))


@app.task(bind=True)
def becomes_group(self: Task, value: int) -> Any:
    return self.replace(group(add.s(value, 1), add.s(value, 2)))


@app.task(bind=True)
def becomes_links(self: Task, value: int) -> Any:
    return self.replace(chain(add.s(value, 1), add.s(1)))


@app.task(bind=True)
def grows_behind(self: Task, value: int, gate: str) -> int:
    """Wait until the file ``gate`` exists, and then add a task to the chord that this one is in."""
    hold(None, gate)
    self.add_to_chord(add.s(value, 10))
    return value


@app.task(bind=True)
def grows_twice(self: Task, value: int) -> int:
    """Add a task, which adds another one, to the chord that this one is in."""
    self.add_to_chord(grows_once.s(value + 1))
    return value


@app.task(bind=True)
def grows_once(self: Task, value: int) -> int:
    self.add_to_chord(add.s(value, 100))
    return value


@app.task
def starts_a_chord(value: int) -> int:
    """Send a chord from inside a task."""
    chord([add.s(value, 1), add.s(value, 2)], note.s(label="inner")).delay()
    return value


@app.task
def ignores(*_: Any) -> None:
    raise Ignore


@app.task(bind=True)
def grows_by_failing(self: Task, value: int) -> int:
    self.add_to_chord(fail.s())
    return value


@app.task
def opaque() -> Any:
    """Return what no serialiser but pickle takes."""
    return {1, 2}


@app.task
def large(size: int) -> str:
    return "x" * size


@app.task
def spawns(number: int) -> Any:
    """Send a task for each number up to ``number`` and return the promise of their results."""
    return group(add.s(i, i) for i in range(number)).delay()


@app.task(bind=True, max_retries=None)
def knocks(self: Task, gate: str) -> str:
    """Try again until the file ``gate`` exists."""
    if not os.path.exists(gate):  # noqa: PTH110 - a string, in a task
        raise self.retry(exc=KeyError("closed"), countdown=0.3)
    return "open"


@app.task(bind=True)
def progresses(self: Task, gate: str) -> str:
    """Say how far it is, and wait until the file ``gate`` exists."""
    self.update_state(state="PROGRESS", meta={"done": 1})
    return str(hold(None, gate))


@app.task(ignore_result=True, store_errors_even_if_ignored=True)
def fails_loudly() -> None:
    raise ValueError("stored all the same")


class Demanding(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Holding(Exception):
    """Holds what no serialiser takes."""

    def __init__(self, what: str) -> None:
        super().__init__(what, lambda: what)


def unprintable() -> Exception:
    class Unprintable(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no representation")

    return Unprintable("x")


def local() -> Exception:
    class Local(Exception):
        """Can be imported by nobody."""

    return Local("a")


def caused() -> Exception:
    error = ValueError("outer", {"at": 1})
    error.__cause__ = KeyError("inner")
    return error


DEATHS: dict[str, Callable[[], Exception]] = {
    "demanding": lambda: Demanding("a", "b"),
    "holding": lambda: Holding("a"),
    "local": local,
    "unprintable": unprintable,
    "caused": caused,
    "group": lambda: ExceptionGroup("many", [ValueError("a"), KeyError("b")]),
    "unicode": lambda: ValueError("\udc80 \0 é"),
    "system": lambda: SystemError("anything"),
}


@app.task
def dies(how: str) -> None:
    error = DEATHS[how]()
    raise error
