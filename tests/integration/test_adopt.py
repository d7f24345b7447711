"""Chords that Celery's own Redis backend has begun, taken over on the way."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import redis
from celery import Celery, Signature, chain, chord, group
from celery.app.task import Context

from patchpilot.clock import SYSTEM
from patchpilot.errors import NeedsOperator
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from patchpilot.recovery.adopt import Adoption, Verdict
from patchpilot.recovery.housekeeping import Housekeeping
from patchpilot.valkey.broker import Broker
from patchpilot.valkey.keys import ChordKeys
from tests.integration.test_cli import config
from tests.integration.test_outbox import tokyo
from tests.support import shop as tasks
from tests.support.commands import patchpilot
from tests.support.processes import Shop
from tests.support.shop import app

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))
STEM = "celery-taskset-meta-"


class Stock:
    """The same application before it had patchpilot: a producer here, workers in processes of their own."""

    def __init__(self, shop: Shop, results: str | None = None) -> None:
        self.app = Celery("stock", broker=shop.broker, backend=results or shop.broker, set_as_current=False)
        self._shop = shop

    def s(self, name: str, *args: Any, early: bool = False, **kwargs: Any) -> Signature:
        """A task of the shop. An early one is for the stock worker, the others are never taken by it."""
        made = self.app.signature(f"{tasks.__name__}.{name}", args=args, kwargs=kwargs)
        return made.set(queue="early") if early else made

    def chord(self, header: Any, label: str) -> Any:
        return chord(header, self.s("note", label=label), app=self.app).apply_async()

    def work(self, parts: int) -> None:
        """Let a stock worker do so many early tasks, and stop it."""
        worker = self._shop.worker("-c", "1", "-Q", "early", SHOP_STOCK="1", SHOP_BACKEND=self._shop.broker)
        done = self.app.backend.client
        until(lambda: len(done.keys("celery-task-meta-*")) >= parts, seconds=60, what="the early parts were done")
        worker.stop()

    def close(self) -> None:
        consumer = self.app.backend.result_consumer
        consumer.subscribed_to.clear()  # results that are forgotten later would unsubscribe, from a server that is gone
        consumer.stop()
        self.app.backend.client.connection_pool.disconnect()
        self.app.close()


@pytest.fixture
def stock(shop: Shop) -> Iterator[Stock]:
    opened = Stock(shop)
    yield opened
    opened.close()


@pytest.fixture
def housekeeping(shop: Shop) -> Iterator[Housekeeping]:
    with Housekeeping(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as opened:
        yield opened


def by_id(verdicts: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.group_id: verdict for verdict in verdicts}


def test_chords_of_several_canvases_end_as_if_nothing_had_happened(
    shop: Shop, stock: Stock, housekeeping: Housekeeping, broker: redis.Redis
) -> None:
    """Some parts have returned, and then, for good measure, the broker loses all that it has."""
    s = stock.s
    flat = stock.chord([s("add", i, i, early=i % 2 == 0) for i in range(4)], "flat")
    chains = stock.chord([chain(s("add", 1, 1), s("add", 1)), s("add", 2, 2, early=True)], "chains")
    nested = stock.chord([chain(s("add", 1, 1), group(s("add", 1), s("add", 2))), s("add", 3, 3, early=True)], "nested")
    inner = stock.chord([chord([s("add", 1, 1), s("add", 2, 2)], s("total"), app=stock.app), s("add", 5, 5)], "outer")
    # Of these the one message that is queued has the callback in what it hands on, and that is no chain's last task.
    late = stock.chord([chain(s("add", 1, 1), chord([s("add", 1), s("add", 2)], s("total"), app=stock.app))], "late")
    middle = stock.chord([chain(s("add", 1, 1), group(s("add", 1), s("add", 2)), s("total"))], "middle")
    failing = stock.chord([s("add", 4, 4, early=True), s("boom")], "failing")
    done = stock.chord([s("add", 9, 9, early=True)], "done")
    stock.work(6)
    # A part of this one did not get to return: only its result tells of it.
    broker.delete(f"{STEM}{nested.parent.id}.j", f"{STEM}{nested.parent.id}.d")
    assert broker.llen("celery") > 0
    planned = by_id(housekeeping.adoptable())
    assert {it.reason for it in planned.values()} == {None}
    assert done.parent.id not in planned  # it was dispatched: all that it has left is who did it
    assert planned[flat.parent.id].returned == 2
    adopted = by_id(housekeeping.adopt())
    assert all(adopted[it.parent.id].adopted for it in (flat, chains, nested, inner, late, middle, failing))
    # Of the one that was complete its callback is queued; nobody looks for it where it is not.
    assert housekeeping.adopt() == []
    assert [key for key in broker.keys(f"{STEM}*") if not key.endswith(b".c")] == []
    callback = [raw for raw in broker.lrange("celery", 0, -1) if json.loads(raw)["headers"]["id"] == done.id]
    broker.flushall()
    broker.lpush("celery", *callback)
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as recovery:
        assert {it.diagnosis for it in recovery.recover(NOW)} == {"header-message-lost"}
        shop.worker("-c", "2")
        expected = {
            "flat": [0, 2, 4, 6], "chains": [3, 4], "nested": [[3, 4], 6], "outer": [6, 10], "done": [18],
            "late": [7], "middle": [7],
        }  # fmt: skip
        for label, values in expected.items():
            shop.await_line(f"{label} {values!r}")
        with pytest.raises(Exception, match="boom"):
            app.AsyncResult(failing.id).get(timeout=30)
        assert app.AsyncResult(flat.id).get(timeout=30) == [0, 2, 4, 6]
        assert recovery.recover(NOW) == ()
    ledger = shop.ledger()
    assert [ledger.count(f"{label} {values!r}") for label, values in expected.items()] == [1] * len(expected)
    assert len([line for line in ledger if line.startswith("add ")]) == 22


@pytest.mark.parametrize(("late", "unknown"), [("0", 1), ("1", 0)], ids=["acknowledged", "unacknowledged"])
def test_what_runs_meanwhile_is_counted_when_it_returns(shop: Shop, stock: Stock, late: str, unknown: int) -> None:
    """Nothing tells of it but its chord's size, or its message, which is its worker's. And several adopt at once."""
    gate = shop.directory / "gate"
    header = [stock.s("hold", 1, str(gate)), stock.s("add", 1, 1).set(queue="later")]
    result = stock.chord(header, "end")
    shop.worker("-c", "1", SHOP_ACKS_LATE=late)
    shop.await_line("hold began")
    verdicts: list[Verdict] = []

    def adopt() -> None:
        with Housekeeping(Site(shop.broker, shop.dsn)) as one:
            verdicts.extend(one.adopt())

    threads = [threading.Thread(target=adopt) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [it.adopted for it in verdicts].count(True) == 1
    [adopted] = [it for it in verdicts if it.adopted]
    assert (adopted.group_id, adopted.returned, adopted.total, adopted.unknown) == (result.parent.id, 0, 2, unknown)
    with Database(shop.dsn) as database:
        assert len(database.fetch("SELECT 1 FROM patchpilot.outbox WHERE group_id = %s", [result.parent.id])) == 1
    gate.touch()
    shop.await_line("hold ended")
    shop.worker("-c", "1", "-Q", "later")
    shop.await_line("end [1, 2]")
    assert app.AsyncResult(result.id).get(timeout=30) == [1, 2]
    assert shop.ledger().count("end [1, 2]") == 1


def test_a_part_that_returns_while_its_chord_is_written_down(
    shop: Shop, stock: Stock, housekeeping: Housekeeping, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted in Valkey still. So it is taken over from there, also by the next one if this one dies first."""
    result = stock.chord([stock.s("add", 1, 1), stock.s("add", 2, 2), stock.s("add", 3, 3)], "end")
    take_the_rest = Adoption._take_the_rest

    def late(self: Adoption, group_id: str) -> bool:
        [raw] = [it for it in broker.lrange("celery", 0, -1) if json.loads(it)["headers"]["group_index"] == 1]
        broker.lrem("celery", 1, raw)
        headers = json.loads(raw)["headers"]
        request = Context(id=headers["id"], group=group_id, group_index=1, chord=stock.s("note"))
        stock.app.backend.on_chord_part_return(request, "SUCCESS", 70)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Adoption, "_take_the_rest", late)
        with pytest.raises(KeyboardInterrupt):
            housekeeping.adopt()
    assert Adoption._take_the_rest is take_the_rest
    assert housekeeping.adopt() == []
    assert broker.keys(f"{STEM}*") == []
    shop.worker("-c", "1")
    shop.await_line("end [2, 70, 6]")
    assert app.AsyncResult(result.id).get(timeout=30) == [2, 70, 6]
    with Database(shop.dsn) as database:
        until(lambda: database.fetch("SELECT 1 FROM patchpilot.outbox") == [], seconds=30, what="all messages ended")


def test_a_time_without_an_offset_is_in_utc_wherever_postgresql_is(
    shop: Shop, stock: Stock, housekeeping: Housekeeping
) -> None:
    soon = SYSTEM.now() + timedelta(hours=2)
    result = stock.chord([stock.s("add", 1, 1).set(expires=soon.replace(tzinfo=None))], "end")
    tokyo(shop)
    assert by_id(housekeeping.adopt())[result.parent.id].adopted
    with Database(shop.dsn) as database:
        assert database.fetch("SELECT expires FROM patchpilot.outbox") == [{"expires": soon}]


def test_what_cannot_be_adopted_is_told_and_left_alone(
    shop: Shop, stock: Stock, housekeeping: Housekeeping, broker: redis.Redis
) -> None:
    unsized = stock.chord([stock.s("add", 1, 1), stock.s("add", 1, 2)], "unsized")
    broker.delete(f"{STEM}{unsized.parent.id}.s")
    gone = stock.chord([stock.s("add", 2, 1).set(queue="gone")], "gone")
    broker.delete("gone")
    dispatching = stock.chord([stock.s("add", 3, 1)], "dispatching")
    broker.set(f"{STEM}{dispatching.parent.id}.c", "token")
    garbled = stock.chord([stock.s("add", 4, 1), stock.s("add", 4, 2)], "garbled")
    broker.zadd(f"{STEM}{garbled.parent.id}.j", {b"\x80\x04garbled": 0})
    uncounted, listed, unheard = [stock.chord([stock.s("add", 5, 1), stock.s("add", 5, 2)], "odd") for _ in range(3)]
    broker.set(f"{STEM}{uncounted.parent.id}.s", "abc")
    broker.delete(f"{STEM}{listed.parent.id}.s")
    broker.lpush(f"{STEM}{listed.parent.id}.s", "2")
    broker.set(f"{STEM}{unheard.parent.id}.j", "abc")
    nest = [chain(stock.s("add", 6, 1), group(stock.s("add", 1), stock.s("add", 2)))]
    foreign, stateless = [stock.chord([*nest, stock.s("add", 6, 2).set(queue="gone")], "nest") for _ in range(2)]
    for result, meta in ((foreign, b"\x80\x04garbled"), (stateless, json.dumps({"result": 1}))):
        broker.set(f"celery-task-meta-{result.parent.results[-1].id}", meta)
    broker.delete("gone")
    broker.lpush("celery", "garbage", "[1]", '"x"', '{"headers": null, "properties": {}, "body": "x"}')
    broker.hset("unacked", mapping={"1": "garbage", "2": "[1]", "3": "[]"})
    broker.mset({b"celery-taskset-meta-\xff.s": 1, b"celery-taskset-meta-\0.s": 1})
    ours = app.AsyncResult(tasks.add.apply_async((5, 5)).id)
    before = {key: broker.dump(key) for key in broker.keys("*") if not key.startswith(b"_kombu")}
    told = by_id(housekeeping.adopt())
    assert {key: broker.dump(key) for key in broker.keys("*") if not key.startswith(b"_kombu")} == before
    words = {
        unsized: "its size is not in Valkey", gone: "no message", dispatching: "dispatches", garbled: "decoded",
        uncounted: "does not write", listed: "does not write", unheard: "does not write", foreign: "decoded",
        stateless: "decoded",
    }  # fmt: skip
    for result, word in words.items():
        assert word in str(told[result.parent.id].reason), told
        assert not told[result.parent.id].adopted
    assert len(told) == len(words)
    assert ours.id not in str(told)
    done = patchpilot("recover", "--adopt", "--dry-run", "--config", config(shop.directory, shop.dsn, shop.broker))
    assert done.returncode == 0, done.stderr
    assert "0 of 9 can be adopted" in done.stderr
    assert "no message of its header is left" in done.stdout


def test_one_that_cannot_be_written_down_is_left_out(
    shop: Shop, stock: Stock, housekeeping: Housekeeping, broker: redis.Redis
) -> None:
    odd, good = [stock.chord([stock.s("add", 1, 1)], label) for label in ("odd", "good")]
    raw = broker.rpop("celery")
    assert isinstance(raw, bytes)
    message = json.loads(raw)
    message["headers"]["expires"] = "soon"
    broker.rpush("celery", json.dumps(message))
    told = by_id(housekeeping.adopt())
    assert "it cannot be written down: " in str(told[odd.parent.id].reason)
    assert told[good.parent.id].adopted


def test_nothing_is_adopted_beside_workers_without_patchpilot(
    shop: Shop, stock: Stock, housekeeping: Housekeeping
) -> None:
    stock.chord([stock.s("add", 1, 1).set(queue="elsewhere")], "end")
    worker = shop.worker("-c", "1", SHOP_STOCK="1", SHOP_BACKEND=shop.broker)
    with pytest.raises(NeedsOperator, match="without patchpilot"):
        housekeeping.adopt()
    worker.stop()
    assert [it.adopted for it in housekeeping.adopt()] == [True]


def test_what_a_worker_had_taken_when_it_was_killed_is_adopted_too(
    shop: Shop, stock: Stock, housekeeping: Housekeeping
) -> None:
    gate = shop.directory / "gate"
    result = stock.chord([stock.s("hold", 1, str(gate)), stock.s("add", 1, 1)], "end")
    worker = shop.worker("-c", "1", SHOP_STOCK="1", SHOP_BACKEND=shop.broker, SHOP_ACKS_LATE="1")
    shop.await_line("hold began")
    worker.kill()
    assert [(it.adopted, it.unknown) for it in housekeeping.adopt()] == [(True, 0)]
    gate.touch()
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as recovery:
        assert [it.id for it in recovery.recover(NOW)] == [result.parent.id]
    shop.worker("-c", "1")
    shop.await_line("end [1, 2]")


@pytest.mark.parametrize("known", ["", "json"])
def test_what_returns_later_tells_how_results_are_encoded(
    shop: Shop, stock: Stock, broker: redis.Redis, known: str
) -> None:
    """At the adoption nothing does, or is wrong. One part returns; of the other only its task's result is there."""
    result = stock.chord([stock.s("add", 1, 1), stock.s("add", 2, 2)], "end")
    site = Site(shop.broker, shop.dsn, accept_content=("json", "pickle"), result_serializer=known)
    with Housekeeping(site, stale=timedelta(seconds=4)) as housekeeping, Database(shop.dsn) as database:
        assert [it.adopted for it in housekeeping.adopt()] == [True]
        broker.flushall()
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("UPDATE patchpilot.chord SET created_at = created_at - interval '1 minute'")
        one, other = (part.id for part in result.parent.results)
        returned = (
            "UPDATE patchpilot.chord_part SET state = 'SUCCESS', payload = %s, returned_at = now() WHERE task_id = %s"
        )
        database.execute(returned, [pickle.dumps(2), one])
        meta = {"status": "SUCCESS", "result": 4, "traceback": None, "children": [], "task_id": other}
        stored = "INSERT INTO patchpilot.result VALUES (%s, 'SUCCESS', %s, now() - interval '30 s')"
        database.execute(stored, [other, pickle.dumps(meta)])
    told: list[str] = []
    blind = replace(site, accept_content=("json",))
    with Recovery(blind, stale=timedelta(seconds=4), complain=lambda _, error: told.append(str(error))) as recovery:
        assert recovery.recover(NOW) == ()
    assert [("add its serialiser" in line, "x80" in line) for line in told] == [(True, False)]
    with Recovery(site, stale=timedelta(seconds=4)) as recovery:
        assert [it.diagnosis for it in recovery.recover(NOW)] == ["part-return-interrupted"]
    [raw] = broker.lrange("celery", 0, -1)
    assert json.loads(raw)["headers"]["argsrepr"] == "([2, 4],)"


@pytest.mark.parametrize(("known", "message", "recorded"), [("", "pickle", "pickle"), ("json", "pickle", "json")])
def test_how_results_will_be_encoded_is_guessed_from_the_messages(
    shop: Shop, stock: Stock, known: str, message: str, recorded: str
) -> None:
    stock.chord([stock.s("add", 1, 1).set(serializer=message)], "end")
    accepted = ("application/json", "application/x-python-serialize")
    site = Site(shop.broker, shop.dsn, accept_content=accepted, result_serializer=known)
    with Housekeeping(site, stale=timedelta(seconds=4)) as housekeeping, Database(shop.dsn) as database:
        assert [it.adopted for it in housekeeping.adopt()] == [True]
        assert database.fetch("SELECT result_serializer FROM patchpilot.chord") == [{"result_serializer": recorded}]


def test_what_is_read_twice_or_moves_while_the_queues_are_read(
    shop: Shop, stock: Stock, housekeeping: Housekeeping, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others push meanwhile, so that pages overlap; and a worker that ends puts back what it had taken."""
    results = [stock.chord([stock.s("add", i, i), stock.s("add", 1, 1)], f"end{i}") for i in range(3)]
    raw = broker.lpop("celery")
    assert isinstance(raw, bytes)
    broker.hset("unacked", "tag", json.dumps([json.loads(raw), "", "celery"]))
    read_a_page = Broker._chunk

    def busy(self: Broker, name: str, start: int) -> list[bytes]:
        page = read_a_page(self, name, start)
        if name == "celery" and broker.hdel("unacked", "tag"):
            broker.lpush("celery", "junk", "junk", raw)
        return page

    monkeypatch.setattr("patchpilot.valkey.broker._CHUNK", 2)
    monkeypatch.setattr(Broker, "_chunk", busy)
    adopted = by_id(housekeeping.adopt())
    assert {key: (it.adopted, it.unknown) for key, it in adopted.items()} == {it.parent.id: (True, 0) for it in results}
    with Database(shop.dsn) as database:
        assert len(database.fetch("SELECT 1 FROM patchpilot.outbox")) >= 5


@pytest.mark.parametrize("ordered", [True, False])
def test_celery_s_count_is_stopped_and_dropped_under_guard(shop: Shop, broker: redis.Redis, ordered: bool) -> None:
    """One that somebody dispatches is not stopped, and one to which a part came since it was read is not dropped."""
    keys = ChordKeys(shop.broker)
    broker.mset({f"{STEM}g.s": 3, f"{STEM}g.c": "token"})
    assert (keys.stop("g").claimed, broker.get(f"{STEM}g.s")) == (True, b"3")
    broker.delete(f"{STEM}g.c")
    if ordered:
        broker.zadd(f"{STEM}g.j", {"one": 0, "two": 1})
    else:
        broker.rpush(f"{STEM}g.j", "one", "two")
    count = keys.stop("g")
    assert (count.claimed, count.size, broker.get(f"{STEM}g.s")) == (False, 3, None)
    assert count.parts == ((b"one", 0 if ordered else None), (b"two", 1 if ordered else None))
    assert not keys.drop("g", 1)
    assert broker.exists(f"{STEM}g.j")
    assert keys.drop("g", 2)
    assert broker.keys(f"{STEM}*") == []
    keys.close()
