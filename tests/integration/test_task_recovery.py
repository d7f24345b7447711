"""Tasks: which of them are lost, and which only look like it. On real servers."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import chain, chord
from celery.exceptions import ChordError
from kombu import Exchange, Queue

from patchpilot.clock import SYSTEM
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Finding, Recovery, Window
from patchpilot.recovery.findings import Kind
from patchpilot.recovery.inventory import life
from patchpilot.recovery.quiet import Outside
from patchpilot.recovery.remedy import Remedies
from tests.support.processes import Shop
from tests.support.shop import add, app, hold, later, mourn, note, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))
HOUR = 3600


def ids(broker: redis.Redis, key: str) -> list[str]:
    """The tasks whose messages are in a list, the next in turn first."""
    return [json.loads(raw)["headers"]["id"] for raw in reversed(broker.lrange(key, 0, -1))]


def told(findings: tuple[Finding, ...]) -> list[tuple[str, str, bool]]:
    return [(it.id, it.diagnosis, it.curable) for it in findings]


def test_what_waits_is_not_lost(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """For its time, for a free hand, for its turn, for its retry: however long, nothing of it is touched."""
    gate = shop.directory / "gate"
    running = hold.apply_async((1, str(gate)))
    shop.worker("-c", "1", SHOP_SETTINGS='{"worker_prefetch_multiplier": 2}')
    shop.await_line("hold began")
    waiting = [
        add.apply_async((1, 1), countdown=HOUR),
        add.apply_async((1, 2), eta=SYSTEM.now() + timedelta(days=1)),
        add.apply_async((1, 3), priority=9),
        *[add.apply_async((2, i)) for i in range(4)],
    ]
    until(lambda: broker.hlen("unacked") >= 3, seconds=30, what="the worker took what waits for its time")
    # By the clock of a worker that is a day ahead.
    [tag] = [tag for tag, raw in broker.hgetall("unacked").items() if waiting[0].id in raw.decode()]
    broker.zincrby("unacked_index", 86400, tag)
    with Database(shop.dsn) as database:  # a month old, too
        database.execute("UPDATE patchpilot.outbox SET sent_at = sent_at - interval '30 days'")
    assert recovery.sweep(Window(timedelta(0), timedelta(days=60))).applied == ()
    assert recovery.survey(Window(timedelta(0), timedelta(days=60))) == ()
    gate.touch()
    assert running.get(timeout=30) == 1
    for result in waiting[2:]:
        result.get(timeout=30)
    assert recovery.sweep(Window(timedelta(0), timedelta(days=60))).applied == ()
    assert sorted(shop.ledger()) == sorted(["hold began", "hold ended", "add 1 3", *(f"add 2 {i}" for i in range(4))])


@pytest.mark.parametrize("prefix", ["", "shop:"], indirect=True)
def test_a_message_is_looked_for_where_it_was_sent_and_goes_back_there(
    shop: Shop, recovery: Recovery, broker: redis.Redis, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By priority, in a queue of its own, through a topic exchange, under a prefix."""
    monkeypatch.setitem(app.conf, "broker_transport_options", {"global_keyprefix": prefix} if prefix else {})
    topic = Queue("news", Exchange("papers", type="topic"), routing_key="news.#")
    results = {
        "celery": add.apply_async((1, 1)),
        "celery\x06\x166": add.apply_async((1, 2), priority=6),
        "celery\x06\x169": add.apply_async((1, 3), priority=9),
        "slow lane": add.apply_async((1, 4), queue="slow lane"),
        "slow lane\x06\x163": add.apply_async((1, 5), queue="slow lane", priority=3, countdown=HOUR),
        "news": add.apply_async((1, 6), queue=topic, routing_key="news.today"),
        "direct": add.apply_async((1, 7), routing_key="direct", exchange=Exchange("")),
    }
    places = {f"{prefix}{place}": [result.id] for place, result in results.items()}
    assert {place: ids(broker, place) for place in places} == places
    assert recovery.survey(NOW) == ()
    for place in places:
        broker.delete(place)
    assert sorted(told(recovery.survey(NOW))) == sorted((it.id, "message-lost", True) for it in results.values())
    assert len(recovery.recover(NOW)) == len(places)
    assert {place: ids(broker, place) for place in places} == places
    assert recovery.survey(NOW) == ()


def test_expired_and_revoked_tasks_do_not_come_back(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """A worker knows what is revoked only by itself, unless it wrote that down because it met the task."""
    shop.worker("-c", "1")
    revoked = str(uuid4())
    app.control.revoke(revoked)
    known = app.control.inspect(timeout=1)
    until(lambda: revoked in str(known.revoked()), seconds=30, what="the worker heard of it")
    add.apply_async((1, 1), task_id=revoked, queue="elsewhere")
    expired = add.apply_async((1, 2), queue="elsewhere", expires=SYSTEM.now() - timedelta(seconds=1)).id
    lost = add.apply_async((1, 3), queue="elsewhere").id
    broker.delete("elsewhere")
    assert sorted(told(recovery.survey(NOW))) == sorted([
        (revoked, "revoked", False), (expired, "expired", False), (lost, "message-lost", True),
    ])  # fmt: skip
    assert [it.id for it in recovery.recover(NOW)] == [lost]
    assert ids(broker, "elsewhere") == [lost]


def doomed(**options: object) -> Any:
    """A header task of which the message is lost, and which nobody wants any more when it is looked for."""
    return add.s(1, 1).set(queue="elsewhere", **{"expires": SYSTEM.now() - timedelta(seconds=1), **options})


def test_a_chord_does_not_wait_for_what_has_expired_or_was_revoked(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """It fails, as if a worker had met these messages; what else of its header was lost is sent again."""
    worker, revoked = shop.worker("-c", "1"), str(uuid4())
    app.control.revoke(revoked)
    until(lambda: revoked in str(app.control.inspect(timeout=1).revoked()), seconds=30, what="the worker heard of it")
    header = [doomed(), doomed(task_id=revoked, expires=None), add.s(2, 2).set(queue="elsewhere")]
    failing = chord(header, total.s().on_error(mourn.s())).apply_async()
    expired, _, wanted = (result.id for result in failing.parent.results)
    endless = chord([chain(doomed(), add.s(1)), add.s(3, 3)], total.s()).apply_async()
    broker.delete("elsewhere")
    until(lambda: endless.parent.results[1].ready(), seconds=30, what="the rest of it had run, and was on record")
    assert sorted(told(recovery.survey(NOW))) == sorted([
        (failing.parent.id, "header-expired", True), (endless.parent.id, "chain-expired", False),
    ])  # fmt: skip
    applied = recovery.recover(NOW)
    assert [(it.id, it.remedy) for it in applied] == [
        (failing.parent.id, "revoke-part"),
        (failing.parent.id, "republish"),
    ]
    assert ids(broker, "elsewhere") == [wanted]
    assert [app.AsyncResult(it).state for it in (expired, revoked, wanted)] == ["REVOKED", "REVOKED", "PENDING"]
    worker.stop()
    shop.worker("-c", "1", "-Q", "celery,elsewhere")
    shop.await_line("add 2 2")
    until(lambda: failing.state == "FAILURE", seconds=30, what="the chord failed")
    assert isinstance(failing.result, ChordError)
    assert f"{expired} raised TaskRevokedError('expired'" in str(failing.result)
    until(lambda: any("mourn ChordError" in line for line in shop.ledger()), seconds=30, what="its errback was called")
    assert told(recovery.survey(NOW)) == [(endless.parent.id, "chain-expired", False)]


def test_a_task_that_is_in_a_header_twice_and_has_expired_is_ended_at_each_place(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """Both of its messages at once; or one, where the other has run: its result stays, and does not stand for both."""
    same, again = doomed(), add.s(2, 2).set(queue="elsewhere", expires=3600)
    same.freeze()
    again.freeze()
    failing = chord([same, same], total.s()).apply_async()
    broker.delete("elsewhere")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["header-expired"]
    assert failing.state == "FAILURE"
    half = chord([again, again], note.s(label="half").on_error(mourn.s())).apply_async()
    broker.lpop("elsewhere")
    shop.worker("-c", "1", "-Q", "celery,elsewhere")
    with Database(shop.dsn) as database:
        left = "SELECT count(*) AS count FROM patchpilot.outbox WHERE group_id IS NOT NULL"
        until(lambda: database.fetch(left) == [{"count": 1}], seconds=30, what="the first had run")
        database.execute("UPDATE patchpilot.outbox SET expires = now()")
    assert [(it.id, it.diagnosis) for it in recovery.recover(NOW)] == [(half.parent.id, "header-expired")]
    assert half.state == "FAILURE"
    assert app.AsyncResult(again.id).state == "SUCCESS"
    until(lambda: any("mourn ChordError" in line for line in shop.ledger()), seconds=30, what="its errback was called")
    until(lambda: recovery.survey(NOW) == (), seconds=30, what="there was nothing left to find")
    assert not [line for line in shop.ledger() if line.startswith("half")]


def test_of_a_task_that_is_in_a_header_twice_only_the_part_of_the_expired_message_is_ended(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    same = str(uuid4())
    header = [doomed(task_id=same), add.s(2, 2).set(task_id=same), doomed(task_id=same, argsrepr="\0")]
    waiting = chord(header, total.s()).apply_async()
    broker.delete("elsewhere")
    [applied] = recovery.recover(NOW)
    assert (applied.id, applied.remedy) == (waiting.parent.id, "revoke-part")
    with Database(shop.dsn) as database:
        parts = database.fetch("SELECT state FROM patchpilot.chord_part ORDER BY position")
        assert [part["state"] for part in parts] == ["REVOKED", None, "REVOKED"]
    assert recovery.survey(NOW) == ()
    shop.worker("-c", "1")
    until(lambda: waiting.state == "FAILURE", seconds=30, what="the chord failed when the other task had run")
    assert shop.ledger() == ["add 2 2"]


def test_a_part_whose_number_is_not_its_place_is_ended_as_a_worker_would_return_it(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """Celery numbers anew in groups that a generator of a header produces."""
    same = str(uuid4())
    chord([add.s(2, 2), doomed(task_id=same), add.s(1, 1).set(task_id=same)], total.s()).apply_async()
    broker.delete("elsewhere")
    with Database(shop.dsn) as database:
        database.execute(
            """UPDATE patchpilot.outbox SET headers = convert_to(
                   replace(convert_from(headers, 'UTF8'), '"group_index": 1', '"group_index": 0'), 'UTF8')"""
        )
        assert [it.diagnosis for it in recovery.recover(NOW)] == ["header-expired"]
        parts = database.fetch("SELECT state FROM patchpilot.chord_part ORDER BY position")
    assert [part["state"] for part in parts] == [None, "REVOKED", "REVOKED"]


def test_a_frozen_chord_that_is_sent_again_does_not_wait_for_what_has_expired(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """The success of its task is that of the first time."""
    worker = shop.worker("-c", "1")
    task = add.s(1, 1)
    canvas = chord([task], total.s())
    canvas.freeze()
    assert canvas.apply_async().get(timeout=30) == 2
    worker.stop()
    again = canvas.apply_async()
    broker.delete("celery")
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.outbox SET expires = now()")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["header-expired"]
    assert recovery.survey(NOW) == ()
    assert again.parent.results[0].state == "REVOKED"


def test_a_recovery_that_dies_while_it_ends_a_part_leaves_it_to_the_next(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = chord([doomed()], total.s()).apply_async()
    broker.delete("elsewhere")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Remedies, "_record_parts", die)
        with pytest.raises(KeyboardInterrupt):
            recovery.recover(NOW)
    assert waiting.parent.results[0].state == "REVOKED"
    until(lambda: told(recovery.survey(NOW)) != [], seconds=30, what="its part was on record for a while")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["error-path-lost"]
    assert waiting.state == "FAILURE"
    assert recovery.survey(NOW) == ()


def test_what_somebody_sends_again_meanwhile_is_not_ended(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = chord([doomed()], total.s()).apply_async()
    broker.delete("elsewhere")
    revoke = Remedies._revoke

    def late(self: Remedies, *args: Any) -> set[str]:
        with Database(shop.dsn) as database:
            database.execute("UPDATE patchpilot.outbox SET resends = resends + 1")
        return revoke(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Remedies, "_revoke", late)
        assert recovery.recover(NOW) == ()
    assert waiting.parent.results[0].state == "PENDING"
    assert [it.remedy for it in recovery.recover(NOW)] == ["revoke-part"]
    assert waiting.state == "FAILURE"
    with Database(shop.dsn) as database:
        assert (
            life(database, waiting.parent.id).why == "1 of 1 parts failed; it has no errbacks, so nothing ran instead"
        )


def test_of_a_queue_that_a_worker_without_patchpilot_consumes_nothing_is_called_lost(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """It leaves no sign of what it runs or has run. What it runs now it says; the rest it may have ended."""
    gate = shop.directory / "gate"
    shop.worker("-c", "1", SHOP_STOCK="1", SHOP_BACKEND=shop.broker)
    hold.apply_async((1, str(gate)))
    add.apply_async((1, 1), countdown=HOUR)
    shop.await_line("hold began")
    until(lambda: broker.hlen("unacked") == 1, seconds=30, what="the other one waits for its time")
    assert recovery.survey(NOW) == ()
    here, there = add.apply_async((2, 2)).id, add.apply_async((3, 3), queue="elsewhere").id
    until(lambda: broker.llen("celery") + broker.hlen("unacked") == 2, seconds=30, what="it was sent")
    broker.delete("celery")
    if broker.hlen("unacked") == 2:  # it was taken; the stock worker acknowledges it when it begins
        gate.touch()
        shop.await_line("add 2 2")
    broker.delete("elsewhere")
    assert (there, "message-lost", True) in told(recovery.survey(NOW))
    assert (here, "unknown", False) in told(recovery.survey(NOW))
    assert [it.id for it in recovery.recover(NOW)] == [there]
    gate.touch()


def test_a_worker_without_patchpilot_that_does_not_answer_may_have_anything(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """Nobody has heard of it, but the broker counts who listens."""
    gate = shop.directory / "gate"
    worker = shop.worker("--pool", "solo", SHOP_STOCK="1", SHOP_BACKEND=shop.broker)
    running = hold.apply_async((1, str(gate)))
    shop.await_line("hold began")
    assert told(recovery.survey(NOW)) == [(running.id, "unknown", False)]
    assert recovery.recover(NOW) == ()
    worker.kill()
    until(lambda: [it.curable for it in recovery.survey(NOW)] == [True], seconds=60, what="it is gone")


def test_a_message_that_a_worker_has_been_sent_and_has_not_read_is_not_lost(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """The worker asked for a message while its hands were free. Then a task's time came; then the message did."""
    shop.worker("-c", "1", SHOP_ACKS_LATE="1")
    for number in range(20):
        gate, label = shop.directory / f"gate{number}", f"hold{number}"
        hold.apply_async((1, str(gate), label), countdown=1.5)
        shop.await_line(f"{label} began")
        sent = add.apply_async((number, 1))
        # In no queue, and not unacknowledged either: popped, and in the worker's socket. If not, its turn was over.
        unread = broker.llen("celery") == 0 and sent.id not in str(broker.hvals("unacked"))
        if unread:
            assert recovery.recover(NOW) == ()
            assert sent.id not in str(broker.hvals("unacked")), "it was read meanwhile"
        gate.touch()
        assert sent.get(timeout=30) == number + 1
        if unread:
            assert shop.ledger().count(f"add {number} 1") == 1
            return
    raise AssertionError("a message never came at the right moment")


def test_a_retry_that_was_lost_is_sent_again_as_the_attempt_that_it_is(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    result = later.apply_async(("once", HOUR))
    worker = shop.worker("-c", "1", SHOP_ACKS_LATE="1")
    shop.await_line("once 0")
    until(lambda: broker.hlen("unacked") == 1, seconds=30, what="the worker took the retry")
    assert recovery.survey(NOW) == ()
    worker.kill()
    for key in ("unacked", "unacked_index", "celery"):
        broker.delete(key)
    assert told(recovery.survey(NOW)) == [(result.id, "message-lost", True)]
    recovery.recover(NOW)
    [raw] = broker.lrange("celery", 0, -1)
    headers = json.loads(raw)["headers"]
    assert (headers["id"], headers["retries"]) == (result.id, 1)
    assert headers["eta"] is not None


def test_what_somebody_takes_meanwhile_is_not_put_back(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """Between the look and the remedy the message was restored and taken again, under the tag that it had."""
    gate = shop.directory / "gate"
    hold.apply_async((1, str(gate)))
    worker = shop.worker("-c", "1", SHOP_ACKS_LATE="1")
    shop.await_line("hold began")
    worker.kill()
    assert [it.diagnosis for it in recovery.survey(NOW)] == ["abandoned"]
    requeue = Remedies._requeue

    def late(self: Remedies, *args: object) -> list[str]:
        for tag in broker.zrange("unacked_index", 0, -1):
            broker.zincrby("unacked_index", 1, tag)
        return requeue(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remedies, "_requeue", late)
        assert recovery.recover(NOW) == ()
    assert (broker.llen("celery"), broker.hlen("unacked")) == (0, 1)
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["abandoned"]
    assert (broker.llen("celery"), broker.hlen("unacked")) == (1, 0)


def test_only_one_kind_at_a_time(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    finished = chord([add.s(1, 1)], total.s().set(queue="callbacks")).apply_async()
    shop.worker("-c", "1")
    until(lambda: broker.llen("callbacks") == 1, seconds=30, what="the callback was queued")
    stuck = chord([add.s(2, 2).set(queue="parts")], total.s()).apply_async()
    task = add.apply_async((3, 3), queue="tasks")
    for queue in ("callbacks", "parts", "tasks"):
        broker.delete(queue)
    expected: dict[Kind, tuple[str, str]] = {
        "chord": (stuck.parent.id, "parts"), "callback": (finished.parent.id, "callbacks"), "task": (task.id, "tasks"),
    }  # fmt: skip
    for kind, (subject, queue) in expected.items():
        assert [(it.kind, it.id) for it in recovery.sweep(NOW, only=[kind]).applied] == [(kind, subject)]
        assert broker.llen(queue) == 1
    assert recovery.survey(NOW) == ()


def test_what_waits_for_its_time_is_too_old_only_a_while_after_it(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """In a chord and outside of one. Until then its loss is made good, however long ago it was sent."""
    one = add.apply_async((1, 1), countdown=72 * HOUR)
    waiting = chord([add.s(2, 2).set(countdown=72 * HOUR)], total.s()).apply_async()
    broker.delete("celery")
    with Database(shop.dsn) as database:
        young = recovery.sweep(Window()).quiet
        assert (young.outside, young.messages_outside) == (Outside(young=1), Outside(young=2))

        database.execute("UPDATE patchpilot.outbox SET sent_at = now() - interval '2 d', eta = now() - interval '25 h'")
        database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '2 d'")
        old = recovery.sweep(Window())
        assert (old.findings, old.quiet.outside, old.quiet.messages_outside) == ((), Outside(old=1), Outside(old=2))

        database.execute("UPDATE patchpilot.outbox SET eta = now() - interval '23 h' WHERE group_id IS NULL")
        database.execute("UPDATE patchpilot.outbox SET eta = now() + interval '42 h' WHERE group_id IS NOT NULL")
        found = recovery.sweep(Window())
    assert sorted((it.id, it.diagnosis) for it in found.applied) == sorted([
        (waiting.parent.id, "header-message-lost"), (one.id, "message-lost"),
    ])  # fmt: skip
    assert (found.quiet.outside, found.quiet.messages_outside) == (Outside(), Outside())
    assert sorted(ids(broker, "celery")) == sorted([one.id, waiting.parent.results[0].id])
