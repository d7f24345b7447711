"""The workload: a steady stream of chords. Runs as a process of its own, like a web application would.

The traffic is a function of its seed alone: sizes, gaps and payloads do not depend on what happens to it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from celery import chord

from patchpilot.clock import SYSTEM
from patchpilot.lab.ledger import Ledger
from patchpilot.lab.sample import Plan, hours, settle

SMALLEST, LARGEST = 2, 50


@dataclass(frozen=True)
class Order:
    """One chord to send."""

    name: str
    after: float
    """Seconds after the one before it was due."""
    employees: tuple[int, ...]
    work_ms: int
    plan: Plan


def orders(seed: int, rate: float) -> Iterator[Order]:
    """The traffic of ``seed``: ``rate`` chords a second on average, arriving as independent callers would.

    Sizes are spread evenly over their logarithm: many small chords and a few large ones.
    """
    dice = random.Random(seed)  # noqa: S311 - traffic, not secrets
    number = 0
    while True:
        number += 1
        size = round(math.exp(dice.uniform(math.log(SMALLEST), math.log(LARGEST))))
        employees = tuple(dice.sample(range(1, 10_000), size))
        half = size // 2
        plan = {f"plan-{number}": {"2026-11-01": list(employees[:half]), "2026-11-02": list(employees[half:])}}
        yield Order(f"chord-{number}", dice.expovariate(rate), employees, dice.randint(50, 150), plan)


def produce(ledger: Ledger, traffic: Iterator[Order], enough: threading.Event) -> None:
    """Send ``traffic`` until it ends or ``enough`` is set. A chord whose sending raises is not sent again."""
    due = SYSTEM.monotonic()
    for order in traffic:
        due += order.after
        if SYSTEM.wait(enough, due - SYSTEM.monotonic()):
            return
        header = [hours.s(order.name, employee, order.work_ms) for employee in order.employees]
        try:
            result = chord(header)(settle.s(order.name, order.plan))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller of a web application would see it
            ledger.write("raised", order.name, error=f"{type(error).__name__}: {error}"[:200])
        else:
            ledger.write("sent", order.name, employees=list(order.employees), group_id=result.parent.id)


def main() -> None:
    """``python -m patchpilot.lab.producer --seed N --rate R [--count C]``"""
    parser = argparse.ArgumentParser(description="Send chords, so many or until SIGTERM.")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="chords a second")
    parser.add_argument("--count", type=int, help="how many chords to send [default: until SIGTERM]")
    arguments = parser.parse_args()
    enough = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        enough.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the demo's to handle
    traffic = itertools.islice(orders(arguments.seed, arguments.rate), arguments.count)
    produce(Ledger(Path(os.environ["LAB_LEDGER"])), traffic, enough)


if __name__ == "__main__":
    main()
