"""Results: what a user of Celery does with them, from PostgreSQL and woken by Valkey."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from celery import VERSION, chain, chord, group
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import GroupResult, ResultSet

from patchpilot.backend import waiting
from patchpilot.lab.processes import until
from tests.support.extras import fail, fails_loudly, large
from tests.support.shop import add, app, hold, note, quiet
from tests.support.station import Setup, Station, on

WAIT = 60
SINCE_5_7 = VERSION >= (5, 7)
NEVER = 3600.0

PLAIN = Setup("plain")
RICH = Setup(
    "rich",
    {
        "result_extended": True, "task_track_started": True, "result_compression": "zlib",
        "result_expires": 3600, "result_failure_expires": 60,
    },
)  # fmt: skip

pytestmark = pytest.mark.backend


@pytest.fixture
def gate(station: Station) -> Path:
    return station.shop.directory / f"gate-{uuid.uuid4()}"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as pool:
        yield pool


def waiting_for(result: Any, threads: ThreadPoolExecutor) -> Future[Any]:
    """``result.get()`` in a thread that is deep in waiting when this returns: it has asked PostgreSQL, in vain."""
    deep = Event()
    future = threads.submit(result.get, timeout=WAIT, on_interval=lambda *_: deep.set())
    assert deep.wait(WAIT)
    return future


# -- waiting --------------------------------------------------------------------------------------------------------


def test_a_waiter_is_woken_by_the_notification(
    station: Station, gate: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "ASK_EVERY", NEVER)
    waiter = waiting_for(hold.delay(7, str(gate)), threads)
    gate.touch()
    assert waiter.result(WAIT) == 7


def test_a_waiter_learns_from_postgresql_what_no_notification_told(
    station: Station, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "ASK_EVERY", 0.05)
    result = app.AsyncResult(str(uuid.uuid4()))
    waiter = waiting_for(result, threads)
    monkeypatch.setattr(result.backend, "notify", lambda *_: None)
    result.backend.store_result(result.id, 8, "SUCCESS")
    assert waiter.result(WAIT) == 8


@pytest.mark.parametrize(
    "safe",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not SINCE_5_7, reason="before Celery 5.7 one waits for a task")),
    ],
    ids=["a backend a thread", "one backend"],
)
def test_many_threads_wait_at_once(
    station: Station, gate: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    """Each for a task that it sent itself, and all of them for the same one."""
    monkeypatch.setattr(waiting, "ASK_EVERY", NEVER)
    monkeypatch.setitem(app.conf, "result_backend_thread_safe", safe)
    monkeypatch.setattr(app, "_backend_cache", None)
    shared = hold.delay("shared", str(gate))

    def send_and_wait(number: int) -> tuple[int, int, str, int]:
        mine = add.delay(number, number)
        same = app.AsyncResult(shared.id)
        started = mine.get(timeout=WAIT)
        begun.append(number)
        return number, started, same.get(timeout=WAIT), id(app.backend)

    begun: list[int] = []
    futures = [threads.submit(send_and_wait, number) for number in range(8)]
    until(lambda: len(begun) == 8, seconds=WAIT, what="all threads had their own result")
    everybody = waiting_for(shared, threads)
    gate.touch()
    assert everybody.result(WAIT) == "shared"
    seen = [future.result(WAIT) for future in futures]
    assert [it[:3] for it in seen] == [(number, 2 * number, "shared") for number in range(8)]
    assert (len({it[3] for it in seen}) == 1) is safe


def test_a_connection_that_was_closed_keeps_nobody_waiting(station: Station, gate: Path) -> None:
    """The one that hears of results, and meanwhile: the next task is published, and both are heard of."""
    first = hold.delay(1, str(gate))
    app.backend.client.connection_pool.disconnect()
    second = add.delay(2, 2)
    gate.touch()
    assert (second.get(timeout=WAIT), first.get(timeout=WAIT)) == (4, 1)


def test_a_task_that_nobody_sent_is_pending(station: Station) -> None:
    result = app.AsyncResult(str(uuid.uuid4()))
    assert (result.state, result.ready(), result.result, result.traceback) == ("PENDING", False, None, None)
    assert not SINCE_5_7 or not result.exists()
    with pytest.raises(CeleryTimeoutError):
        result.get(timeout=0.1)


def test_ready_and_its_kin(station: Station, gate: Path) -> None:
    held, failed = hold.delay(1, str(gate)), fail.delay()
    assert not held.ready()
    assert not held.successful()
    assert isinstance(failed.get(timeout=WAIT, propagate=False), ValueError)
    assert (failed.ready(), failed.failed(), failed.successful(), failed.state) == (True, True, False, "FAILURE")
    gate.touch()
    until(held.ready, seconds=WAIT, what="it was ready")
    assert (held.successful(), held.result) == (True, 1)
    assert not SINCE_5_7 or held.exists()


@pytest.mark.parametrize("join", ["join", "join_native", "get"])
def test_joining(station: Station, join: str) -> None:
    results = group(add.s(i, i) for i in range(12)).delay()
    assert getattr(results, join)(timeout=WAIT) == [2 * i for i in range(12)]
    assert (results.ready(), results.successful(), results.completed_count()) == (True, True, 12)
    mixed = ResultSet([add.delay(1, 1), fail.delay(), add.delay(2, 2)])
    with pytest.raises(ValueError, match="no"):
        getattr(mixed, join)(timeout=WAIT)
    values = getattr(mixed, join)(timeout=WAIT, propagate=False)
    assert [str(value) for value in values] == ["2", "no", "4"]


def test_iterating(station: Station) -> None:
    results = ResultSet([add.delay(i, i) for i in range(5)])
    seen = {task_id: meta["result"] for task_id, meta in results.iter_native(timeout=WAIT)}
    assert seen == {result.id: 2 * i for i, result in enumerate(results)}
    told: list[tuple[str, int]] = []
    results.join(timeout=WAIT, callback=lambda task_id, value: told.append((task_id, value)))
    assert told == [(result.id, 2 * i) for i, result in enumerate(results)]


def test_a_join_is_woken_by_notifications(
    station: Station, gate: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in another thread than the one that has sent them, where with Celery's own backend it never is."""
    monkeypatch.setattr(waiting, "ASK_EVERY", NEVER)
    results = group(hold.s(i, str(gate)) for i in range(3)).delay()
    deep = Event()
    waiter = threads.submit(results.join_native, timeout=WAIT, on_interval=deep.set)
    assert deep.wait(WAIT)
    gate.touch()
    assert waiter.result(WAIT) == [0, 1, 2]


def test_a_promise_is_kept(station: Station) -> None:
    kept: list[int] = []
    result = add.delay(1, 2)
    result.then(lambda done: kept.append(done.result))
    assert result.get(timeout=WAIT) == 3
    assert kept == [3]


# -- what is kept, and for how long ---------------------------------------------------------------------------------


def stored(station: Station, task_id: str) -> list[dict[str, Any]]:
    sql = """SELECT state, meta, round(extract(epoch FROM expires_at - stored_at))::int AS lifetime
             FROM patchpilot.result WHERE task_id = %s"""
    return station.database.fetch(sql, [task_id])


def test_forgetting(station: Station) -> None:
    results = group(add.s(1, 1), add.s(2, 2)).delay()
    assert results.get(timeout=WAIT) == [2, 4]
    first, second = results.results
    first.forget()
    assert stored(station, first.id) == []
    assert app.AsyncResult(first.id).state == "PENDING"
    assert app.AsyncResult(second.id).result == 4
    results.forget()
    assert stored(station, second.id) == []


@on(RICH)
def test_results_expire(station: Station) -> None:
    kept, failed, gone, gone_too = add.delay(1, 1), fail.delay(), add.delay(2, 2), fail.delay()
    for result in (kept, failed, gone, gone_too):
        result.get(timeout=WAIT, propagate=False)
    saved, expired = GroupResult(str(uuid.uuid4()), [kept]), GroupResult(str(uuid.uuid4()), [gone])
    saved.save()
    expired.save()
    of_failures = 60 if SINCE_5_7 else 3600
    assert [stored(station, it.id)[0]["lifetime"] for it in (kept, failed)] == [3600, of_failures]
    for table, key, values in (
        ("result", "task_id", [gone.id, gone_too.id]), ("saved_group", "group_id", [expired.id])
    ):  # fmt: skip
        station.database.execute(
            f"UPDATE patchpilot.{table} SET expires_at = now() - interval '1 s' WHERE {key} = ANY(%s)",  # type: ignore[arg-type]  # noqa: S608
            [values],
        )
    before = station.database.fetch("SELECT task_id FROM patchpilot.result ORDER BY task_id")
    app.backend.cleanup()
    after = station.database.fetch("SELECT task_id FROM patchpilot.result ORDER BY task_id")
    assert [row for row in before if row["task_id"] not in {gone.id, gone_too.id}] == after
    assert (GroupResult.restore(saved.id, app=app), GroupResult.restore(expired.id, app=app)) == (saved, None)


def test_results_may_never_expire(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.backend, "expires", None)
    app.backend.store_result(task_id := str(uuid.uuid4()), 1, "SUCCESS")
    assert stored(station, task_id)[0]["lifetime"] is None
    app.backend.cleanup()
    assert app.AsyncResult(task_id).result == 1


@on(RICH)
def test_extended_results(station: Station) -> None:
    result = add.apply_async((1,), {"y": 2})
    assert result.get(timeout=WAIT) == 3
    found = app.AsyncResult(result.id)
    assert (found.name, found.args, found.kwargs, found.queue) == (add.name, [1], {"y": 2}, "celery")
    assert (found.retries, bool(found.worker), found.date_done is not None) == (0, True, True)
    failed = fail.apply_async(kwargs={"message": "so"})
    failed.get(timeout=WAIT, propagate=False)
    assert (app.AsyncResult(failed.id).kwargs, app.AsyncResult(failed.id).name) == ({"message": "so"}, fail.name)


@pytest.mark.skipif(not SINCE_5_7, reason="Celery has compressed results since 5.7")
@on(RICH)
def test_results_are_compressed(station: Station) -> None:
    result = large.delay(100_000)
    assert result.get(timeout=WAIT) == "x" * 100_000
    assert len(stored(station, result.id)[0]["meta"]) < 10_000
    assert chord([large.s(50_000), large.s(1)], note.s()).delay().get(timeout=WAIT) == ["x" * 50_000, "x"]


def test_large_results(station: Station, gate: Path, threads: ThreadPoolExecutor) -> None:
    result = chain(hold.si(10_000_000, str(gate)), large.s()).delay()
    waiter = waiting_for(result, threads)
    gate.touch()
    assert len(waiter.result(WAIT)) == 10_000_000
    assert len(app.AsyncResult(result.id).get(timeout=WAIT)) == 10_000_000


def test_ignored_results(station: Station) -> None:
    assert quiet.delay(1).get() is None
    ignored = add.apply_async((1, 1), ignore_result=True)
    assert ignored.get() is None
    loud = fails_loudly.delay()
    until(lambda: app.AsyncResult(loud.id).state == "FAILURE", seconds=WAIT, what="the error was stored")
    until(lambda: "add 1 1" in station.ledger(), seconds=WAIT, what="it had run")
    station.await_silence()
    assert stored(station, ignored.id) == []


def test_a_saved_group(station: Station) -> None:
    results = group(add.s(1, 1), chain(add.s(2, 2), add.s(1))).delay()
    results.save()
    if not SINCE_5_7:  # of several results of one task, only the first one is told while it waits
        assert results.get(timeout=WAIT) == [2, 5]
    restored = GroupResult.restore(results.id, app=app)
    assert restored == results
    assert [child.id for child in restored.results] == [child.id for child in results.results]
    assert restored.get(timeout=WAIT) == [2, 5]
    restored.delete()
    assert GroupResult.restore(results.id, app=app) is None
    assert app.AsyncResult(results.results[0].id).result == 2
