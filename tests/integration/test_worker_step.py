"""A worker that recovers by itself: nobody runs a command here."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from celery import chord

from patchpilot.lab.launch import Address
from patchpilot.lab.links import Link
from patchpilot.lab.processes import until
from patchpilot.lab.replicas import ReplicaSet, Windows
from patchpilot.postgres.connection import Database
from patchpilot.recovery.turns import Turn, Turns
from tests.conftest import shop_on
from tests.support.processes import Shop
from tests.support.shop import add, hold, total

pytestmark = [
    pytest.mark.backend,
    # asyncio (Python 3.11) forgets a transport that it makes in the moment in which its link is stopped.
    pytest.mark.filterwarnings("ignore:.*_SelectorTransport:pytest.PytestUnraisableExceptionWarning"),
]

RECOVERS = {"SHOP_RECOVER": "1", "SHOP_SETTINGS": json.dumps({"patchpilot_recovery_min_age": 2})}
WAIT = 60


def test_after_a_failover_that_lost_a_callback_the_chord_fires(
    shop: Shop, replicated: ReplicaSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    with (
        shop_on(shop.roster, tmp_path, replicated.endpoint, shop.dsn, monkeypatch) as site,
        Database(shop.dsn) as database,
    ):
        worker = site.worker("-c", "1", **RECOVERS)
        chord([hold.s(1, str(gate))], total.s().set(queue="late")).apply_async()
        site.await_line("hold began")
        [replica] = replicated.replicas
        replica.await_sync(replicated.primary)
        replica.promote()  # what the primary takes from here on is lost
        gate.touch()
        sent = "SELECT 1 FROM patchpilot.chord WHERE state = 'dispatched'"
        until(lambda: database.fetch(sent), seconds=WAIT, what="the callback was dispatched")
        until(lambda: replicated.primary.ask(lambda it: it.llen("late")) == 1, seconds=WAIT, what="it was pushed")
        replicated.primary.stop(hard=True)
        replicated.fail_over(Windows(0, 0.1))
        assert replicated.primary.ask(lambda it: it.llen("late")) == 0
        site.worker("-c", "1", "-Q", "late")
        site.await_line("total 1", seconds=WAIT)
        # The log is written by another process than the ledger.
        until(lambda: "Recovered callback" in worker.output(), seconds=WAIT, what="the worker said so")
        assert site.ledger().count("total 1") == 1


def test_after_a_link_that_was_down_and_past_a_database_that_was_away(shop: Shop) -> None:
    """The worker loses its broker, and when its sweep is due its PostgreSQL too; it works on, and sweeps later."""
    servers = [text.split("/")[2].split("@")[-1].split(":") for text in (shop.broker, shop.dsn)]
    targets = [Address(host, int(port)) for host, port in servers]
    with Link(targets[0]) as broker, Link(targets[1]) as postgres:
        worker = shop.worker(
            "-c", "1", **RECOVERS, SHOP_BROKER=f"redis://{broker.address}/0",
            SHOP_POSTGRES=shop.dsn.replace(str(targets[1]), str(postgres.address)),
        )  # fmt: skip
        broker.refuse()
        chord([add.s(1, 1)], total.s()).apply_async()
        with redis.Redis.from_url(shop.broker) as client:
            assert client.delete("celery") == 1
        postgres.refuse()
        broker.retarget(targets[0])
        until(lambda: "did not get through" in worker.output(), seconds=WAIT, what="a sweep failed")
        postgres.retarget(targets[1])
        shop.await_line("total 2", seconds=WAIT)
        assert shop.ledger() == ["add 1 1", "total 2"]
        worker.kill()  # before its links go


def test_workers_take_turns(migrated: str) -> None:
    long_ago, just_now = timedelta(hours=1), timedelta(0)
    with Database(migrated) as database:
        first, second = (Turns(database, "b:6379/0", str(uuid4())) for _ in range(2))
        assert first.take(just_now) is Turn.OURS
        assert second.take(long_ago) is Turn.TAKEN
        assert Turns(database, "other:6379/0", str(uuid4())).take(just_now) is Turn.OURS
        first.end(whole=False)
        assert second.take(long_ago) is Turn.OURS  # the first one's did not come to its end
        second.end(whole=True)
        assert first.take(long_ago) is Turn.COVERED
        assert first.take(just_now) is Turn.OURS  # that one began before this one was due
        database.execute("UPDATE patchpilot.sweep SET lease_until = now() - interval '1 s'")
        assert second.take(just_now) is Turn.OURS  # the first one died
