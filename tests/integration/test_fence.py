"""What starts twice runs once, and what died half-way runs again."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import redis
from billiard.exceptions import WorkerLostError
from celery import Celery, Task, chain, chord, group
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject

from patchpilot.backend.config import MESSAGE_ID, FenceMode
from patchpilot.backend.fence import DEATHS, Fence, Start
from patchpilot.backend.message import Part
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, app, becomes_chain, becomes_hold, everybody, hold, note, renewals, stubborn, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def test_a_callback_that_is_delivered_twice_runs_once(shop: Shop) -> None:
    result = chord([add.s(1, 1)], total.s().set(queue="callbacks")).apply_async()
    shop.worker()
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("callbacks") == 1, seconds=30, what="the callback was queued")
        [message] = broker.lrange("callbacks", 0, -1)
        broker.lpush("callbacks", message, message)
        worker = shop.worker("-Q", "callbacks", "-c", "2")
        assert result.get(timeout=30) == 2
        until(
            lambda: worker.output().count("is not run again") == 2, seconds=30, what="the other deliveries were dropped"
        )
        broker.lpush("callbacks", message)
        until(lambda: worker.output().count("is not run again") == 3, seconds=30, what="a late one was dropped")
    assert shop.ledger().count("total 2") == 1


def test_a_second_delivery_while_it_runs_does_not_run_and_loses_nothing(shop: Shop) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate)).set(queue="callbacks")).apply_async()
    shop.worker()
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("callbacks") == 1, seconds=30, what="the callback was queued")
        [message] = broker.lrange("callbacks", 0, -1)
        worker = shop.worker("-Q", "callbacks", "--pool", "gevent", "-c", "20")  # of which the others are prefork's
        shop.await_line("hold began")
        broker.lpush("callbacks", message)
        until(
            lambda: worker.output().count("is not run again") == 1, seconds=30, what="the second delivery was dropped"
        )
    with Database(shop.dsn) as database:
        assert len(database.fetch("SELECT FROM patchpilot.outbox WHERE task_id = %s", [result.id])) == 1
    gate.touch()
    assert result.get(timeout=30) == [2]
    assert shop.ledger().count("hold began") == 1


def test_a_second_delivery_is_a_repetition_also_if_the_first_one_ends_just_then(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end takes the message off the record. One that was never on it would wait in its queue."""
    task_id, asked, told = add.delay(1, 1).id, Fence._is_on_record, []
    with Database(shop.dsn) as database:
        [row] = database.fetch("SELECT message_id::text FROM patchpilot.outbox")
        fence = Fence(app, database, FenceMode.ALL, timedelta(minutes=1), told.append)
        request = SimpleNamespace(id=task_id, task=add.name, **{MESSAGE_ID: row["message_id"]})
        first = fence._begin(request, "scope", acks_late=False)

        def ends_just_then(self: Fence, asking: object) -> bool:
            self.end(first, row["message_id"])
            return asked(self, asking)

        monkeypatch.setattr(Fence, "_is_on_record", ends_just_then)
        with pytest.raises(Ignore):
            fence._begin(request, "scope", acks_late=False)
    assert told == [request]


@pytest.mark.parametrize("acks_late", ["", "1"], ids=["early", "late"])
def test_one_that_runs_elsewhere_and_is_not_on_record_waits_for_the_other_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, acks_late: str
) -> None:
    """The other one dies, and nothing else would bring it back. An acknowledged message cannot be given back."""
    monkeypatch.setitem(app.conf, "patchpilot_journal_messages", False)
    task_id = add.delay(1, 1).id
    with redis.Redis.from_url(shop.broker) as broker, Database(shop.dsn) as database:
        message = json.loads(broker.lrange("celery", 0, 0)[0])
        database.execute(
            "INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, lease_until) "
            "VALUES (%s, %s, '0/0', gen_random_uuid(), 'elsewhere/1', now() + interval '1 hour')",
            [message["headers"][MESSAGE_ID], task_id],
        )
        worker = shop.worker("-c", "1", SHOP_FENCE="all", SHOP_ACKS_LATE=acks_late)
        until(lambda: "runs elsewhere" in worker.output(), seconds=30, what="it saw the other one")
        assert shop.ledger() == []
        database.execute("UPDATE patchpilot.fence SET lease_until = now()")
    shop.await_line("add 1 1")


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
    assert result.get(timeout=30) == [2]
    assert shop.ledger().count("hold ended") == 1


@pytest.mark.parametrize("what", ["callback", "next of a chain"])
def test_what_is_fenced_and_whose_pool_process_was_killed_has_not_failed(shop: Shop, what: str) -> None:
    """Acknowledged early, Celery's default: Celery would call it failed and forget it."""
    gate = shop.directory / "gate"
    canvas = chord([add.s(1, 1)], hold.s(str(gate))) if what == "callback" else chain(add.s(1, 1), hold.s(str(gate)))
    result = canvas.apply_async()
    worker = shop.worker("-c", "1", SHOP_FENCE_LEASE="2")
    shop.await_line("hold began")
    [child] = psutil.Process(worker.process.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as recovery:
        until(lambda: recovery.recover(NOW) != (), seconds=40, what="the callback was sent again")
    shop.await_line("hold began", count=2)
    gate.touch()
    assert result.get(timeout=30) == ([2] if what == "callback" else 2)


def test_what_kills_its_process_every_time_fails_in_the_end(shop: Shop) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate))).apply_async()
    worker = shop.worker("-c", "1")
    shop.await_line("hold began")
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.fence SET starts = %s", (DEATHS,))
    [child] = psutil.Process(worker.process.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    until(result.ready, seconds=30, what="it had failed")
    assert isinstance(result.result, WorkerLostError)


def test_who_has_lost_a_start_ends_nothing_of_whoever_has_it(shop: Shop) -> None:
    fence = app.backend.fence
    slow, other = (Start("t", "0/0", "scope", str(uuid.uuid4())) for _ in range(2))
    begun = "SELECT owner::text, finished_at FROM patchpilot.fence"
    with Database(shop.dsn) as database:
        assert fence._start(slow)
        assert not fence._start(other)
        database.execute("UPDATE patchpilot.fence SET lease_until = now()")
        assert fence._start(other)
        assert not fence.renew(slow)
        fence.end(slow, None)
        fence.give_up(slow)
        request = Context(id="t", patchpilot_done="t", patchpilot_start=slow)
        app.backend.store_result("t", 1, "SUCCESS", request=request)
        assert database.fetch(begun) == [{"owner": other.owner, "finished_at": None}]
        assert fence.renew(other)
        fence.give_up(other)
        assert database.fetch(begun) == []


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
        assert result.get(timeout=30) == [2]
        assert [row["starts"] for row in recovery.repeated_starts(timedelta(hours=1))] == [2]


def test_a_long_callback_keeps_its_lease(shop: Shop) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate))).apply_async()
    shop.worker("-c", "1", SHOP_FENCE_LEASE="1")
    shop.await_line("hold began")
    with Database(shop.dsn) as database:

        def lease() -> object:
            return database.fetch("SELECT lease_until FROM patchpilot.fence")[0]["lease_until"]

        leases: set[object] = set()
        until(lambda: leases.add(lease()) or len(leases) > 3, seconds=30, what="the lease was renewed again and again")
        gate.touch()
        assert result.get(timeout=30) == [2]
        finished = {"finished": True, "starts": 1}
        sql = "SELECT finished_at IS NOT NULL AS finished, starts FROM patchpilot.fence"
        until(lambda: database.fetch(sql) == [finished], seconds=30, what="its one start was over")


def test_a_callback_keeps_its_lease_until_what_follows_it_is_published(shop: Shop, broker: redis.Redis) -> None:
    """Its body has ended, and the broker lets nobody write."""
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], hold.s(str(gate)).set(link=note.s())).apply_async()
    worker = shop.worker("-c", "1", SHOP_FENCE_LEASE="1")
    shop.await_line("hold began")
    sql = "SELECT finished_at IS NULL AS runs, lease_until FROM patchpilot.fence WHERE task_id = %s"
    leases: set[object] = set()

    def renewed() -> bool:
        [row] = database.fetch(sql, [result.id])
        leases.add(row["lease_until"] if row["runs"] else "over")
        return len(leases) > 3

    with Database(shop.dsn) as database:
        broker.client_pause(600_000, all=False)
        try:
            gate.touch()
            shop.await_line("hold ended")
            until(renewed, seconds=30, what="the lease was renewed again and again")
            assert "over" not in leases
        finally:
            broker.client_unpause()
    assert result.get(timeout=30) == [2]
    shop.await_line("note [2]")
    assert "lost its lease" not in worker.output()


def test_a_lease_is_lost_to_somebody_else_only(shop: Shop) -> None:
    """A start that is over in the moment in which it is renewed has lost nothing."""
    with Database(shop.dsn) as database:
        fence = Fence(app, database, FenceMode.ALL, timedelta(0), lambda _request: None)
        request = SimpleNamespace(id="one", task=add.name)
        first = fence._begin(request, "scope", acks_late=False)
        second = fence._begin(request, "scope", acks_late=False)
        assert (fence.renew(first), fence.renew(second)) == (False, True)
        fence.end(second, None)
        assert fence.renew(second)


def replaced(task: Task) -> None:
    task.replace(task.app.signature("elsewhere"))


def raising(error: BaseException) -> Callable[[Task], None]:
    def end(_task: Task) -> None:
        raise error

    return end


ENDS: dict[str, Callable[[Task], object]] = {
    "success": lambda _task: None,
    "failure": raising(ValueError("boom")),
    "ignored": raising(Ignore()),
    "rejected": raising(Reject("no")),
    "given back": raising(Reject("later", requeue=True)),
    "retried": lambda task: task.retry(countdown=0),
    "replaced": replaced,
    "exit": raising(SystemExit(1)),
    "interrupted": raising(KeyboardInterrupt()),
    "called directly": lambda task: task("success"),
    "eager inside": lambda task: task.apply(("failure",)),
}


@pytest.fixture
def own(shop: Shop) -> Iterator[Task]:
    """A task, of an application of its own, that ends as it is told to."""
    settings = {"patchpilot_postgres": shop.dsn, "patchpilot_fence": "all", "patchpilot_fence_lease": 3600}
    with Celery("own", broker=shop.broker, backend=f"patchpilot+{shop.broker}", set_as_current=False) as own:
        own.conf.update(settings)

        @own.task(bind=True, shared=False)
        def ends(self: Task, how: str) -> None:
            before.append(renewals())
            ENDS[how](self)

        before = ends.before = []
        own.finalize()
        yield ends
        own.backend.client.connection_pool.disconnect()
        own.backend.database.close()


@pytest.mark.parametrize("how", ENDS)
def test_however_a_task_ends_no_thread_is_left(own: Task, how: str) -> None:
    assert own.app.backend is not None  # which puts the fence around its tasks
    tracer = build_tracer(own.name, own, app=own.app)
    task_id = str(uuid.uuid4())
    request = {"id": task_id, MESSAGE_ID: str(uuid.uuid4()), "delivery_info": {}, "is_eager": False}
    with suppress(SystemExit, KeyboardInterrupt):
        tracer(task_id, (how,), {}, request)
    assert own.before[0] == 1
    until(lambda: renewals() == 0, seconds=30, what="the thread had ended")


def test_a_task_of_which_nobody_says_that_it_is_over_keeps_its_lease_no_longer(own: Task) -> None:
    own.app.conf.patchpilot_fence_lease = 1
    assert own.app.backend is not None
    own.push_request(id="one", called_directly=False, **{MESSAGE_ID: str(uuid.uuid4())})
    own.run("success")
    assert renewals() == 1
    own.pop_request()
    until(lambda: renewals() == 0, seconds=30, what="the thread had ended")


def deliver_again(shop: Shop, task_id: str) -> None:
    """Push the message of ``task_id`` once more, as a failover that undoes its pop would."""
    with Database(shop.dsn) as database:
        [row] = database.fetch("SELECT * FROM patchpilot.outbox WHERE task_id = %s", [task_id])
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            row["body"], exchange=row["exchange"], routing_key=row["routing_key"], headers=json.loads(row["headers"]),
            content_type=row["content_type"], content_encoding=row["content_encoding"], **json.loads(row["properties"]),
        )  # fmt: skip


def test_a_task_that_runs_twice_does_not_make_what_follows_it_run_twice(shop: Shop) -> None:
    """The first task of a chain is delivered twice, and runs twice; both runs publish the same next task."""
    result = chain(add.s(1, 1), note.s(label="middle"), note.s(label="tail")).apply_async()
    deliver_again(shop, result.parent.parent.id)
    worker = shop.worker("-c", "1")
    assert result.get(timeout=30) == 2
    until(lambda: worker.output().count("is not run again") >= 1, seconds=30, what="the second one was dropped")
    shop.stop()
    assert sorted(shop.ledger()) == ["add 1 1", "add 1 1", "middle 2", "tail 2"]


def test_a_frozen_chain_that_is_applied_again_runs_again(shop: Shop) -> None:
    """It has the same task ids, and is no repetition."""
    canvas = chain(add.s(1, 1).set(task_id="one"), note.s(label="tail").set(task_id="two"))
    shop.worker("-c", "1")
    canvas.apply_async()
    shop.await_line("tail 2")
    canvas.apply_async()
    shop.await_line("tail 2", count=2)


def test_a_link_that_is_published_twice_runs_once(shop: Shop) -> None:
    result = add.apply_async((1, 1), link=note.s(label="linked").set(task_id="the-link"))
    deliver_again(shop, result.id)
    worker = shop.worker("-c", "1")
    until(lambda: worker.output().count("is not run again") == 1, seconds=30, what="the second one was dropped")
    shop.stop()
    assert sorted(shop.ledger()) == ["add 1 1", "add 1 1", "linked 2"]


def test_what_follows_runs_once_however_the_task_before_it_came_to_its_end(shop: Shop) -> None:
    """By links without an id, in a chain, after a retry and after a replacement: each first task runs twice."""
    gate = shop.directory / "gate"
    gate.touch()
    links = [note.s(label="link"), note.s(label="other link"), chain(note.s(label="linked"), note.s(label="last"))]
    first = [
        add.apply_async((1, 1), link=links),
        chain(stubborn.s(5), note.s(label="tail")).apply_async(link=note.s(label="link of the tail")).parent,
        chain(becomes_hold.s(str(gate)), note.s(label="tail")).apply_async().parent,
        chain(becomes_chain.s(3), note.s(label="tail")).apply_async().parent,
    ]
    for result in first:
        deliver_again(shop, result.id)
    worker = shop.worker("-c", "1")
    dropped = 3 + 1 + 1 + 1  # three links, and what comes next in each chain
    until(lambda: worker.output().count("is not run again") >= dropped, seconds=60, what="the second ones were dropped")
    for line, count in (("last 2", 1), ("link of the tail 5", 1), ("tail None", 1), ("tail 5", 2)):
        shop.await_line(line, count=count)
    shop.stop()
    twice = ["add 1 1", "add 3 1", "replaced began", "replaced ended", "stubborn 0", "stubborn 1"]
    once = [
        "add 4 1",
        "last 2",
        "link 2",
        "link of the tail 5",
        "linked 2",
        "other link 2",
        "tail 5",
        "tail 5",
        "tail None",
    ]
    assert sorted(shop.ledger()) == sorted([*twice, *twice, *once])


def test_each_task_of_a_group_that_follows_runs_once(shop: Shop) -> None:
    """At the end of a chain, and as a link; with chains and groups inside."""

    def those_of(name: str) -> group:
        inside = chain(note.s(label=f"{name} first"), note.s(label=f"{name} last"))
        return group(note.s(label=f"{name} one"), inside, group(note.s(label=f"{name} two")))

    chain(add.s(1, 1), those_of("chain")).apply_async()
    add.apply_async((1, 1), link=[those_of("link"), note.s(label="other link")])
    with redis.Redis.from_url(shop.broker) as broker:
        messages = broker.lrange("celery", 0, -1)
        broker.lpush("celery", *messages)
    worker = shop.worker("-c", "1")
    until(lambda: worker.output().count("is not run again") >= 7, seconds=60, what="the second ones were dropped")
    for line in ("chain last 2", "link last 2"):
        shop.await_line(line)
    shop.stop()
    once = [f"{name} {each} 2" for name in ("chain", "link") for each in ("one", "first", "last", "two")]
    assert sorted(shop.ledger()) == sorted([*["add 1 1"] * 4, *once, "other link 2"])


def test_a_link_runs_each_time_that_its_task_is_sent(shop: Shop) -> None:
    canvas = add.s(1, 1).set(task_id="one", link=[note.s(label="linked")])
    shop.worker("-c", "1")
    for count in (1, 2):
        canvas.apply_async()
        shop.await_line("linked 2", count=count)


def test_what_a_callback_became_runs_once(shop: Shop) -> None:
    """A fenced task ends when it replaces itself; what it became has the same fence."""
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1)], becomes_hold.si(str(gate))).apply_async()
    worker = shop.worker("-c", "2")
    shop.await_line("replaced began")
    deliver_again(shop, result.id)
    until(lambda: worker.output().count("is not run again") == 1, seconds=30, what="the second one was dropped")
    gate.touch()
    assert result.get(timeout=30) is None
    assert shop.ledger().count("replaced began") == 1


def test_with_all_of_it_fenced_nothing_runs_twice(shop: Shop) -> None:
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    for part in result.parent.results:
        deliver_again(shop, part.id)
    worker = shop.worker("-c", "2", SHOP_FENCE="all")
    assert result.get(timeout=30) == 6
    until(lambda: worker.output().count("is not run again") == 2, seconds=30, what="the others were dropped")
    shop.stop()
    assert sorted(shop.ledger()) == ["add 1 1", "add 2 2", "total 6"]


@pytest.mark.parametrize("fence", ["all", "callbacks"])
def test_what_goes_to_all_who_listen_is_run_by_all(shop: Shop, broker: redis.Redis, fence: str) -> None:
    """Sent by a producer, or by a worker: the next of a chain, or a callback. So is what follows it."""
    for _ in range(2):
        shop.worker("-c", "1", SHOP_FENCE=fence, SHOP_EVERYBODY="1")

    def listening() -> int:  # each worker to two topics: remote control, and this one
        return sum(int(client["psub"]) for client in broker.client_list())

    until(lambda: listening() >= 4, seconds=30, what="both workers listened")
    chain(add.s(1, 1), note.s(label="follows")).apply_async(queue=everybody)
    chain(add.s(2, 2), note.s(label="next").set(queue="everybody")).apply_async()
    chord([add.s(3, 3)], total.s().set(queue="everybody")).apply_async()
    for line in ("add 1 1", "follows 2", "next 4", "total 6"):
        shop.await_line(line, count=2)


def test_without_the_fence_a_callback_runs_as_often_as_it_is_delivered(shop: Shop) -> None:
    result = chord([add.s(1, 1)], total.s().set(queue="callbacks")).apply_async()
    shop.worker(SHOP_FENCE="off")
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("callbacks") == 1, seconds=30, what="the callback was queued")
    deliver_again(shop, result.id)
    shop.worker("-Q", "callbacks", "-c", "1", SHOP_FENCE="off")
    shop.await_line("total 2", count=2)


def test_deduplication_does_not_keep_a_redelivered_part_from_healing_its_chord(shop: Shop) -> None:
    """A worker died after its part was on record and before it looked whether the chord was complete. Celery with
    worker_deduplicate_successful_tasks skips the redelivered task, and nobody would dispatch the callback."""
    result = chord([add.s(1, 1)], total.s()).apply_async()
    [part] = result.parent.results
    with Database(shop.dsn) as database:
        [row] = database.fetch("SELECT message_id::text FROM patchpilot.outbox")
        app.backend.store_result(part.id, 2, "SUCCESS")
        app.backend.chords.return_part(Part(result.parent.id, part.id, 0), "SUCCESS", 2)
        database.execute(
            "INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, lease_until, finished_at) "
            "VALUES (%s, %s, '0/0', gen_random_uuid(), 'gone', now(), now())", [row["message_id"], part.id],
        )  # fmt: skip
        assert database.fetch("SELECT state::text FROM patchpilot.chord") == [{"state": "open"}]
    worker = shop.worker(SHOP_DEDUPLICATE="1", SHOP_ACKS_LATE="1")
    assert result.get(timeout=30) == 2
    until(lambda: worker.output().count("is not run again") == 1, seconds=30, what="the part was not run again")
    assert shop.ledger() == ["total 2"]
