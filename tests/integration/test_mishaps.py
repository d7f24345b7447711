"""Mishaps: sessions on a demoted PostgreSQL, messages that nobody can push, starts on no record."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest
from celery.app.task import Context
from celery.exceptions import Ignore, Reject

from patchpilot.backend import fence as fences
from patchpilot.backend.config import FOLLOWS, MESSAGE_ID
from patchpilot.backend.message import Message
from patchpilot.backend.outbox import Dispatch
from patchpilot.clock import FakeClock
from patchpilot.errors import PatchpilotError, Transient
from patchpilot.lab.launch import free_port
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Finding, Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, app

NOW = Window(min_age=timedelta(0))


def test_a_session_that_leads_to_a_demoted_postgresql_is_left_for_another(migrated: str) -> None:
    with Database(migrated) as database:
        database.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        assert database.execute("UPDATE patchpilot.chord SET shadow = true") == 0


def test_who_asks_again_after_the_whole_budget_is_told_at_once() -> None:
    clock = FakeClock()
    with Database(f"postgresql://u@127.0.0.1:{free_port()}/x", budget=30, clock=clock) as database:
        with pytest.raises(Transient):
            database.execute("SELECT 1")
        waited = clock.monotonic()
        with pytest.raises(Transient):
            database.execute("SELECT 1")
        assert clock.monotonic() == waited
        clock.sleep(31)
        waited = clock.monotonic()
        with pytest.raises(Transient):
            database.execute("SELECT 1")
        assert clock.monotonic() > waited


def test_a_message_that_nobody_can_push_keeps_no_other_from_being_sent_again(shop: Shop) -> None:
    poisoned, lost = add.delay(1, 1), add.delay(2, 2)
    app.backend.client.delete("celery")
    complaints: list[tuple[str, str]] = []

    def complain(finding: Finding, error: PatchpilotError) -> None:
        complaints.append((finding.id, str(error)))

    with Database(shop.dsn) as database:
        poison = b'{"compression": "no such"}'
        database.execute("UPDATE patchpilot.outbox SET properties = %s WHERE task_id = %s", (poison, poisoned.id))
    with Recovery(Site(shop.broker, shop.dsn), complain=complain) as recovery:
        recovery.recover(NOW)
    assert app.backend.client.llen("celery") == 1
    [(complained, why)] = complaints
    assert complained == poisoned.id
    assert "no such" in why
    shop.worker("-c", "1")
    assert lost.get(timeout=60) == 4


def test_in_a_task_only_a_broker_that_is_away_leaves_a_message_to_recovery(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = app.backend.outbox
    messages: list[Message] = []
    monkeypatch.setattr(outbox, "publish", lambda message, _producer: messages.append(message))
    add.delay(1, 1)

    def broken(_message: Message, _producer: object) -> None:
        raise KeyError("no such compression")

    monkeypatch.setattr(Message, "push", broken)
    with app.producer_or_acquire() as producer:
        outbox._write(Dispatch(messages=messages))
        with pytest.raises(KeyError):
            outbox._push(Dispatch(messages=messages), producer, leave=True)
    with Database(shop.dsn) as database:
        assert database.fetch("SELECT 1 FROM patchpilot.outbox") == []


def test_what_runs_elsewhere_and_is_on_no_record_waits_in_its_queue(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the journal nothing would bring the message back, should the other execution die."""
    monkeypatch.setattr(fences, "ASIDE", 0)
    request = Context(id="t", task="add", **{MESSAGE_ID: str(uuid4()), FOLLOWS: "before"})
    fence = app.backend.fence
    fence._begin(request, "before")
    with Database(shop.dsn) as database:  # another machine's, as far as we can tell
        database.execute("UPDATE patchpilot.fence SET worker = %s", (f"{uuid4()}/1",))
    with pytest.raises(Reject) as given_back:
        fence._begin(request, "before")
    assert given_back.value.requeue


def test_a_task_that_was_ended_from_outside_does_not_begin_again(shop: Shop) -> None:
    """A hard time limit kills the process; the worker's own process says that the task has failed."""
    request = Context(id="t", task="add", **{MESSAGE_ID: str(uuid4()), FOLLOWS: "before"})
    fence = app.backend.fence
    fence._begin(request, "before")
    fence.end_for_others(request)
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.fence SET lease_until = now() - interval '1 minute'")
    with pytest.raises(Ignore):
        fence._begin(request, "before")
