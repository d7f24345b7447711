"""Every pool that Celery has: the same work, one connection to PostgreSQL a process, nobody blocks the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import psutil
import psycopg
import pytest

from patchpilot.lab.processes import until
from tests.support.processes import ROOT, Shop
from tests.support.shop import add, app, asks, hold, note
from tests.support.workload import WAIT, work_of_every_kind

pytestmark = pytest.mark.backend


@dataclass(frozen=True)
class Pool:
    """A pool of ``concurrency`` tasks at once, in ``children`` processes besides the worker's own."""

    name: str
    concurrency: int
    children: int = 0

    def __str__(self) -> str:
        return self.name


POOLS = (Pool("prefork", 2, children=2), Pool("threads", 4), Pool("gevent", 20), Pool("solo", 1))


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_pool(pool: Pool, shop: Shop) -> None:
    worker = shop.worker("--pool", pool.name, "-c", str(pool.concurrency))
    keep_busy(pool, shop)
    work_of_every_kind(
        **{f"asking {number}": (asks.s(number, 1), number + 1) for number in range(pool.concurrency // 2)}
    )
    others_go_on_while_one_waits_for_postgresql(pool, shop)
    assert len(psutil.Process(worker.process.pid).children(recursive=True)) == pool.children
    await_connections(shop, 1 + pool.children)


def keep_busy(pool: Pool, shop: Shop) -> None:
    """As many tasks at once as the pool takes, so that each of its processes has worked."""
    gate = shop.directory / "gate"
    held = [hold.delay(number, str(gate)) for number in range(pool.concurrency)]
    shop.await_line("hold began", count=pool.concurrency)
    gate.touch()
    assert [result.get(timeout=WAIT) for result in held] == list(range(pool.concurrency))


def others_go_on_while_one_waits_for_postgresql(pool: Pool, shop: Shop) -> None:
    """A task cannot store its result, because somebody has locked the table. The others run meanwhile."""
    with psycopg.connect(shop.dsn) as locker, psycopg.connect(shop.dsn, autocommit=True) as watcher:
        locker.execute("LOCK TABLE patchpilot.result IN ACCESS EXCLUSIVE MODE")
        # Where all share one connection, a task from before, whose result is known, may still wait for it to clean up.
        others = range(1, pool.concurrency if pool.children else pool.concurrency - 1)
        results = [note.delay(0)]
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
        until(lambda: watcher.execute(waits).rowcount > 0, seconds=30, what="a task waited for PostgreSQL")
        results += [note.delay(number) for number in others]
        for number in others:
            shop.await_line(f"note {number}")
        locker.rollback()
    assert [result.get(timeout=WAIT) for result in results] == [0, *others]


def await_connections(shop: Shop, count: int) -> None:
    """Wait until the workers, and not this process, have so many connections."""
    app.backend.database.close()
    sql = "SELECT FROM pg_stat_activity WHERE application_name = 'patchpilot' AND datname = current_database()"
    with psycopg.connect(shop.dsn, autocommit=True) as watcher:

        def connections() -> int:
            return watcher.execute(sql).rowcount

        until(lambda: connections() == count, seconds=30, what=f"there were {count} connections, not {connections()}")


# As somebody's own launcher would: it has used the application before.
FORKS = """
import os
from tests.support.shop import add, app

add.apply_async((1, 1), queue="nobody")
for name in ("one", "two"):
    if not os.fork():
        app.worker_main(["worker", "-n", f"{name}@%h", "-Q", name, "-c", "1", "--without-gossip", "--without-mingle"])
for _ in range(2):
    os.wait()
"""


def test_workers_that_somebody_forks_are_two(shop: Shop) -> None:
    gate = shop.directory / "gate"
    settings = {"SHOP_FENCE": "all", "TMPDIR": str(shop.directory)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", FORKS], cwd=ROOT, env={**os.environ, **shop.environment, **settings},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    identity = shop.roster.add("launcher", launcher.pid)
    try:
        held = [hold.apply_async((name, str(gate)), queue=name) for name in ("one", "two")]
        shop.await_line("hold began", count=2, seconds=60)
        with psycopg.connect(shop.dsn, autocommit=True) as watcher:
            sql = b"SELECT instance::text FROM patchpilot.worker"
            until(lambda: watcher.execute(sql).rowcount == 2, seconds=30, what="two workers had given a sign of life")
            alive = {row[0] for row in watcher.execute(sql)}
            running = {row[0].split("/")[0] for row in watcher.execute(b"SELECT worker FROM patchpilot.fence")}
        assert len(alive) == 2
        assert running == alive
        gate.touch()
        assert [result.get(timeout=WAIT) for result in held] == ["one", "two"]
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        shop.roster.drop(identity)


def test_a_process_that_is_forked_late_opens_a_connection_of_its_own(shop: Shop) -> None:
    """The worker's own process has one by then, for its sign of life."""
    shop.worker("-c", "1", "--max-tasks-per-child", "1")
    await_connections(shop, 1)
    assert add.delay(1, 1).get(timeout=WAIT) == 2
    await_connections(shop, 1)  # the first child is gone
    asks.delay(1, 1)  # publishes, and waits in the second child for what only a third one could run
    await_connections(shop, 2)
