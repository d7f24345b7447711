"""What becomes of messages that are on record and cannot be pushed: the caller is told, or recovery pushes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from billiard.exceptions import SoftTimeLimitExceeded
from celery import chain, chord, group
from celery.exceptions import ChordError
from kombu import compression

from patchpilot.backend import outbox as outboxes
from patchpilot.backend.message import Message, Part
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from tests.support.processes import Shop
from tests.support.shop import add, app, hold, total

pytestmark = pytest.mark.backend

WAIT = 60
NOW = Window(min_age=timedelta(0))


def fetch(shop: Shop, sql: str) -> list[tuple[Any, ...]]:
    with Database(shop.dsn) as database:
        return [tuple(row.values()) for row in database.fetch(sql.encode())]


@contextmanager
def one_more_compression() -> Iterator[str]:
    """Some processes know it, and others do not, as it is with those that need a library."""
    compression.register(bytes, bytes, "application/x-more", ["more"])
    try:
        yield "more"
    finally:
        for known, name in (
            (compression._encoders, "application/x-more"),
            (compression._decoders, "application/x-more"),
            (compression._aliases, "more"),
        ):
            del known[name]


def test_a_soft_time_limit_that_strikes_while_a_callback_is_pushed(
    shop: Shop, recovery: Recovery, broker: redis.Redis, tmp_path: Path
) -> None:
    """Its chord is marked as dispatched by then, so nobody would ever build it again. It strikes once: what comes after
    is pushed."""
    gate = tmp_path / "gate"
    part = hold.s(1, str(gate)).set(soft_time_limit=8, ignore_result=True)
    callback = group(total.s(label=queue).set(queue=queue) for queue in ("first", "second"))
    chord([part], callback).apply_async()
    worker = shop.worker("-c", "1")
    shop.await_line("hold began")
    broker.execute_command("CLIENT", "PAUSE", 1000 * WAIT, "WRITE")
    gate.touch()
    until(lambda: "are left to recovery" in worker.output(), seconds=WAIT, what="the limit had struck")
    broker.execute_command("CLIENT", "UNPAUSE")
    assert "SoftTimeLimitExceeded" in worker.output()
    until(lambda: broker.llen("second") == 1, seconds=WAIT, what="the other one was pushed")
    assert broker.llen("first") == 0
    until(
        lambda: f"{hold.name}[" in worker.output().rpartition("succeeded")[0], seconds=WAIT, what="the part had ended"
    )
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["callback-message-lost"]
    shop.worker("-c", "1", "-Q", "first,second")
    for label in ("first", "second"):
        shop.await_line(f"{label} 1")
        assert shop.ledger().count(f"{label} 1") == 1


def test_a_callback_that_recovery_cannot_push_keeps_no_other_from_being_dispatched(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    with one_more_compression() as name:
        for place in range(5):
            callback = total.s(label=f"callback {place}").set(queue="callbacks")
            if place == 2:
                callback.set(compression=name)
            chord([add.s(place, 1)], callback).apply_async()
    broker.delete("celery")
    with Database(shop.dsn) as database:
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("UPDATE patchpilot.chord_part SET state = 'SUCCESS', payload = '1', returned_at = now()")
        for what in ("chord SET created_at", "chord_part SET returned_at"):
            database.execute(f"UPDATE patchpilot.{what} = now() - interval '2 minutes'".encode())
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["dispatch-lost"] * 4
    assert broker.llen("callbacks") == 4
    assert fetch(shop, "SELECT count(*) FROM patchpilot.outbox") == [(4,)]
    with one_more_compression():
        assert [it.diagnosis for it in recovery.recover(NOW)] == ["dispatch-lost"]
    assert broker.llen("callbacks") == 5


def test_a_callback_that_fails_in_the_push_keeps_no_other_from_being_pushed(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that it fails of: by then all of them are marked as dispatched."""
    for place in range(3):
        chord([add.s(place, 1)], total.s(label=str(place)).set(queue=f"callback {place}")).apply_async()
    with Database(shop.dsn) as database:
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("UPDATE patchpilot.chord_part SET state = 'SUCCESS', payload = '1', returned_at = now()")
        for what in ("chord SET created_at", "chord_part SET returned_at"):
            database.execute(f"UPDATE patchpilot.{what} = now() - interval '2 minutes'".encode())
    push = Message.push

    def broken(message: Message, producer: Any) -> None:
        if message.options["routing_key"] == "callback 1":
            raise ArithmeticError
        push(message, producer)

    with monkeypatch.context() as patch:
        patch.setattr(Message, "push", broken)
        assert [it.diagnosis for it in recovery.recover(NOW)] == ["dispatch-lost"] * 3
    assert [broker.llen(f"callback {place}") for place in range(3)] == [1, 0, 1]
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["callback-message-lost"]
    assert [broker.llen(f"callback {place}") for place in range(3)] == [1, 1, 1]


def test_a_chord_fails_with_its_part_if_what_follows_that_cannot_be_pushed_by_anybody(shop: Shop) -> None:
    """Nobody could send it later either, so there the task hears what it hears from Celery."""
    result = chord([chain(add.s(1, 1), add.s(2).set(compression="no such"))], total.s()).apply_async()
    shop.worker("-c", "1")
    until(result.ready, seconds=WAIT, what="the chord had ended")
    assert isinstance(result.result, ChordError)
    until(lambda: fetch(shop, "SELECT FROM patchpilot.outbox") == [], seconds=WAIT, what="nothing is left to be sent")


def test_a_chord_whose_callback_nobody_can_publish_ends_as_with_celery(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """In recovery, which has none of the application's code, it stays as it is."""
    chord([add.s(1, 1)], total.s().set(expires="one of these days")).apply_async()
    chords = "SELECT group_id, task_id, callback_id FROM patchpilot.chord JOIN patchpilot.chord_part USING (group_id)"
    [(group_id, task_id, callback_id)] = fetch(shop, chords)
    app.backend.chords.return_part(Part(group_id, task_id, 0), "SUCCESS", 2)
    message = broker.lpop("celery")
    with Database(shop.dsn) as database:
        database.execute("DELETE FROM patchpilot.outbox")
        for what in ("chord SET created_at", "chord_part SET returned_at"):
            database.execute(f"UPDATE patchpilot.{what} = now() - interval '2 minutes'".encode())
    assert recovery.recover(NOW) == ()
    assert fetch(shop, "SELECT state::text FROM patchpilot.chord") == [("open",)]
    broker.lpush("celery", message)
    shop.worker("-c", "1")
    callback = app.AsyncResult(callback_id)
    until(callback.ready, seconds=WAIT, what="the chord had ended")
    assert isinstance(callback.result, ChordError)
    assert "Callback error" in str(callback.result)


def interrupted_in_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    push, pushed = Message.push, []

    def second_time(message: Message, producer: Any) -> None:
        pushed.append(message)
        if len(pushed) == 2:
            raise KeyboardInterrupt
        push(message, producer)

    monkeypatch.setattr(Message, "push", second_time)


def interrupted_in_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the commit, and before anybody heard of it."""
    run, written = app.backend.outbox._run, []

    def first_time(work: Any) -> object:
        written.append(run(work))
        if len(written) == 1:
            raise KeyboardInterrupt
        return written[-1]

    monkeypatch.setattr(app.backend.outbox, "_run", first_time)


@pytest.mark.parametrize(
    ("interrupt", "pushed"), [(interrupted_in_the_broker, 1), (interrupted_in_postgresql, 0)], ids=["broker", "record"]
)
def test_nobody_sends_later_what_its_caller_has_interrupted(
    shop: Shop,
    recovery: Recovery,
    broker: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[[pytest.MonkeyPatch], None],
    pushed: int,
) -> None:
    with monkeypatch.context() as meanwhile:
        interrupt(meanwhile)
        with pytest.raises(KeyboardInterrupt):
            chord([add.s(place, 1) for place in range(3)], total.s()).apply_async()
    assert fetch(shop, "SELECT state::text, publish_error FROM patchpilot.chord") == [("open", "KeyboardInterrupt")]
    assert fetch(shop, "SELECT count(*) FROM patchpilot.outbox") == [(pushed,)]
    assert recovery.recover(NOW) == ()
    assert broker.llen("celery") == pushed


def test_a_limit_that_strikes_while_it_is_said_that_a_push_goes_on_keeps_nothing_from_being_pushed(
    shop: Shop, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, messages, struck = app.backend.outbox, list[Message](), [SoftTimeLimitExceeded()]
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "publish", lambda message, _producer: messages.append(message))
        for number in range(3):
            add.delay(number, number)

    def strikes_once(_: object) -> None:
        if struck:
            raise struck.pop()

    monkeypatch.setattr(outboxes, "SLOW", -1)
    monkeypatch.setattr(outbox, "_go_on", strikes_once)
    with app.producer_or_acquire() as producer, pytest.raises(SoftTimeLimitExceeded):
        outbox._push_or_leave(messages, producer)
    assert broker.llen("celery") == 3
