"""What starts twice runs once, and what died half-way runs again."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import psutil
import pytest
import redis
from celery import chord

from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, hold, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def test_a_callback_that_is_delivered_twice_runs_once(shop: Shop) -> None:
    result = chord([add.s(1, 1)], total.s().set(queue="callbacks")).apply_async()
    shop.worker()
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("callbacks") == 1, seconds=20, what="the callback was queued")
        [message] = broker.lrange("callbacks", 0, -1)
        broker.lpush("callbacks", message, message)
        worker = shop.worker("-Q", "callbacks", "-c", "2")
        assert result.get(timeout=10) == 2
        until(
            lambda: worker.output().count("is not run again") == 2, seconds=20, what="the other deliveries were dropped"
        )
        broker.lpush("callbacks", message)
        until(lambda: worker.output().count("is not run again") == 3, seconds=20, what="a late one was dropped")
    assert shop.ledger().count("total 2") == 1


def test_a_second_delivery_while_it_runs_does_not_run_and_loses_nothing(shop: Shop) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate)).set(queue="callbacks")).apply_async()
    shop.worker()
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("callbacks") == 1, seconds=20, what="the callback was queued")
        [message] = broker.lrange("callbacks", 0, -1)
        worker = shop.worker("-Q", "callbacks", "-c", "2")
        shop.await_line("hold began")
        broker.lpush("callbacks", message)
        until(
            lambda: worker.output().count("is not run again") == 1, seconds=20, what="the second delivery was dropped"
        )
    with Database(shop.dsn) as database:
        assert len(database.fetch("SELECT FROM patchpilot.outbox WHERE task_id = %s", [result.id])) == 1
    gate.touch()
    assert result.get(timeout=10) == [2]
    assert shop.ledger().count("hold began") == 1


def test_a_callback_whose_pool_process_was_killed_runs_again(shop: Shop) -> None:
    """Acknowledged late: Celery delivers it again at once, and the sibling knows that its process is gone."""
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate))).apply_async()
    worker = shop.worker("-c", "1", SHOP_ACKS_LATE="1")
    shop.await_line("hold began")
    [child] = psutil.Process(worker.process.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    shop.await_line("hold began", count=2)
    gate.touch()
    assert result.get(timeout=10) == [2]
    assert shop.ledger().count("hold ended") == 1


def test_a_callback_whose_pool_process_was_killed_has_not_failed(shop: Shop) -> None:
    """Acknowledged early, Celery's default: Celery would call it failed and forget it."""
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate))).apply_async()
    worker = shop.worker("-c", "1", SHOP_FENCE_LEASE="2")
    shop.await_line("hold began")
    [child] = psutil.Process(worker.process.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as recovery:
        until(lambda: recovery.recover(NOW) != (), seconds=40, what="the callback was sent again")
    shop.await_line("hold began", count=2)
    gate.touch()
    assert result.get(timeout=10) == [2]


def test_a_callback_whose_machine_was_lost_runs_again_after_recovery(shop: Shop) -> None:
    """Acknowledged early: only the outbox knows of it. It may run again once the lease of the dead one is over."""
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate))).apply_async()
    worker = shop.worker("-c", "1", SHOP_FENCE_LEASE="2")
    shop.await_line("hold began")
    worker.kill()
    shop.worker("-c", "1", SHOP_FENCE_LEASE="2")
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as recovery:
        until(lambda: recovery.recover(NOW) != (), seconds=40, what="the callback was sent again")
        shop.await_line("hold began", count=2)
        gate.touch()
        assert result.get(timeout=10) == [2]
        assert [row["starts"] for row in recovery.repeated_starts(timedelta(hours=1))] == [2]


def test_a_long_callback_keeps_its_lease(shop: Shop) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate))).apply_async()
    shop.worker("-c", "1", SHOP_FENCE_LEASE="1")
    shop.await_line("hold began")
    with Database(shop.dsn) as database:

        def lease() -> object:
            return database.fetch("SELECT lease_until FROM patchpilot.fence")[0]["lease_until"]

        first = lease()
        until(lambda: lease() != first, seconds=10, what="the lease was renewed")
        gate.touch()
        assert result.get(timeout=10) == [2]
        finished = {"finished": True, "starts": 1}
        sql = "SELECT finished_at IS NOT NULL AS finished, starts FROM patchpilot.fence"
        until(lambda: database.fetch(sql) == [finished], seconds=10, what="its one start was over")
