"""Recovery on real servers: each test loses one thing on purpose, and counts in the ledger what ran."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from uuid import uuid4

import psycopg
import pytest
import redis
from celery import Signature, chain, chord, group

from patchpilot.errors import Exit
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Applied, Finding, Recovery, Site, Window
from tests.support.commands import configured, patchpilot
from tests.support.processes import Shop
from tests.support.shop import add, app, becomes_hold, hold, later, note, quiet, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))

counts_in_valkey = pytest.mark.parametrize("counting", ["valkey"], indirect=True)
"""For tests that lose a count."""


def lose(broker: redis.Redis, queue: str, task_id: str) -> None:
    """Take one message out of a queue, as if its push had never been replicated."""
    for raw in broker.lrange(queue, 0, -1):
        if json.loads(raw)["headers"]["id"] == task_id:
            broker.lrem(queue, 1, raw)
            return
    raise AssertionError(f"{task_id} is not in {queue}")


def await_parts(shop: Shop) -> None:
    """Wait until every part is on record. A recovery before that would make the worker itself ask PostgreSQL."""
    with Database(shop.dsn) as database:
        missing = "SELECT 1 FROM patchpilot.chord_part WHERE state IS NULL"
        until(lambda: database.fetch(missing) == [], seconds=30, what="every part had returned")


def await_stuck(recovery: Recovery, count: int = 1) -> None:
    """Wait until so many are found stuck: what has just happened is given a moment to go on by itself."""
    until(lambda: len(recovery.survey(NOW)) >= count, seconds=30, what=f"{count} were found stuck")


def only(findings: tuple[Finding, ...] | tuple[Applied, ...]) -> Finding | Applied:
    [finding] = findings
    return finding


def test_nothing_is_found_where_nothing_is_stuck(shop: Shop, recovery: Recovery) -> None:
    """Queued, running and finished work is left alone, however young the window lets it be."""
    gate = shop.directory / "gate"
    finished = chord([add.s(1, 1)], total.s()).apply_async()
    chord([hold.s(1, str(gate)), add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    assert recovery.survey(NOW) == ()
    shop.worker("-c", "1")
    shop.await_line("hold began")
    assert recovery.survey(NOW) == ()
    assert recovery.recover(NOW) == ()
    gate.touch()
    shop.await_line("total 7")
    assert finished.get(timeout=30) == 2
    assert recovery.survey(NOW) == ()


@counts_in_valkey
def test_a_lost_part_return(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1), hold.s(5, str(gate))], total.s()).apply_async()
    shop.worker()
    shop.await_line("hold began")
    key = f"celery-taskset-meta-{result.parent.id}.d"
    until(lambda: broker.scard(key) == 1, seconds=30, what="the first part was counted")
    broker.delete(key)
    gate.touch()
    until(lambda: broker.scard(key) == 1, seconds=30, what="the second part was counted")
    assert recovery.survey(NOW) == ()
    await_stuck(recovery)
    found = only(recovery.survey(NOW))
    assert (found.kind, found.id, found.diagnosis) == ("chord", result.parent.id, "part-return-lost")
    assert (found.callback, found.returned, found.total) == (total.name, 2, 2)
    assert only(recovery.recover(NOW)).id == result.parent.id
    assert result.get(timeout=30) == 7
    assert recovery.recover(NOW) == ()
    assert shop.ledger().count("total 7") == 1
    assert broker.keys("celery-taskset-meta-*") == []


def test_a_lost_header_message(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    result = chord([add.s(i, i) for i in range(4)], total.s()).apply_async()
    lose(broker, "celery", result.parent.results[2].id)
    found = only(recovery.survey(NOW))
    assert (found.kind, found.id, found.diagnosis) == ("chord", result.parent.id, "header-message-lost")
    shop.worker()
    # While the worker takes the others, their producer could still be at it.
    until(lambda: len(shop.ledger()) == 3, seconds=30, what="the others had run")
    assert only(recovery.recover(NOW)).diagnosis == "header-message-lost"
    assert result.get(timeout=30) == 12
    assert sorted(shop.ledger()) == ["add 0 0", "add 1 1", "add 2 2", "add 3 3", "total 12"]


def test_a_header_message_that_is_lost_while_another_part_runs(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """What runs was acknowledged early: it is not with the broker, and says nothing of whether the rest is pushed."""
    gate = shop.directory / "gate"
    result = chord([hold.s(1, str(gate)), add.s(2, 2)], total.s()).apply_async()
    lose(broker, "celery", result.parent.results[1].id)
    shop.worker()
    shop.await_line("hold began")
    await_stuck(recovery)
    assert only(recovery.recover(NOW)).diagnosis == "header-message-lost"
    shop.await_line("add 2 2")
    gate.touch()
    assert result.get(timeout=30) == 5
    assert sorted(shop.ledger()) == ["add 2 2", "hold began", "hold ended", "total 5"]


def test_a_lost_callback_message(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    result = chord([add.s(1, 1), add.s(2, 2)], total.s().set(queue="callbacks")).apply_async()
    shop.worker()
    until(lambda: broker.llen("callbacks") == 1, seconds=30, what="the callback was queued")
    broker.delete("callbacks")
    found = only(recovery.survey(NOW))
    assert (found.kind, found.id, found.diagnosis) == ("callback", result.parent.id, "callback-message-lost")
    assert found.callback == total.name
    assert only(recovery.recover(NOW)).kind == "callback"
    shop.worker("-Q", "callbacks", "-c", "1")
    assert result.get(timeout=30) == 6
    assert shop.ledger().count("total 6") == 1


def test_a_lost_message_of_a_task_that_is_in_no_chord(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    result = add.s(20, 1).apply_async()
    broker.delete("celery")
    found = only(recovery.survey(NOW))
    assert (found.kind, found.id, found.diagnosis) == ("task", result.id, "message-lost")
    recovery.recover(NOW)
    shop.worker()
    assert result.get(timeout=30) == 21
    assert recovery.survey(NOW) == ()


def test_what_a_dead_worker_had_taken_goes_back_into_its_queue(shop: Shop, recovery: Recovery) -> None:
    """Acknowledged late: the message is unacknowledged, and nobody living has it."""
    gate = shop.directory / "gate"
    result = chord([hold.s(3, str(gate)), add.s(1, 1)], total.s()).apply_async()
    worker = shop.worker("-c", "1", SHOP_ACKS_LATE="1")
    shop.await_line("hold began")
    assert recovery.survey(NOW) == ()
    worker.kill()
    found = only(recovery.survey(NOW))
    assert (found.id, found.diagnosis) == (result.parent.id, "header-message-lost")
    recovery.recover(NOW)
    gate.touch()
    shop.worker()
    assert result.get(timeout=30) == 5
    assert shop.ledger().count("total 5") == 1


def test_a_worker_that_lives_but_does_not_answer_keeps_what_it_may_have(shop: Shop, recovery: Recovery) -> None:
    """A busy solo worker answers nobody, but gives a sign of life. Its task is acknowledged, so it is in no queue."""
    gate = shop.directory / "gate"
    result = hold.s(3, str(gate)).apply_async()
    shop.worker("--pool", "solo")
    shop.await_line("hold began")
    found = only(recovery.survey(NOW))
    assert (found.id, found.diagnosis, found.curable) == (result.id, "unknown", False)
    assert "alive and without an answer: " in found.reason
    assert recovery.recover(NOW) == ()
    gate.touch()
    assert result.get(timeout=30) == 3
    assert shop.ledger() == ["hold began", "hold ended"]


def test_what_is_assumed_to_be_lost_is_sent_again(shop: Shop, recovery: Recovery) -> None:
    """As above, but a person says that the silent worker is gone."""
    gate = shop.directory / "gate"
    result = hold.s(3, str(gate)).apply_async()
    shop.worker("--pool", "solo")
    shop.await_line("hold began")
    assert recovery.recover(NOW) == ()
    assert only(recovery.sweep(NOW, assume_lost=True).applied).diagnosis == "abandoned"
    gate.touch()
    shop.await_line("hold ended", count=2)
    assert result.get(timeout=30) == 3


@counts_in_valkey
def test_a_claim_is_a_lease(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process claims the chord and dies. Until its lease is over the chord is taken; then it is not stranded."""
    monkeypatch.setitem(app.conf, "patchpilot_claim_lease", 3.0)
    result = chord([add.s(1, 1)], total.s()).apply_async()
    broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
    worker = shop.worker()
    await_parts(shop)
    worker.stop()
    backend = app.backend
    assert backend.finisher._claim([result.parent.id], str(uuid4()))
    assert recovery.survey(NOW) == ()
    assert backend.finish_chord(result.parent.id) is False
    until(lambda: recovery.survey(NOW) != (), seconds=30, what="the lease was over")
    assert only(recovery.recover(NOW)).diagnosis == "dispatch-interrupted"
    shop.worker()
    assert result.get(timeout=30) == 2
    assert shop.ledger().count("total 2") == 1


@counts_in_valkey
def test_many_recoveries_and_the_worker_itself_dispatch_once(shop: Shop, broker: redis.Redis) -> None:
    results = [chord([add.s(i, 1)], note.s(label=f"note{i}")).apply_async() for i in range(8)]
    for result in results:
        broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
    worker = shop.worker()
    await_parts(shop)
    recoveries = [Recovery(Site(shop.broker, shop.dsn)) for _ in range(4)]
    start = threading.Barrier(len(recoveries))
    await_stuck(recoveries[0], len(results))
    applied: list[tuple[Applied, ...]] = []

    def go(recovery: Recovery) -> None:
        start.wait()
        applied.append(recovery.recover(NOW))

    threads = [threading.Thread(target=go, args=(recovery,)) for recovery in recoveries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.id for done in applied for each in done) == sorted(result.parent.id for result in results)
    assert [result.get(timeout=30) for result in results] == [[i + 1] for i in range(8)]
    worker.stop()
    assert [shop.ledger().count(f"note{i} [{i + 1}]") for i in range(8)] == [1] * 8
    for recovery in recoveries:
        recovery.close()


def test_a_chord_whose_publishing_raised_is_left_alone(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """The caller got an exception and may have sent it again: finishing it as well would be wrong."""

    class Unserialisable:
        pass

    with pytest.raises(Exception, match="not JSON serializable"):
        chord([add.s(1, 1), add.s(1, Unserialisable())], total.s()).apply_async()
    found = only(recovery.survey(NOW))
    assert isinstance(found, Finding)
    assert (found.diagnosis, found.curable) == ("half-published", False)
    assert recovery.recover(NOW) == ()
    assert broker.llen("celery") == 0  # the first message was held back until the last one could be written
    add.s(2, 2).apply_async()
    assert broker.llen("celery") == 1


@counts_in_valkey
@pytest.mark.parametrize(
    ("body", "line"),
    [
        (chain(total.s(), note.s(label="end")), "end 3"),
        (group(total.s(), note.s(label="end")), "end [1, 2]"),
        (chain(total.s(), group(note.s(label="end"), add.s(1))), "end 3"),
    ],
    ids=["chain", "group", "chain of a group"],
)
def test_callbacks_that_are_canvases_themselves(
    shop: Shop, recovery: Recovery, broker: redis.Redis, body: Signature, line: str
) -> None:
    """Recovery has none of the tasks: every signature inside the callback has to find the right application."""
    chord([add.s(1, 0), add.s(1, 1)], body).apply_async()
    group_id = broker.keys("celery-taskset-meta-*.s")[0].decode()[len("celery-taskset-meta-") : -2]
    broker.delete(f"celery-taskset-meta-{group_id}.s")
    shop.worker()
    await_parts(shop)
    await_stuck(recovery)
    assert only(recovery.recover(NOW)).diagnosis == "part-return-lost"
    shop.await_line(line)
    assert shop.ledger().count(line) == 1


@counts_in_valkey
def test_one_that_cannot_be_recovered_does_not_keep_the_others_from_it(shop: Shop, broker: redis.Redis) -> None:
    stuck = [chord([add.s(i, 1)], total.s()).apply_async() for i in range(3)]
    for result in stuck:
        broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
    shop.worker()
    await_parts(shop)
    with Database(shop.dsn) as database:
        database.execute(
            "UPDATE patchpilot.chord SET callback_type = 'application/x-python-serialize' WHERE group_id = %s",
            [stuck[0].parent.id],
        )
    complaints: list[str] = []
    with Recovery(
        Site(shop.broker, shop.dsn), complain=lambda it, error: complaints.append(f"{it.id}: {error}")
    ) as opened:
        await_stuck(opened, len(stuck))
        assert sorted(each.id for each in opened.recover(NOW)) == sorted(result.parent.id for result in stuck[1:])
        assert len(complaints) == 1
        assert "celery.accept_content" in complaints[0]
        assert [it.id for it in opened.survey(NOW)] == [stuck[0].parent.id]
    told = patchpilot("recover", "--min-age", "0s", "--output", "json", "--config", configured(shop))
    [failed] = json.loads(told.stdout)["failed"]
    assert (told.returncode, failed["kind"], failed["id"]) == (Exit.ERROR, "chord", stuck[0].parent.id)
    assert "celery.accept_content" in failed["why"]


def test_retries_and_replaced_tasks_are_not_sent_again(shop: Shop, recovery: Recovery) -> None:
    """Each has the id of the task before it. Both workers have the same name, as Celery's default has it."""
    gate = shop.directory / "gate"
    later.apply_async(("retried", 3))
    becomes_hold.apply_async((str(gate),))
    add.apply_async((40, 2), countdown=4)
    shop.worker("-n", "same@h", "-c", "2")
    shop.worker("-n", "same@h", "-c", "2")
    shop.await_line("replaced began")
    shop.await_line("retried 0")
    until(lambda: recovery.recover(NOW) != () or "retried 1" in shop.ledger(), seconds=30, what="the retry ran")
    gate.touch()
    shop.await_line("replaced ended")
    shop.await_line("add 40 2")
    assert recovery.recover(NOW) == ()
    assert sorted(shop.ledger()) == ["add 40 2", "replaced began", "replaced ended", "retried 0", "retried 1"]


def test_a_task_that_is_in_a_header_twice_is_awaited_twice(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """One signature, one id, two messages. What tells of the end of one says nothing of the other."""
    same = add.s(1, 1)
    same.freeze()
    result = chord([same, same], total.s()).apply_async()
    parked = broker.lpop("celery")
    worker = shop.worker("-c", "1")
    shop.await_line("add 1 1")
    with Database(shop.dsn) as database:
        until(lambda: len(database.fetch("SELECT FROM patchpilot.outbox")) == 1, seconds=30, what="the first has ended")
        worker.stop()
        database.execute("UPDATE patchpilot.result SET stored_at = stored_at - interval '15 s'")
        database.execute("UPDATE patchpilot.chord SET created_at = created_at - interval '1 min'")
        database.execute("UPDATE patchpilot.outbox SET recorded_at = recorded_at - interval '1 min'")
        broker.rpush("celery", parked)
        assert recovery.recover(NOW) == ()
        assert broker.llen("celery") == 1
        broker.delete("celery")
        assert only(recovery.recover(NOW)).diagnosis == "header-message-lost"
    shop.worker("-c", "1")
    assert result.get(timeout=30) == 4
    assert shop.ledger().count("add 1 1") == 2


def test_a_row_that_is_locked_for_a_moment_is_not_forgotten(shop: Shop) -> None:
    """The worker of the last part finds the chord locked by somebody who does not claim it, and waits for it."""
    gate = shop.directory / "gate"
    result = chord([hold.s(2, str(gate))], total.s()).apply_async()
    shop.worker()
    shop.await_line("hold began")
    with psycopg.connect(shop.dsn) as connection:
        connection.execute("SELECT 1 FROM patchpilot.chord FOR UPDATE")
        gate.touch()
        with Database(shop.dsn) as database:
            returned = "SELECT 1 FROM patchpilot.chord_part WHERE state IS NOT NULL"
            until(lambda: database.fetch(returned) != [], seconds=30, what="the last part had returned")
    assert result.get(timeout=30) == 2


def test_a_part_without_a_result_that_has_returned_is_not_run_again(shop: Shop, recovery: Recovery) -> None:
    """Its worker dies before it takes the chord, which somebody has locked, and before the end of the part's message is
    on record: all that tells of its end is the part."""
    result = chord([quiet.s(4)], total.s()).apply_async()
    with psycopg.connect(shop.dsn) as connection, Database(shop.dsn) as database:
        connection.execute("SELECT FROM patchpilot.chord FOR UPDATE")
        worker = shop.worker("-c", "1")
        returned = "SELECT FROM patchpilot.chord_part WHERE state IS NOT NULL"
        until(lambda: database.fetch(returned) != [], seconds=30, what="the part had returned")
        worker.kill()
        assert len(database.fetch("SELECT FROM patchpilot.outbox")) == 1
    await_stuck(recovery)
    assert only(recovery.recover(NOW)).diagnosis == "dispatch-lost"
    shop.worker()
    assert result.get(timeout=30) == 4
    assert recovery.recover(NOW) == ()
    assert shop.ledger() == ["quiet 4", "total 4"]


@counts_in_valkey
def test_recovery_routes_as_the_application_does(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, broker: redis.Redis
) -> None:
    """The queue comes from the application's task_routes, which recovery has never seen."""
    monkeypatch.setitem(app.conf, "task_routes", {total.name: {"queue": "reports", "priority": 6}})
    app.amqp.flush_routes()
    app.amqp.__dict__.pop("router", None)
    try:
        result = chord([add.s(1, 1)], total.s()).apply_async()
    finally:
        monkeypatch.undo()
        app.amqp.flush_routes()
        app.amqp.__dict__.pop("router", None)
    broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
    monkeypatch.setenv("SHOP_LEDGER", str(shop.ledger_file))
    shop.worker()
    await_parts(shop)
    await_stuck(recovery)
    assert only(recovery.recover(NOW)).diagnosis == "part-return-lost"
    assert broker.llen("reports\x06\x166") == 1
