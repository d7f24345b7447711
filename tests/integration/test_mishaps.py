"""Mishaps: sessions on a demoted PostgreSQL, messages that nobody can push, starts on no record."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import FrameType
from uuid import uuid4

import pytest
from celery import chord
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from redis.exceptions import ConnectionError as RedisConnectionError

from patchpilot.backend import fence as fences
from patchpilot.backend.config import FOLLOWS, MESSAGE_ID
from patchpilot.clock import SYSTEM, FakeClock
from patchpilot.errors import PatchpilotError, Transient
from patchpilot.lab.launch import free_port
from patchpilot.postgres import connection as postgres_connection
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.queries import queries
from patchpilot.recovery import Finding, Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, app, total

NOW = Window(min_age=timedelta(0))

SLOW_COMMITS = (
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$",
    """
    CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON patchpilot.chord_part DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION slow()
    """,
)
"""A commit that takes half a second if a part has returned in it."""


def test_a_session_that_leads_to_a_demoted_postgresql_is_left_for_another(migrated: str) -> None:
    with Database(migrated) as database:
        database.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        assert database.execute("UPDATE patchpilot.chord SET shadow = true") == 0


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"])
def test_what_the_server_ends_is_tried_again_and_then_fails_in_one_line(migrated: str, limit: str) -> None:
    """A role may have limits, which end statements or sessions."""
    tries = []

    def work(connection: Connection) -> None:
        tries.append(1)
        connection.execute("LOCK TABLE patchpilot.outbox")
        SYSTEM.sleep(0.3 if limit.startswith("idle") else 0)
        connection.execute("SELECT 1")

    with Database(migrated) as other, Database(f"{migrated}?options=-c%20{limit}%3D100", budget=0.5) as database:

        def meanwhile(connection: Connection) -> None:
            if not limit.startswith("idle"):
                connection.execute("LOCK TABLE patchpilot.outbox")
            with pytest.raises(Transient, match=r"^PostgreSQL cannot be reached: \S[^\n]*$"):
                database.run(work)

        other.run(meanwhile)
        assert len(tries) > 1
        assert database.fetch("SELECT 1 AS one") == [{"one": 1}]


class Struck(Exception):
    """What the handler of a signal raises."""


def striking(number: int) -> Callable[[FrameType, str, object], None]:
    """Raise after the call of that number that the connection's code makes, where a signal may strike."""
    seen = itertools.count(1)

    def strike(frame: FrameType, event: str, _: object) -> None:
        ours = frame.f_code.co_filename in (postgres_connection.__file__, contextlib.__file__)
        if ours and event in ("call", "c_return") and next(seen) == number:
            raise Struck

    return strike


@pytest.mark.parametrize("seconds", [math.inf, 60], ids=["patient", "hasty"])
def test_whenever_a_signal_strikes_no_lock_is_left_behind(migrated: str, seconds: float) -> None:
    """Other threads would wait for it for ever."""

    def is_free() -> bool:
        free = database._lock.acquire(blocking=False)
        if free:
            database._lock.release()
        return free

    with Database(migrated) as database, ThreadPoolExecutor(1) as another:
        for number in itertools.count(1):
            struck = False
            try:
                with database.within(seconds):
                    sys.setprofile(striking(number))
                    database.fetch("SELECT 1")
            except Struck:
                struck = True
                sys.setprofile(None)
                assert another.submit(is_free).result(), number
            finally:
                sys.setprofile(None)
            if not struck:
                break
        assert number > 10


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
    with Database(shop.dsn) as database:  # what has not reached the broker is refused by nobody there
        pushes = database.fetch("SELECT task_id, pushes FROM patchpilot.outbox")
    assert {row["task_id"]: row["pushes"] for row in pushes} == {poisoned.id: 0, lost.id: 1}
    shop.worker("-c", "1")
    assert lost.get(timeout=60) == 4


def test_what_runs_elsewhere_and_is_on_no_record_waits_in_its_queue(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the journal nothing would bring the message back, should the other execution die. Acknowledged
    early, it could not be given back."""
    monkeypatch.setattr(fences, "ASIDE", 0)
    request = Context(id="t", task="add", **{MESSAGE_ID: str(uuid4()), FOLLOWS: "before"})
    fence = app.backend.fence
    fence._begin(request, "before", acks_late=True)
    with Database(shop.dsn) as database:  # another machine's, as far as we can tell
        database.execute("UPDATE patchpilot.fence SET worker = %s", (f"{uuid4()}/1",))
    with pytest.raises(Reject) as given_back:
        fence._begin(request, "before", acks_late=True)
    assert given_back.value.requeue


def test_a_task_that_was_ended_from_outside_does_not_begin_again(shop: Shop) -> None:
    """A hard time limit kills the process; the worker's own process says that the task has failed."""
    request = Context(id="t", task="add", **{MESSAGE_ID: str(uuid4()), FOLLOWS: "before"})
    fence = app.backend.fence
    fence._begin(request, "before", acks_late=False)
    fence.end_for_others(request)
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.fence SET lease_until = now() - interval '1 minute'")
    with pytest.raises(Ignore):
        fence._begin(request, "before", acks_late=False)


def test_of_parts_that_return_at_once_the_last_sees_that_the_chord_is_complete(shop: Shop) -> None:
    """Each asks after its own commit: here commits take half a second, so neither sees the other before."""
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    with Database(shop.dsn) as database:
        for sql in SLOW_COMMITS:
            database.execute(sql)
    ready: list[bool] = []

    def end(place: int, task_id: str) -> None:
        row = {
            "task_id": task_id, "state": "SUCCESS", "meta": b"{}", "expires": None, "group_id": result.parent.id,
            "position": place, "payload": b"2", "message_id": None, "scope": None, "attempt": None, "owner": None,
            "result_of": None, "result_group": None,
        }  # fmt: skip
        with Database(shop.dsn) as own:
            ready.append(own.fetch(queries("results")["finish"], row)[0]["ready"])

    threads = [threading.Thread(target=end, args=(place, part.id)) for place, part in enumerate(result.parent.results)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ready) == 2
    assert any(ready)


def test_a_success_stays_one(shop: Shop) -> None:
    app.backend.store_result("t", 4, "SUCCESS")
    app.backend.store_result("t", ValueError("late"), "FAILURE")
    assert app.AsyncResult("t").get(timeout=5) == 4


def test_what_a_closed_connection_is_asked_for_is_a_lost_connection(shop: Shop) -> None:
    """An acknowledgement that comes after a reconnect has closed its connection: Celery logs that, and goes on."""
    with app.connection_for_write() as connection:
        channel = connection.channel()
        transport, channel.connection.client = channel.connection, None
        with pytest.raises(RedisConnectionError, match="was closed"):
            channel._connparams()
        transport.client = connection
