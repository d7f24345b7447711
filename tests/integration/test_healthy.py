"""What is healthy is never touched, whatever else is wrong: old, slow, frozen, or with a server that is away."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from celery import chord, group

from patchpilot.backend import outbox as outboxes
from patchpilot.backend.message import Message, Part
from patchpilot.clock import SYSTEM
from patchpilot.errors import Transient
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Applied, Recovery, Site, Window
from patchpilot.recovery.evidence import Collector
from patchpilot.workers.asking import Asking
from patchpilot.workers.contact import Contact
from tests.conftest import shop_on
from tests.support.processes import Shop
from tests.support.shop import add, app, hold, note, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


@pytest.fixture
def recovery(shop: Shop) -> Iterator[Recovery]:
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=60)) as opened:
        yield opened


def test_a_frozen_worker_keeps_what_it_has(shop: Shop, recovery: Recovery) -> None:
    gate = shop.directory / "gate"
    result = chord([hold.s(1, str(gate)), add.s(1, 1)], total.s()).apply_async()
    worker = shop.worker("-c", "1", SHOP_ACKS_LATE="1")
    shop.await_line("hold began")
    os.killpg(worker.process.pid, signal.SIGSTOP)
    try:
        sweep = recovery.sweep(NOW)
        assert sweep.applied == ()
        assert {it.diagnosis for it in sweep.findings} == {"unknown"}
        [why] = {it.reason for it in sweep.findings}
        assert worker.name in why
        assert "more that listen" not in why, "one that is known to live was counted as a stranger as well"
    finally:
        os.killpg(worker.process.pid, signal.SIGCONT)
    until(lambda: recovery.survey(NOW) == (), seconds=60, what="the worker answered")
    gate.touch()
    assert result.get(timeout=30) == 3
    assert sorted(shop.ledger()) == ["add 1 1", "hold began", "hold ended", "total 3"]


@pytest.mark.parametrize("lives", [True, False], ids=["lives", "dead"])
def test_a_worker_that_could_not_give_a_sign_of_life_is_given_the_time_to(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, *, lives: bool
) -> None:
    """As an outage of PostgreSQL leaves it, for whoever recovers as soon as that is over. Nor can it be asked."""
    gate = shop.directory / "gate"
    result = hold.s(3, str(gate)).apply_async()
    worker = shop.worker("-c", "1", SHOP_SETTINGS=json.dumps({"worker_enable_remote_control": False}))
    shop.await_line("hold began")
    os.killpg(worker.process.pid, signal.SIGSTOP)
    owed, waited = Contact.owed, []

    def go_on(self: Contact, silent: Mapping[str, datetime]) -> set[str]:
        if found := owed(self, silent):
            waited.append(found)
            os.killpg(worker.process.pid, signal.SIGCONT if lives else signal.SIGKILL)
        return found

    try:
        with Database(shop.dsn) as database, monkeypatch.context() as patch:
            database.execute("UPDATE patchpilot.worker SET seen_at = now() - interval '1 hour'")
            patch.setattr(Contact, "owed", go_on)
            sweep = recovery.sweep(NOW)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGCONT)
    assert waited
    assert [(it.id, it.diagnosis) for it in sweep.findings] == [(result.id, "unknown" if lives else "message-lost")]
    assert len(sweep.applied) == (not lives)
    gate.touch()
    assert not lives or result.get(timeout=30) == 3


def test_a_long_task_is_at_work_for_as_long_as_its_worker_lives(shop: Shop, recovery: Recovery) -> None:
    """Its message is a month old, acknowledged, and in no queue. The chord is as old as its last progress."""
    gate = shop.directory / "gate"
    result = chord([hold.s(1, str(gate)), add.s(1, 1)], total.s()).apply_async()
    shop.worker("-c", "2")
    shop.await_line("hold began")
    with Database(shop.dsn) as database:
        until(
            lambda: database.fetch("SELECT 1 FROM patchpilot.chord_part WHERE state IS NOT NULL") != [],
            seconds=30, what="one part returned",
        )  # fmt: skip
        for column in ("outbox SET sent_at = sent_at", "chord SET created_at = created_at"):
            database.execute(f"UPDATE patchpilot.{column} - interval '30 days'")  # type: ignore[arg-type]
        wide = Window(timedelta(0), timedelta(days=60))
        assert recovery.sweep(wide).applied == recovery.survey(wide) == ()
        gate.touch()
        assert result.get(timeout=30) == 3
        assert recovery.sweep(wide).applied == ()


def test_a_worker_that_is_about_to_finish_a_chord_is_left_to_it(shop: Shop, recovery: Recovery) -> None:
    """PostgreSQL keeps it waiting: its last part is in, the task still runs, and the callback is not claimed."""
    result = chord([add.s(1, 1)], total.s()).apply_async()
    with psycopg.connect(shop.dsn) as connection, Database(shop.dsn) as database:
        connection.execute("SELECT 1 FROM patchpilot.chord FOR UPDATE")
        worker = shop.worker("-c", "1", SHOP_CLAIM_LEASE="300")
        returned = "SELECT 1 FROM patchpilot.chord_part WHERE returned_at < now() - interval '5 seconds'"
        until(lambda: database.fetch(returned) != [], seconds=30, what="its last part was in for a while")
        assert recovery.sweep(NOW).applied == recovery.survey(NOW) == ()
        worker.kill()
        alive = "SELECT 1 FROM patchpilot.worker WHERE seen_at > now() - interval '4 seconds'"
        until(lambda: database.fetch(alive) == [], seconds=30, what="the worker is not heard of any more")
        with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as other:
            [found] = other.survey(NOW)
            assert (found.id, found.diagnosis) == (result.parent.id, "dispatch-lost")


def test_while_postgresql_is_slow_nothing_is_touched(shop: Shop, recovery: Recovery) -> None:
    gate = shop.directory / "gate"
    result = chord([hold.s(1, str(gate)), add.s(1, 1)], total.s()).apply_async()
    shop.worker("-c", "1")
    shop.await_line("hold began")
    applied: list[tuple[Applied, ...]] = []
    with psycopg.connect(shop.dsn) as connection:
        connection.execute("LOCK TABLE patchpilot.outbox, patchpilot.chord_part IN ACCESS EXCLUSIVE MODE")
        sweeping = threading.Thread(target=lambda: applied.append(recovery.recover(NOW)))
        sweeping.start()
        gate.touch()
        shop.await_line("hold ended")
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' HAVING count(*) >= 2"
        with Database(shop.dsn) as database:
            until(lambda: database.fetch(waiting) != [], seconds=30, what="the worker and recovery wait for it")
    sweeping.join()
    assert applied == [()]
    assert result.get(timeout=30) == 3
    assert recovery.recover(NOW) == ()
    assert shop.ledger().count("total 3") == 1


def test_a_header_that_is_being_pushed_is_left_to_its_producer(shop: Shop, recovery: Recovery) -> None:
    """Written down as a whole, and then pushed one by one: the last of it is in nobody's hands for as long as that."""
    pushed, went_on = threading.Event(), threading.Event()
    push = Message.push

    def slowly(self: Message, producer: object) -> None:
        push(self, producer)
        pushed.set()
        SYSTEM.wait(went_on, 0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Message, "push", slowly)
        header = [add.s(i, i) for i in range(100)]
        producing = threading.Thread(target=chord(header, total.s()).apply_async)
        producing.start()
        pushed.wait(30)
        assert recovery.recover(NOW) == ()
        went_on.set()
        producing.join()
    shop.worker("-c", "2")
    shop.await_line("total 9900")
    assert recovery.recover(NOW) == ()
    assert len([line for line in shop.ledger() if line.startswith("add ")]) == 100


def test_a_header_that_is_being_pushed_to_workers_that_take_it_at_once_is_left_to_its_producer(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pushed while recovery looks is with a worker before it looks again, and acknowledged."""
    went_on = threading.Semaphore(0)
    push, ask = Message.push, Asking.ask

    def step_by_step(self: Message, producer: object) -> None:
        went_on.acquire(timeout=30)
        push(self, producer)

    def after_a_step(self: Asking, *args: object, **options: object) -> object:
        went_on.release()
        shop.await_line("second began")
        return ask(self, *args, **options)  # type: ignore[arg-type]

    gate = shop.directory / "gate"
    labels = ("first", "second", "third", "fourth")
    shop.worker("-c", "4")
    header = chord([hold.s(1, str(gate), label=label) for label in labels], total.s())
    with monkeypatch.context() as patch:
        patch.setattr(Message, "push", step_by_step)
        producing = threading.Thread(target=header.apply_async)
        producing.start()
        went_on.release()
        shop.await_line("first began")
        patch.setattr(Asking, "ask", after_a_step)
        found = recovery.recover(NOW)
        went_on.release(2)
        producing.join()
    gate.touch()
    shop.await_line("total 4")
    assert found == ()
    assert [shop.ledger().count(f"{label} began") for label in labels] == [1] * 4


@pytest.mark.parametrize("late", [False, True], ids=["before it looks", "while it looks"])
def test_a_header_that_is_pushed_for_longer_than_recovery_leaves_things_alone_is_left_to_its_producer(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """And no part returns meanwhile. Whoever pushes says every two seconds that it goes on; here, with each message."""
    monkeypatch.setattr(outboxes, "SLOW", -1)
    went_on, begun = threading.Semaphore(0), list[Message]()
    push, look = Message.push, Collector._locate

    def step_by_step(self: Message, producer: object) -> None:
        begun.append(self)
        went_on.acquire(timeout=30)
        push(self, producer)

    def a_step(count: int) -> None:
        went_on.release()
        until(lambda: len(begun) > count, seconds=30, what="one more was pushed")

    def and_then_a_step(self: Collector, *arguments: Any) -> object:
        found = look(self, *arguments)
        a_step(2)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Message, "push", step_by_step)
        producing = threading.Thread(target=chord([add.s(n, n) for n in range(4)], total.s()).apply_async)
        producing.start()
        a_step(1)
        with Database(shop.dsn) as database:  # all but the one whose turn it is
            database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 hour'")
            waiting = "UPDATE patchpilot.outbox SET sent_at = now() - interval '1 hour' WHERE message_id <> %s"
            database.execute(waiting, (begun[-1].id,))
        if late:
            patch.setattr(Collector, "_locate", and_then_a_step)
        else:
            a_step(2)
        found = recovery.recover(Window(min_age=timedelta(minutes=1)))
        went_on.release(2)
        producing.join()
    assert found == ()
    assert broker.llen("celery") == 4


def test_a_header_whose_pushed_tasks_end_between_two_looks_is_left_to_its_producer(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were nowhere in the first look, and there is nothing to be seen of them in the second."""
    went_on = threading.Semaphore(0)
    push, ask = Message.push, Asking.ask

    def step_by_step(self: Message, producer: object) -> None:
        went_on.acquire(timeout=30)
        push(self, producer)

    def after_a_step(self: Asking, *args: object, **options: object) -> object:
        answers = ask(self, *args, **options)  # type: ignore[arg-type]
        went_on.release()
        until(lambda: left() == 2, seconds=30, what="a task has come and gone")
        return answers

    def left() -> int:
        return len(database.fetch("SELECT 1 FROM patchpilot.outbox"))

    shop.worker("-c", "1")
    with Database(shop.dsn) as database, monkeypatch.context() as patch:
        patch.setattr(Message, "push", step_by_step)
        header = chord([add.s(number, 0) for number in range(3)], total.s())
        producing = threading.Thread(target=header.apply_async)
        producing.start()
        until(lambda: left() == 3, seconds=30, what="it is written down")
        patch.setattr(Asking, "ask", after_a_step)
        found = recovery.recover(NOW)
        went_on.release(2)
        producing.join()
    shop.await_line("total 3")
    assert found == ()


def test_a_callback_that_is_a_group_is_left_to_who_dispatches_it(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = threading.Semaphore(0)
    push, ask = Message.push, Asking.ask

    def step_by_step(self: Message, producer: object) -> None:
        went_on.acquire(timeout=30)
        push(self, producer)

    def after_a_step(self: Asking, *args: object, **options: object) -> object:
        answers = ask(self, *args, **options)  # type: ignore[arg-type]
        went_on.release()
        until(lambda: broker.llen("celery") == 1, seconds=30, what="the first of it is queued")
        return answers

    body = group(note.s(label=label) for label in "abc")
    [part] = (header := chord([add.s(1, 1)], body).apply_async().parent).results
    broker.delete("celery")
    app.backend.store_result(part.id, 2, "SUCCESS")
    app.backend.chords.return_part(Part(header.id, part.id, 0), "SUCCESS", 2)
    with Database(shop.dsn) as database, monkeypatch.context() as patch:
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 min'")
        database.execute("UPDATE patchpilot.chord_part SET returned_at = now() - interval '1 min'")
        patch.setattr(Message, "push", step_by_step)
        dispatching = threading.Thread(target=recover_beside, args=(shop,))
        dispatching.start()
        written = "SELECT 1 FROM patchpilot.outbox"
        until(lambda: len(database.fetch(written)) == 3, seconds=30, what="it is written down")
        patch.setattr(Asking, "ask", after_a_step)
        found = recovery.recover(NOW)
        went_on.release(2)
        dispatching.join()
    assert found == ()
    assert broker.llen("celery") == 3


def recover_beside(shop: Shop) -> None:
    with Recovery(Site(shop.broker, shop.dsn)) as other:
        other.recover(NOW)


def test_if_the_broker_goes_away_between_the_two_looks_nothing_is_touched(
    lab_roster: Roster, tmp_path: Path, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ValkeyNode("goes-away", tmp_path, roster=lab_roster)
    node.start()
    ask = Asking.ask

    def late(self: Asking, *args: object, **options: object) -> object:
        answers = ask(self, *args, **options)  # type: ignore[arg-type]
        node.stop()
        return answers

    with (
        shop_on(lab_roster, tmp_path, node.url, migrated, monkeypatch) as shop,
        Recovery(Site(shop.broker, shop.dsn)) as recovery,
    ):
        result = add.apply_async((1, 1), ignore_result=True)
        node.ask(lambda client: client.delete("celery"))
        assert [it.id for it in recovery.survey(NOW)] == [result.id]
        monkeypatch.setattr(Asking, "ask", late)
        with pytest.raises(Transient, match="cannot be read"):
            recovery.recover(NOW)
        with Database(shop.dsn) as database:
            assert database.fetch("SELECT 1 FROM patchpilot.remedy") == []
            assert database.fetch("SELECT resends FROM patchpilot.outbox") == [{"resends": 0}]
