"""A PostgreSQL that accepts connections and never answers counts as away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from celery import Signature, chain, chord
from celery.signals import task_postrun
from kombu.exceptions import OperationalError

from patchpilot.backend.config import MESSAGE_ID
from patchpilot.clock import FakeClock
from patchpilot.errors import Transient
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.postgres.connection import QUIET, Connection, Database
from patchpilot.recovery import Recovery, Site, Window
from tests.conftest import shop_on
from tests.support.frozen import Freezable, freezable
from tests.support.processes import Shop
from tests.support.shop import add, app, hold, note, renewals, spoil, total

pytestmark = pytest.mark.backend

WAIT = 60
NOW = Window(min_age=timedelta(0))
HASTY = {"patchpilot_postgres_budget": 1, "patchpilot_postgres_timeout": 1}


@pytest.fixture(scope="module")
def postgres(lab_roster: Roster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Freezable]:
    with freezable(tmp_path_factory.mktemp("freezable"), lab_roster) as opened:
        yield opened


@pytest.fixture
def hasty(
    postgres: Freezable, lab_roster: Roster, tmp_path: Path, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    """The test application on it, which waits for a second."""
    for key, value in HASTY.items():
        monkeypatch.setitem(app.conf, key, value)
    with shop_on(lab_roster, tmp_path, valkey, postgres.database(), monkeypatch) as shop:
        yield shop


def others_are_gone(dsn: str) -> None:
    """Wait until every session but this one is over, and what it was sent is carried out."""
    sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with Database(dsn) as database:
        until(lambda: not database.fetch(sql), seconds=WAIT, what="all other sessions were over")


def test_a_statement_is_not_waited_for_without_a_bound(postgres: Freezable) -> None:
    with Database(postgres.database(), budget=1, patience=1) as database:
        assert database.fetch("SELECT 1 AS one") == [{"one": 1}]
        with postgres.frozen(), pytest.raises(Transient, match="no answer for 1 s"):
            database.execute("SELECT 1")
        until(lambda: _answers(database), seconds=WAIT, what="it was tried again")


def test_the_threads_of_a_process_do_not_wait_one_after_the_other(postgres: Freezable) -> None:
    clock = FakeClock()
    with Database(postgres.database(), budget=0, clock=clock) as database:
        with postgres.frozen():
            with pytest.raises(Transient, match="timeout"):
                database.execute("SELECT 1")
            with pytest.raises(Transient, match="did not answer a moment ago"):
                database.execute("SELECT 1")
        clock.sleep(QUIET)
        assert _answers(database)


def _answers(database: Database) -> bool:
    try:
        return database.fetch("SELECT 1 AS one") == [{"one": 1}]
    except Transient:
        return False


def test_a_transaction_is_not_either(postgres: Freezable) -> None:
    with Database(postgres.database(), budget=1, patience=1) as database:
        for pipelined in (True, False):
            until(lambda: _answers(database), seconds=WAIT, what="it answered")
            with postgres.frozen(), pytest.raises(Transient, match="no answer for 1 s"):
                database.run(lambda connection: connection.execute("SELECT 1"), pipelined=pipelined)


@pytest.mark.skipif(not psycopg.Pipeline.is_supported(), reason="this libpq has no pipelines")
def test_a_connection_that_is_lost_in_the_middle_is_told_of_once(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """By us. psycopg would add a line for each pipeline that is left."""
    caplog.set_level("DEBUG")
    lost: list[bool] = []

    def work(connection: Connection) -> int:
        connection.execute("SELECT 1")
        if not lost:
            lost.append(True)
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())").fetchone()
        return len(connection.execute("SELECT 1").fetchall())

    with Database(dsn) as database:
        assert database.run(work, pipelined=True) == 1
    assert [record.name for record in caplog.records] == ["patchpilot.postgres.connection"]


def test_what_takes_longer_than_the_budget_is_waited_for(postgres: Freezable) -> None:
    """The budget is for a PostgreSQL that is away; this one works."""
    with Database(postgres.database(), budget=0, patience=WAIT) as database:
        assert len(database.fetch("SELECT pg_sleep(0.5)")) == 1


@pytest.mark.parametrize("of_a_chord", [False, True], ids=["task", "chord"])
def test_publishing_fails_and_what_failed_is_not_on_record(hasty: Shop, postgres: Freezable, of_a_chord: bool) -> None:
    """Recovery would send what the caller was told is not published."""
    assert add.apply_async((1, 1), queue="before").id
    canvas = chord([add.s(1, 1), add.s(2, 2)], total.s()) if of_a_chord else add.s(1, 1)
    with postgres.frozen():
        with pytest.raises(OperationalError, match=r"not published: PostgreSQL cannot be reached: no answer for 1 s"):
            canvas.apply_async()
        with redis.Redis.from_url(hasty.broker) as broker:
            assert broker.llen("celery") == 0
    app.backend.database.close()
    others_are_gone(hasty.dsn)
    with Database(hasty.dsn) as database:
        assert [row["queue"] for row in database.fetch("SELECT queue FROM patchpilot.outbox")] == ["before"]
        assert database.fetch("SELECT FROM patchpilot.chord") == []


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_the_end_of_a_task_is_left_to_recovery(hasty: Shop, postgres: Freezable, pool: str) -> None:
    """It has succeeded, and does not become a failure; and the worker goes on. No lease is renewed for what is over."""
    gate = hasty.directory / "gate"
    settings = json.dumps({**HASTY, "patchpilot_fence_lease": 3600})
    worker = hasty.worker("--pool", pool, "-c", "1", SHOP_SETTINGS=settings)
    assert note.delay(0).get(timeout=WAIT) == 0  # whoever runs tasks is connected
    result = chord([hold.s(5, str(gate))], total.s()).apply_async()
    [part] = result.parent.results
    hasty.await_line("hold began")
    with postgres.frozen():
        gate.touch()
        until(
            lambda: f"Task {part.id} is left to recovery, its end was not recorded" in worker.output(), seconds=WAIT,
            what=f"the task's end was given up: {worker.output()[-2000:]}",
        )  # fmt: skip
    with Recovery(Site(hasty.broker, hasty.dsn), stale=timedelta(seconds=4)) as recovery:
        until(lambda: recovery.recover(NOW) != (), seconds=WAIT, what="the chord was recovered")
    assert result.get(timeout=WAIT) == 5
    assert note.delay(1).get(timeout=WAIT) == 1
    assert part.state == "SUCCESS"
    until(lambda: renewals.delay().get(timeout=WAIT) == 0, seconds=WAIT, what="the callback's lease was let go")


def forget_the_ids(broker: redis.Redis) -> None:
    """Make the messages in the queue such as a producer without patchpilot sends."""
    for _ in range(broker.llen("celery")):
        message = json.loads(broker.rpop("celery"))
        del message["headers"][MESSAGE_ID]
        broker.lpush("celery", json.dumps(message))


@pytest.mark.parametrize("journal", [False, "warn", True], ids=["no journal", "warn", "no id"])
def test_the_end_of_a_task_that_nothing_would_bring_back_waits_for_it(
    hasty: Shop, postgres: Freezable, monkeypatch: pytest.MonkeyPatch, journal: Any
) -> None:
    """It succeeded or failed, and stays so, and its chord goes on; with a result, or without one, and though a time
    limit strikes meanwhile."""
    monkeypatch.setitem(app.conf, "patchpilot_journal_messages", journal)
    settings = json.dumps({**HASTY, "patchpilot_journal_messages": journal})
    gate = str(hasty.directory / "gate")
    held = [hold.si(5, gate, label="stored").set(soft_time_limit=8), hold.si(5, gate).set(ignore_result=True)]
    results = [chord([each], total.s()).apply_async() for each in (*held, spoil.s(gate))]
    parts = [result.parent.results[0].id for result in results]
    with redis.Redis.from_url(hasty.broker) as broker:
        if journal is True:
            forget_the_ids(broker)
        worker = hasty.worker("-c", "3", SHOP_SETTINGS=settings)
    for label in ("stored", "hold", "spoil"):
        hasty.await_line(f"{label} began", seconds=WAIT)
    with postgres.frozen():
        Path(gate).touch()
        for part in parts:
            waits = f"[{part}] waits before it ends"
            until(lambda wanted=waits: wanted in worker.output(), seconds=WAIT, what=f"{waits}: {worker.output()}")
        struck = f"[{parts[0]}] ends in spite of its soft time limit"
        until(lambda: struck in worker.output(), seconds=WAIT, what=f"the limit struck: {worker.output()[-2000:]}")
    assert [result.get(timeout=WAIT) for result in results[:2]] == [5, 5]
    assert "spoilt" in str(results[2].get(timeout=WAIT, propagate=False))
    assert [each.parent.results[0].state for each in results] == ["SUCCESS", "PENDING", "FAILURE"]
    assert worker.output().count("waits before it ends") == 3
    assert "left to recovery" not in worker.output()


def test_what_nothing_would_bring_back_and_ends_outside_of_its_process_is_lost_and_it_says_so(
    hasty: Shop, postgres: Freezable
) -> None:
    """All others of that worker would wait for a main process that waits."""
    settings = json.dumps({**HASTY, "patchpilot_journal_messages": False})
    worker = hasty.worker("-c", "1", SHOP_SETTINGS=settings)
    result = hold.apply_async((5, str(hasty.directory / "gate")), time_limit=5)
    hasty.await_line("hold began")
    with postgres.frozen():
        lost = f"Task {result.id} is lost unless its message is delivered again, its end was not recorded"
        until(lambda: lost in worker.output(), seconds=WAIT, what=f"it said so: {worker.output()[-2000:]}")


def test_a_task_whose_end_was_not_recorded_stays_in_the_outbox(hasty: Shop, postgres: Freezable) -> None:
    """Also if PostgreSQL is back a moment later: what follows must not take it for recorded."""
    sent = add.apply_async((1, 1), queue="nobody")
    outbox = "SELECT message_id FROM patchpilot.outbox"
    with Database(hasty.dsn) as database:
        [row] = database.fetch(outbox)
        add.push_request(id=sent.id, **{MESSAGE_ID: str(row["message_id"])})
        try:
            postgres.server.stop()  # frozen, it would carry out later what it was sent
            try:
                app.backend.mark_as_done(sent.id, 2, request=add.request)
            finally:
                postgres.server.start()
            until(lambda: _answers(app.backend.database), seconds=WAIT, what="PostgreSQL was back")
            task_postrun.send(sender=add, task_id=sent.id, task=add, state="SUCCESS", retval=2)
        finally:
            add.pop_request()
        assert database.fetch(outbox) == [row]


@pytest.mark.parametrize("acks_late", ["", "1"], ids=["early", "late"])
def test_a_callback_that_starts_meanwhile_waits_for_it(hasty: Shop, postgres: Freezable, acks_late: str) -> None:
    """The claim of its start is given up and carried out later: no other process would take it over before its lease
    is over, which is an hour here. Nor does a time limit that strikes before it began end it."""
    settings = json.dumps({**HASTY, "patchpilot_fence_lease": 3600})
    result = chord([add.s(1, 1)], total.s().set(queue="callbacks", soft_time_limit=3)).apply_async()
    worker = hasty.worker("-c", "1", SHOP_SETTINGS=settings, SHOP_ACKS_LATE=acks_late)
    with redis.Redis.from_url(hasty.broker) as broker:
        until(lambda: broker.llen("callbacks") == 1, seconds=WAIT, what="the callback was queued")
        assert note.delay(0).get(timeout=WAIT) == 0  # the part's end is over, and its process connected
        with postgres.frozen():
            broker.rename("callbacks", "celery")
            waits = f"total[{result.id}] waits before it starts"
            until(lambda: waits in worker.output(), seconds=WAIT, what=f"it waited: {worker.output()[-2000:]}")
            struck = f"total[{result.id}] still waits"
            until(lambda: struck in worker.output(), seconds=WAIT, what=f"the limit struck: {worker.output()[-2000:]}")
    assert result.get(timeout=WAIT) == 2
    assert hasty.ledger().count("total 2") == 1


def test_a_header_at_whose_end_postgresql_is_away_is_not_published(hasty: Shop, postgres: Freezable) -> None:
    """Its producer hears what it hears of a broker that is away, and may try again."""

    def header() -> Iterator[Signature]:
        yield add.s(1, 1)
        yield add.s(2, 2)
        postgres.server.stop()

    try:
        with pytest.raises(OperationalError, match=r"chord .* not published: PostgreSQL cannot be reached"):
            chord(header(), total.s(label="never")).apply_async()
    finally:
        postgres.server.start()
    until(lambda: _answers(app.backend.database), seconds=WAIT, what="PostgreSQL was back")
    with Database(hasty.dsn) as database:  # and so nobody finishes it
        assert database.fetch("SELECT generating, size FROM patchpilot.chord") == [{"generating": True, "size": 0}]


def test_what_is_not_on_record_and_starts_meanwhile_is_not_lost(
    hasty: Shop, postgres: Freezable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledged early, Celery's default: its message could not be given back, and nobody would send it again."""
    settings = {**HASTY, "patchpilot_journal_messages": False}
    monkeypatch.setitem(app.conf, "patchpilot_journal_messages", False)
    gate = hasty.directory / "gate"
    worker = hasty.worker("-c", "2", SHOP_SETTINGS=json.dumps(settings))  # in one of them the first one waits
    chain(hold.s(5, str(gate)), note.s(label="tail")).apply_async()
    hasty.await_line("hold began")
    with postgres.frozen():
        gate.touch()
        until(lambda: "waits before it starts" in worker.output(), seconds=WAIT, what="the tail waited")
    hasty.await_line("tail 5", seconds=WAIT)


def test_a_worker_that_shuts_down_does_not_wait_for_it(hasty: Shop, postgres: Freezable) -> None:
    """It says that it is gone; but if nobody listens, it goes all the same."""
    settings = json.dumps({"patchpilot_postgres_timeout": 600})
    workers = [hasty.worker("-c", "1", SHOP_SETTINGS=settings) for _ in range(2)]
    alive = "SELECT FROM patchpilot.worker"
    with Database(hasty.dsn) as database:
        until(lambda: len(database.fetch(alive)) == 2, seconds=WAIT, what="both gave a sign of life")
        workers[0].process.terminate()
        until(lambda: len(database.fetch(alive)) == 1, seconds=WAIT, what="one said that it is gone")
        with postgres.frozen():
            workers[1].process.terminate()
            until(lambda: workers[1].process.poll() is not None, seconds=WAIT, what="the other one was gone")


def test_in_shadow_mode_the_application_notices_nothing(
    hasty: Shop, postgres: Freezable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who publishes, and whose records wait for as long as the server stands still; nor the worker, which drops
    its own, and says so."""
    monkeypatch.setitem(app.conf, "patchpilot_mode", "shadow")
    monkeypatch.setitem(app.conf, "patchpilot_postgres_timeout", 600)
    worker = hasty.worker("-c", "1", SHOP_MODE="shadow")
    assert note.delay(0).get(timeout=WAIT) == 0
    backend = app.backend
    with Database(hasty.dsn) as database:
        backend.recorder.flush(WAIT)
        until(lambda: not database.fetch("SELECT FROM patchpilot.outbox"), seconds=WAIT, what="its end was recorded")
    with postgres.frozen(), ThreadPoolExecutor(1) as threads:
        publishing = threads.submit(lambda: [note.delay(number) for number in range(40)])
        until(publishing.done, seconds=WAIT, what="forty messages were published")
        assert [result.get(timeout=WAIT) for result in publishing.result()] == list(range(40))
        until(lambda: "records dropped so far" in worker.output(), seconds=WAIT, what="the worker said so")
        assert "no answer for 5 s" in worker.output()
        assert backend.recorder._waiting.unfinished_tasks > 0
    with Database(hasty.dsn) as database:
        backend.recorder.flush(WAIT)
        assert backend.recorder.dropped == 0
        recorded = "SELECT count(*) FROM patchpilot.outbox WHERE shadow AND task_name = %s"
        assert database.fetch(recorded, [note.name])[0]["count"] > 0  # their ends, the worker had dropped
    assert worker.process.poll() is None
