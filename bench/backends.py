"""What the backend and each of its settings cost, against Celery's own Redis backend: ``make bench``.

All set-ups run at once, each with a worker, a Valkey database and a PostgreSQL database of its own, and are measured
in turn, several times over; the tables show medians of the ratios to the stock set-up of the same turn: how fast it is,
and how much processor time the worker and the producer take. PostgreSQL waits for its disk (fsync on), and in the
second half of the run also for three milliseconds at each commit, as a replicated one does over a network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from celery import Celery, chord

from bench.application import application
from patchpilot.clock import SYSTEM
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.lab.watchdog import Watchdog
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate

STOCK = "stock redis://"
SETUPS: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "patchpilot, as it comes": {},
    "prepared_statements": {"patchpilot_prepared_statements": True},
    "counting = valkey": {"patchpilot_counting": "valkey"},
    "journal_messages = False": {"patchpilot_journal_messages": False},
    "fence = all": {"patchpilot_fence": "all"},
    "mode = shadow": {"patchpilot_mode": "shadow"},
}
LOADS = {"1 chord of 10": (1, 10), "1 chord of 200": (1, 200), "40 chords of 10": (40, 10), "4 chords of 200": (4, 200)}
"""How many chords of how many tasks are sent at once."""

SLOW_COMMIT = "3000"
"""Microseconds."""


@dataclass(frozen=True)
class Setup:
    """One set-up at work."""

    app: Celery
    worker: psutil.Process

    def cpu(self) -> float:
        """Processor seconds so far: the worker's, with its pool, and this process's own."""
        return sum(_cpu(process) for process in (psutil.Process(), self.worker, *self.worker.children(recursive=True)))


@dataclass(frozen=True)
class Cost:
    """What one run of a load took, in seconds."""

    wall: float
    cpu: float


def main() -> None:
    """``python -m bench.backends [--repeats N] [--processes N]``"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns for each load [default: 7]")
    parser.add_argument("--processes", type=int, default=8, help="pool processes of each worker [default: 8]")
    arguments = parser.parse_args()
    with _servers() as (roster, directory, postgres, valkey), ExitStack() as stack:
        setups = {
            name: stack.enter_context(_setup(number, name, roster, directory, postgres, valkey, arguments.processes))
            for number, name in enumerate(SETUPS)
        }
        for title, delay in (("commits as fast as the disk", "0"), ("commits that take 3 ms", SLOW_COMMIT)):
            _configure(postgres, delay)
            costs = _measure(setups, arguments.repeats)
            _show(f"{title}: how many times as fast as {STOCK}, medians", costs, lambda it, stock: stock.wall / it.wall)
            told = f"{title}: processor time of worker and producer, as a multiple of {STOCK}'s, medians"
            _show(told, costs, lambda it, stock: it.cpu / stock.cpu)


Costs = dict[str, dict[str, list[Cost]]]
"""Load -> set-up -> what it took in each turn."""


def _measure(setups: dict[str, Setup], repeats: int) -> Costs:
    costs: Costs = {load: {name: [] for name in setups} for load in LOADS}
    for load, (chords, size) in LOADS.items():
        for setup in setups.values():
            _run(setup, chords, size)  # warm up: connections, caches
        for turn in range(repeats):
            for name in [*setups][turn % len(setups) :] + [*setups][: turn % len(setups)]:
                costs[load][name].append(_run(setups[name], chords, size))
    return costs


def _run(setup: Setup, chords: int, size: int) -> Cost:
    """From the first call until every callback's result is there."""
    app = setup.app
    part, callback = app.tasks["bench.part"], app.tasks["bench.callback"]
    began, used = SYSTEM.monotonic(), setup.cpu()
    results = [chord([part.s(i) for i in range(size)], callback.s()).apply_async() for _ in range(chords)]
    for result in results:
        if result.get(timeout=120) != size:
            raise SystemExit("a callback got the wrong results")
    return Cost(SYSTEM.monotonic() - began, setup.cpu() - used)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _show(title: str, costs: Costs, ratio: Callable[[Cost, Cost], float]) -> None:
    print(f"\n{title}\n")  # noqa: T201 - a program's output
    print(f"{'':28}" + "".join(f"{load:>18}" for load in LOADS))  # noqa: T201
    for name in SETUPS:
        medians = [statistics.median(map(ratio, costs[load][name], costs[load][STOCK])) for load in LOADS]
        print(f"{name:28}" + "".join(f"{median:>18.2f}" for median in medians), flush=True)  # noqa: T201


@contextmanager
def _servers() -> Iterator[tuple[Roster, Path, Postgres, ValkeyNode]]:
    directory = Path(tempfile.mkdtemp(prefix="patchpilot-bench-"))
    roster = Roster(directory / "roster.json")
    roster.add_directory(directory)
    with Watchdog(roster), ExitStack() as stack:
        durable = {"fsync": "on", "full_page_writes": "on", "commit_siblings": "0", "max_connections": "400"}
        postgres = Postgres(directory, roster=roster, options=durable)
        stack.callback(postgres.discard)
        postgres.start()
        valkey = ValkeyNode("bench", directory, roster=roster)
        stack.callback(valkey.stop)
        valkey.start()
        yield roster, directory, postgres, valkey
    roster.clean()


@contextmanager
def _setup(
    number: int, name: str, roster: Roster, directory: Path, postgres: Postgres, valkey: ValkeyNode, processes: int
) -> Iterator[Setup]:
    """One set-up with its worker."""
    url = f"redis://{valkey.address}/{number}"
    settings: dict[str, Any] = {"broker_url": url, "result_backend": url}
    chosen = SETUPS[name]
    if chosen is not None:
        dsn = postgres.create_database(f"bench{number}")
        with Database(dsn) as database:
            migrate(database)
        settings |= {"result_backend": f"patchpilot+{url}", "patchpilot_postgres": dsn, **chosen}
    log = directory / f"worker-{number}.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "bench.application", "worker", "-n", f"bench{number}@h",
             "-l", "INFO", "-c", str(processes), "-Q", "bench", "--without-gossip", "--without-mingle",
             "--without-heartbeat"],
            # A pool leaves folders behind where temporary files go.
            env={
                **os.environ, "TMPDIR": str(directory), "BENCH_SETTINGS": json.dumps(settings),
                "PYTHONWARNINGS": "ignore",
            },
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    identity = roster.add(log.stem, worker.pid)
    try:
        until(lambda: b" ready." in log.read_bytes(), seconds=60, what=f"the worker was ready; see {log}")
        app = application(settings)
        yield Setup(app, psutil.Process(worker.pid))
        app.backend.result_consumer.stop()
        app.close()
    finally:
        worker.terminate()
        worker.wait()
        roster.drop(identity)


def _configure(postgres: Postgres, commit_delay: str) -> None:
    with psycopg.connect(postgres.dsn_of("postgres"), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET commit_delay = {int(commit_delay)}".encode())
        connection.execute("SELECT pg_reload_conf()")


if __name__ == "__main__":
    main()
