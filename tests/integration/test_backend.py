"""The result backend with real workers, on real servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from celery import chain, chord, group
from celery.exceptions import ChordError

from patchpilot.lab.replicas import ReplicaSet
from patchpilot.postgres.connection import Database
from tests.conftest import shop_on
from tests.support.processes import Shop
from tests.support.shop import add, app, becomes_chain, becomes_two, boom, grows, note, quiet, stubborn, total

pytestmark = pytest.mark.backend

WAIT = 30


def rows(shop: Shop, sql: str) -> list[dict[str, object]]:
    with Database(shop.dsn) as database:
        return database.fetch(sql)  # type: ignore[arg-type]


@pytest.mark.parametrize("counting", ["postgres", "valkey"], indirect=True)
def test_the_canvases_people_use(shop: Shop) -> None:
    shop.worker()
    canvases = {
        "task": (add.s(1, 2), 3),
        "chain": (chain(add.s(1, 2), add.s(3)), 6),
        "group": (group(add.s(1, 1), add.s(2, 2)), [2, 4]),
        "chord": (chord([add.s(i, i) for i in range(10)], total.s()), 90),
        "chord of one": (chord([add.s(1, 1)], total.s()), 2),
        "generator header": (chord((add.s(i, i) for i in range(3)), total.s()), 6),
        "chord of chains": (chord([chain(add.s(1, 1), add.s(i)) for i in range(3)], total.s()), 9),
        "group then task": (chain(group(add.s(1, 1), add.s(2, 2)), total.s()), 6),
        "chord in a chain": (chain(add.s(1, 1), chord([add.s(1), add.s(2)], total.s())), 7),
        "chord in a header": (chord([chord([add.s(1, 1), add.s(2, 2)], total.s()), add.s(1, 0)], total.s()), 7),
        "chain body": (chord([add.s(1, 1), add.s(2, 2)], chain(total.s(), add.s(100))), 106),
        "group body": (chord([add.s(1, 1)], group(total.s(), total.s())), [2, 2]),
        "empty header": (chord([], total.s()), 0),
        "retried part": (chord([stubborn.s(5), add.s(1, 1)], total.s()), 7),
        "part replaced by a chain": (chord([becomes_chain.s(1), add.s(1, 1)], total.s()), 5),
        "growing chord": (chord([grows.s(1), add.s(1, 1)], total.s()), 14),
        "immutable body": (chord([add.s(1, 1)], add.si(20, 1)), 21),
        "part without a result": (chord([quiet.s(4), quiet.s(5)], total.s()), 9),
    }
    sent = {name: canvas.apply_async() for name, (canvas, _) in canvases.items()}
    assert {name: outcome(result) for name, result in sent.items()} == {
        name: expected for name, (_, expected) in canvases.items()
    }
    replaced = chord([becomes_two.s(1), add.s(1, 1)], note.s()).apply_async()
    assert replaced.get(timeout=WAIT) == [[2, 3], 2]
    # Every message's task has ended, so the outbox is empty; every chord is over, so Valkey holds none of its keys.
    shop.stop()
    assert rows(shop, "SELECT task_name, task_id FROM patchpilot.outbox") == []
    assert rows(shop, "SELECT group_id FROM patchpilot.chord WHERE state NOT IN ('dispatched')") == []
    with redis.Redis.from_url(shop.broker) as broker:
        assert broker.keys("celery-taskset-meta-*") == []


def test_a_failed_part_fails_the_chord(shop: Shop) -> None:
    shop.worker()
    result = chord([add.s(1, 1), boom.s()], total.s()).apply_async()
    error = result.get(timeout=WAIT, propagate=False)
    assert isinstance(error, ChordError)
    assert "boom" in str(error)
    assert "total" not in " ".join(shop.ledger())
    shop.stop()
    assert [row["state"] for row in rows(shop, "SELECT state FROM patchpilot.chord")] == ["failed"]


def test_a_chord_is_on_record_before_its_header_is_published(shop: Shop) -> None:
    """No worker runs: what PostgreSQL holds now is all that a failover would leave."""
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    [stored] = rows(shop, "SELECT group_id, callback_id, callback_name, state FROM patchpilot.chord")
    assert stored == {
        "group_id": result.parent.id, "callback_id": result.id, "callback_name": total.name, "state": "open",
    }  # fmt: skip
    parts = rows(shop, "SELECT task_id, state FROM patchpilot.chord_part ORDER BY position")
    assert parts == [{"task_id": child.id, "state": None} for child in result.parent.results]
    messages = rows(shop, "SELECT task_id, group_id FROM patchpilot.outbox")
    assert sorted(row["task_id"] for row in messages) == sorted(child.id for child in result.parent.results)
    assert {row["group_id"] for row in messages} == {result.parent.id}


def outcome(result: object) -> object:
    try:
        return result.get(timeout=WAIT)  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 - the comparison says it
        return error


def test_waiting_survives_a_failover(shop: Shop, replicated: ReplicaSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subscription is gone with the old primary, and so is the notification; the result is in PostgreSQL."""
    with shop_on(shop.roster, shop.directory, replicated.endpoint, shop.dsn, monkeypatch):
        result = add.apply_async((1, 1))
        with ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(lambda: result.get(timeout=60))
            replicated.failover()
            app.backend.store_result(result.id, 2, "SUCCESS")
            assert waiter.result(timeout=60) == 2
