"""A Celery application as a user would write it, for tests. It learns its addresses from the environment.

The ledger is a file: each line is one execution, appended in one write. It shares nothing with what it judges.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from celery import Celery, Task, chain, chord, group
from celery.result import allow_join_result
from kombu import Exchange, Queue

import patchpilot
from patchpilot.clock import SYSTEM

app = Celery("shop")
app.conf.update(
    broker_url=os.environ.get("SHOP_BROKER", "redis://127.0.0.1:1/0"),
    result_backend=os.environ.get("SHOP_BACKEND", ""),
    patchpilot_postgres=os.environ.get("SHOP_POSTGRES", ""),
    broker_connection_retry_on_startup=True,
    broker_channel_error_retry=os.environ.get("SHOP_CHANNEL_RETRY") == "1",
    task_acks_late=os.environ.get("SHOP_ACKS_LATE") == "1",
    task_reject_on_worker_lost=os.environ.get("SHOP_ACKS_LATE") == "1",
    worker_prefetch_multiplier=1,
    patchpilot_fence_lease=float(os.environ.get("SHOP_FENCE_LEASE", "30")),
    patchpilot_claim_lease=float(os.environ.get("SHOP_CLAIM_LEASE", "30")),
    patchpilot_counting=os.environ.get("SHOP_COUNTING", "postgres"),
    patchpilot_fence=os.environ.get("SHOP_FENCE", "callbacks"),
    patchpilot_mode=os.environ.get("SHOP_MODE", "durable"),
    worker_deduplicate_successful_tasks=os.environ.get("SHOP_DEDUPLICATE") == "1",
    accept_content=os.environ.get("SHOP_ACCEPT", "json").split(","),
)
everybody = Queue("everybody", Exchange("everybody", type="fanout"), routing_key="everybody")
if os.environ.get("SHOP_EVERYBODY") == "1":
    app.conf.task_queues = [Queue("celery"), everybody]
app.conf.update(json.loads(os.environ.get("SHOP_SETTINGS", "{}")))
if os.environ.get("SHOP_STOCK") != "1":
    patchpilot.install(app, recover=os.environ.get("SHOP_RECOVER") == "1")


def write(line: str) -> None:
    """Add one line to the ledger."""
    descriptor = os.open(os.environ["SHOP_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[str]:
    """The ledger's lines so far."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@app.task
def add(x: int, y: int) -> int:
    write(f"add {x} {y}")
    return x + y


@app.task
def total(values: list[int], label: str = "total") -> int:
    write(f"{label} {sum(values)}")
    return sum(values)


@app.task(ignore_result=True)
def quiet(value: Any) -> Any:
    write(f"quiet {value}")
    return value


@app.task
def boom(*_: Any) -> None:
    raise ValueError("boom")


@app.task
def mourn(request: Any, exc: Any, traceback: Any) -> None:
    write(f"mourn {exc!r}")


@app.task
def renewals() -> int:
    """How many leases are being renewed in this process."""
    return sum(thread.name == "patchpilot-lease" for thread in threading.enumerate())


@app.task
def note(value: Any, label: str = "note") -> Any:
    write(f"{label} {value!r}")
    return value


@app.task
def hold(value: Any, gate: str, label: str = "hold") -> Any:
    """Say that it began, then wait until the file ``gate`` exists."""
    write(f"{label} began")
    while not Path(gate).exists():
        SYSTEM.wait(threading.Event(), 0.02)
    write(f"{label} ended")
    return value


@app.task
def spoil(gate: str) -> None:
    """As :func:`hold`, and then fail."""
    hold(None, gate, label="spoil")
    raise ValueError("spoilt")


@app.task
def seems_dead() -> None:
    """Close the pipe that tells the worker of this process's death, as its death would do a moment before its end."""
    frame = sys._getframe()
    while "child_w" not in frame.f_locals:  # where billiard began this process
        frame = frame.f_back  # type: ignore[assignment]
    os.close(frame.f_locals["child_w"])
    write("let go")


@app.task(bind=True, max_retries=3)
def stubborn(self: Task, value: Any, fail: int = 1) -> Any:
    """Fail ``fail`` times, then succeed."""
    write(f"stubborn {self.request.retries}")
    if self.request.retries < fail:
        raise self.retry(countdown=0)
    return value


@app.task(bind=True)
def later(self: Task, label: str, countdown: float) -> str:
    """Write once, and once more after a retry."""
    write(f"{label} {self.request.retries}")
    if self.request.retries == 0:
        raise self.retry(countdown=countdown)
    return label


@app.task
def relay(label: str, steps: int) -> str:
    """Publish the next step from inside the pool, ``steps`` times."""
    write(f"{label} {steps}")
    if steps:
        relay.delay(label, steps - 1)
    return f"{label} {steps}"


@app.task(bind=True)
def becomes_hold(self: Task, gate: str) -> Any:
    return self.replace(hold.s(None, gate, label="replaced"))


@app.task(bind=True)
def becomes_chord_of(self: Task, gate: str) -> Any:
    return self.replace(chord([hold.s(1, gate), add.s(1, 1)], total.s()))


@app.task(bind=True)
def becomes_two(self: Task, value: int) -> Any:
    return self.replace(group(add.s(value, 1), add.s(value, 2)))


@app.task(bind=True)
def becomes_chain(self: Task, value: int) -> Any:
    return self.replace(chain(add.s(value, 1), add.s(1)))


@app.task(bind=True)
def grows(self: Task, value: int) -> int:
    self.add_to_chord(add.s(value, 10))
    return value


@app.task
def asks(x: int, y: int) -> int:
    """Wait for another task, as nobody should and many do."""
    with allow_join_result():
        return int(add.delay(x, y).get(timeout=60))


@app.task(bind=True)
def again(self: Task, left: int) -> int:
    """Send itself again under its own id, as a poller does."""
    write(f"again {left}")
    if left:
        again.apply_async((left - 1,), task_id=self.request.id, queue="later")
    return left
