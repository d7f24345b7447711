"""Real workers, and what the pilot finds out of them: who answers, who consumes, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest
import redis

from patchpilot.backend.canary import queue_of
from patchpilot.backend.config import CANARY
from patchpilot.broker_name import NAMES
from patchpilot.errors import NeedsOperator
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from patchpilot.workers import Worker, Workers
from tests.support.processes import Shop
from tests.support.shop import add, app, hold

NOW = Window(min_age=timedelta(0))
TABLES = ("chord", "chord_part", "outbox", "fence", "result", "remedy")

pytestmark = pytest.mark.backend


@pytest.fixture
def workers(shop: Shop) -> Iterator[Workers]:
    with Workers(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as opened:
        yield opened


@pytest.fixture
def database(shop: Shop) -> Iterator[Database]:
    with Database(shop.dsn) as opened:
        yield opened


def by_name(workers: Workers) -> dict[str, Worker]:
    """The workers, by the name of the test's process."""
    return {worker.name.split("@")[0]: worker for worker in workers.look().workers}


def all_of(found: Mapping[str, Worker]) -> dict[str, str]:
    return {worker.instance: worker.serializer for worker in found.values()}


def await_alive(workers: Workers, count: int) -> None:
    until(lambda: len(workers.look().workers) == count, seconds=30, what="every worker gave a sign of life")


def await_proof(workers: Workers, sent: Mapping[str, str]) -> None:
    def proven() -> bool:
        found = {worker.instance: worker.proof for worker in workers.look().workers}
        return all(found[key] == {"task": token, "chord": token} for key, token in sent.items())

    until(proven, seconds=30, what="every canary came back")


def rows(database: Database) -> dict[str, int]:
    return {
        table: database.fetch(f"SELECT count(*) AS n FROM patchpilot.{table}".encode())[0]["n"]  # type: ignore[arg-type]  # noqa: S608
        for table in TABLES
    }


def keys(broker: redis.Redis) -> set[str]:
    """What is in Valkey, less what remote control and workers leave there, and how many messages are unacknowledged."""
    names = {name for key in broker.scan_iter() if "pidbox" not in (name := key.decode()) and name != NAMES}
    return {name if name != "unacked" else f"{broker.hlen(name)} unacked" for name in names}


def test_workers_that_consume_prove_it_and_nothing_of_it_stays(
    shop: Shop, workers: Workers, broker: redis.Redis, database: Database
) -> None:
    first, second = shop.worker("-c", "2"), shop.worker("-P", "threads", "-c", "1", "-Q", "other")
    await_alive(workers, 2)
    before, empty = keys(broker), dict.fromkeys(TABLES, 0)
    found = by_name(workers)
    assert {name: (it.answers, it.canary, it.queues) for name, it in found.items()} == {
        first.name: (True, True, ("celery",)), second.name: (True, True, ("other",)),
    }  # fmt: skip
    assert (found[first.name].processes, found[first.name].running) == (2, {})
    host, port = shop.broker.removeprefix("redis://").split("/")[0].split(":")
    assert found[first.name].broker == (host, int(port))
    assert found[first.name].settings["worker_prefetch_multiplier"] == 1
    assert found[first.name].settings["broker_transport_options.socket_timeout"] == 10

    sent = workers.release(all_of(found))
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        assert recovery.recover(NOW) == ()
    await_proof(workers, sent)
    until(lambda: rows(database) == empty, seconds=10, what="PostgreSQL was as before")
    until(lambda: keys(broker) == before, seconds=10, what="Valkey was as before")
    assert not [name for name in keys(broker) if CANARY in name]
    assert "ERROR" not in first.output() + second.output()

    # Somebody pauses it. It still answers, and even takes canaries; but it consumes nothing of the application's.
    app.control.cancel_consumer("celery", destination=[found[first.name].name], reply=True)
    until(lambda: by_name(workers)[first.name].queues == (), seconds=20, what="the worker consumed nothing")
    add.s(1, 1).apply_async()
    [depth] = [it for it in workers.look().queues if it.queue == "celery"]
    assert (depth.length, bool(depth.oldest)) == (1, True)


def test_a_blocked_pool_takes_no_canary_and_a_hung_worker_does_not_answer(
    shop: Shop, workers: Workers, broker: redis.Redis, database: Database
) -> None:
    gate = shop.directory / "gate"
    blocked = shop.worker("-c", "1")
    hung = shop.worker("-P", "solo", "-Q", "solo")
    await_alive(workers, 2)
    hold.s(1, str(gate)).apply_async()
    hold.s(2, str(gate)).apply_async(queue="solo")
    shop.await_line("hold began", count=2)
    # The pool of processes acknowledges a moment later; the hung worker does when it turns to its loop again.
    until(lambda: "1 unacked" in keys(broker), seconds=30, what="the blocked worker acknowledged its task")
    before = keys(broker), rows(database)

    found = by_name(workers)
    assert (found[hung.name].answers, found[hung.name].knows) == (False, True)
    assert found[blocked.name].running == {hold.name: 1}
    sent = workers.release(all_of(found))
    queues = [queue_of(worker.instance).name for worker in found.values()]
    assert all(0 < broker.ttl(name) <= 600 for name in queues if broker.exists(name))
    assert broker.exists(queue_of(found[hung.name].instance).name)
    assert [row["canary"] for row in database.fetch("SELECT canary FROM patchpilot.worker")] == [{}, {}]
    assert rows(database) == {**before[1], "chord": 2, "chord_part": 4}

    workers.tidy(sent)
    assert (keys(broker), rows(database)) == before
    gate.touch()
    shop.await_line("hold ended", count=2)
    until(lambda: by_name(workers)[hung.name].answers, seconds=20, what="the hung worker answered again")
    # Whatever a worker had taken before the tidying ends without a trace too.
    await_proof(workers, workers.release(all_of(by_name(workers))))
    expected = {**dict.fromkeys(TABLES, 0), "result": 2}
    until(lambda: rows(database) == expected, seconds=10, what="only the results were left")
    until(lambda: not [key for key in keys(broker) if "_kombu" not in key], seconds=10, what="Valkey was empty")


def test_canaries_whose_pilot_died_are_never_stuck_and_go_in_the_end(
    shop: Shop, workers: Workers, broker: redis.Redis, database: Database
) -> None:
    """No worker takes them: the one that they were sent to is gone as well."""
    gone = Worker("00000000-0000-0000-0000-000000000000", "celery@gone", answers=True)
    with pytest.raises(NeedsOperator, match=r"serialiser is missing here.*runes"):
        workers.release({gone.instance: "runes"})
    workers.release({gone.instance: gone.serializer})
    assert rows(database)["chord"] == 1
    # Five minutes later all its parts have returned, and nobody dispatched the callback: stuck, if it were a chord.
    database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '5 minutes'")
    database.execute(
        "UPDATE patchpilot.chord_part SET state = 'SUCCESS', payload = '1', returned_at = now() - interval '5 minutes'"
    )
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        assert recovery.survey(NOW) == ()
        assert recovery.recover(NOW) == ()
    workers.tidy({})
    assert rows(database)["chord"] == 1, "somebody may still wait for it"
    database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '11 minutes'")
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        assert recovery.recover(NOW) == ()
    assert rows(database) == dict.fromkeys(TABLES, 0)
    assert keys(broker) == {queue_of(gone.instance).name}
    assert 0 < broker.ttl(queue_of(gone.instance).name) <= 600


def test_a_late_canary_is_nobodys_chord(shop: Shop, workers: Workers, broker: redis.Redis, database: Database) -> None:
    """It was tidied away, and then a worker gets to it: the part belongs to no chord, and Celery must not begin one."""
    shop.worker("-c", "1")
    await_alive(workers, 1)
    [worker] = workers.look().workers
    queue = queue_of(worker.instance).name
    app.control.cancel_consumer(queue, destination=[worker.name], reply=True)
    until(lambda: not workers.look().workers[0].canary, seconds=20, what="the canaries waited")
    sent = workers.release({worker.instance: worker.serializer})
    waiting: list[Any] = broker.lrange(queue, 0, -1)
    workers.tidy(sent)
    broker.lpush(queue, *reversed(waiting))
    app.control.add_consumer(queue, destination=[worker.name], reply=True)
    until(lambda: workers.look().workers[0].proof.get("task") == sent[worker.instance], seconds=20, what="it came back")
    until(lambda: not broker.exists(queue), seconds=20, what="the worker took all of them")
    assert "chord" not in workers.look().workers[0].proof
    assert rows(database) == dict.fromkeys(TABLES, 0)
    assert not [key for key in keys(broker) if "taskset" in key]
