"""Shadow mode: the record is written, and nothing else changes."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import redis
from celery import chain, chord, group
from celery.exceptions import ChordError

from patchpilot.backend import ShadowBackend
from patchpilot.backend import shadow as shadow_mode
from patchpilot.backend.shadow import TRIES, Recorder, TooEarly
from patchpilot.lab.launch import free_port
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Connection, Database
from patchpilot.recovery import Recovery, Site, Window
from tests.conftest import shop_on
from tests.support.processes import ROOT, Shop
from tests.support.shop import add, app, boom, grows, note, total

pytestmark = pytest.mark.backend

WAIT = 60
NOW = Window(min_age=timedelta(0))


@pytest.fixture
def shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "patchpilot_mode", "shadow")
    monkeypatch.setenv("SHOP_MODE", "shadow")


def fetch(shop: Shop, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(shop.dsn) as connection:
        return connection.execute(sql.encode()).fetchall()


def test_results_and_chords_stay_on_the_stock_path_and_the_record_says_what_became_of_them(
    shadow: None, shop: Shop
) -> None:
    worker = shop.worker()
    canvases = [
        chord([add.s(i, i) for i in range(5)], total.s()),
        chain(add.s(1, 1), chord([add.s(1), add.s(2)], total.s())),
        chord([add.s(1, 1)], group(note.s(), note.s())),
        chord([grows.s(1), add.s(1, 1)], total.s()),
        chain(add.s(1, 2), add.s(3)),
    ]
    assert [canvas.apply_async().get(timeout=30) for canvas in canvases] == [20, 7, [[2], [2]], 14, 6]
    failed = chord([add.s(1, 1), boom.s()], total.s()).apply_async()
    assert isinstance(failed.get(timeout=30, propagate=False), ChordError)
    assert isinstance(app.backend, ShadowBackend)
    with redis.Redis.from_url(shop.broker) as broker:
        assert broker.keys("celery-task-meta-*")  # results are where Celery puts them
    states = "SELECT state::text, shadow FROM patchpilot.chord ORDER BY state, shadow"
    until(
        lambda: fetch(shop, states) == [("dispatched", True)] * 4 + [("failed", True)],
        seconds=30, what="the record was complete",
    )  # fmt: skip
    until(lambda: fetch(shop, "SELECT task_name FROM patchpilot.outbox") == [], seconds=30, what="every message ended")
    assert fetch(shop, "SELECT count(*) FROM patchpilot.result") == [(0,)]
    assert fetch(shop, "SELECT count(*) FROM patchpilot.fence") == [(0,)]
    assert worker.process.poll() is None


def test_what_gets_stuck_is_found_and_left_alone(shadow: None, shop: Shop) -> None:
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete(f"celery-taskset-meta-{result.parent.id}.s")
        shop.worker()
        parts = "SELECT count(*) FROM patchpilot.chord_part WHERE state IS NOT NULL"
        until(lambda: fetch(shop, parts) == [(2,)], seconds=30, what="both parts were on record")
        until(lambda: fetch(shop, "SELECT FROM patchpilot.outbox") == [], seconds=30, what="both messages had ended")
        with Recovery(Site(shop.broker, shop.dsn)) as recovery:
            [found] = recovery.survey(NOW)
            assert (found.id, found.diagnosis, found.curable) == (result.parent.id, "shadow", False)
            assert recovery.recover(NOW) == ()
            app.backend.recorder.flush(30)
            add.apply_async((3, 3), queue="nobody")
            app.backend.recorder.flush(30)
            broker.delete("nobody")
            assert recovery.recover(NOW) == ()  # a lost message of an application in shadow mode as well
        assert broker.exists("nobody") == 0


def test_a_callback_that_could_not_be_pushed_is_not_called_dispatched(shadow: None, shop: Shop, forbidden: str) -> None:
    shop.worker("-c", "1", SHOP_SETTINGS='{"task_publish_retry": false}')
    result = chord([add.s(1, 1)], total.s().set(queue=forbidden)).apply_async()
    assert isinstance(result.get(timeout=30, propagate=False), ChordError)
    parts = "SELECT count(*) FROM patchpilot.chord_part WHERE state IS NOT NULL"
    until(lambda: fetch(shop, parts) == [(1,)], seconds=30, what="the part was on record")
    assert fetch(shop, "SELECT state::text FROM patchpilot.chord") == [("open",)]


@pytest.fixture(params=["closed", "silent"])
def no_postgres(request: pytest.FixtureRequest) -> Iterator[str]:
    """The DSN of a PostgreSQL that refuses connections, or of one that accepts them and never says a word."""
    if request.param == "closed":
        yield f"postgresql://u@127.0.0.1:{free_port()}/x"
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/x"


def test_without_postgresql_the_application_notices_nothing(
    shadow: None, shop: Shop, no_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shop_on(shop.roster, shop.directory, shop.broker, no_postgres, monkeypatch) as blind:
        worker = blind.worker()
        results = [chord([add.s(i, i), add.s(1, 1)], total.s()).apply_async() for i in range(5)]
        assert [result.get(timeout=30) for result in results] == [2 + 2 * i for i in range(5)]
        assert "Traceback" not in worker.output()
        assert worker.process.poll() is None


def test_what_goes_wrong_with_the_record_of_a_chord_is_not_its_senders_to_hear(
    shadow: None, shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone_wrong(*_: object, **__: object) -> None:
        raise LookupError("nobody foresaw this")

    monkeypatch.setattr(app.backend.chords, "open", gone_wrong)
    result = chord([add.s(1, 1)], total.s()).apply_async()
    shop.worker("-c", "1")
    assert result.get(timeout=30) == 2
    assert "something was not recorded" in caplog.text


def test_what_no_thread_is_left_to_write_is_not_its_senders_to_hear(
    shadow: None, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end the interpreter starts no thread any more."""
    monkeypatch.setattr(app.backend.recorder, "_pid", 0)
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "patchpilot-shadow":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(thread)

    with monkeypatch.context() as at_the_end:
        at_the_end.setattr(threading.Thread, "start", refused)
        sent = [add.delay(1, 1) for _ in range(2)]
    with redis.Redis.from_url(shop.broker) as broker:
        assert broker.llen("celery") == len(sent)
    assert app.backend.recorder.dropped == len(sent)
    add.delay(1, 1)
    app.backend.recorder.flush(WAIT)
    assert fetch(shop, "SELECT count(*) FROM patchpilot.outbox") == [(1,)]


# Its records are slow, and none is written before it ends.
SCRIPT = """
import atexit, threading
from patchpilot.backend.shadow import Recorder
from patchpilot.clock import SYSTEM
from patchpilot.postgres.connection import Database

run, ending = Database.run, threading.Event()

def slowly(*arguments):
    ending.wait()
    SYSTEM.sleep(0.3)
    run(*arguments)

Database.run = slowly
Recorder.flush.__defaults__ = (60.0,)  # two seconds are long, but not on every machine

from tests.support.shop import add

for number in range(3):
    add.delay(number, number)
atexit.register(ending.set)
"""


def test_a_script_that_ends_at_once_has_written_its_records(shadow: None, shop: Shop) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env={**os.environ, **shop.environment}, check=True)
    assert fetch(shop, "SELECT count(*) FROM patchpilot.outbox") == [(3,)]


def test_a_record_that_comes_too_early_keeps_no_other_one_waiting(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_mode, "PAUSE", 3600)
    written: list[str] = []

    def too_early(_: Connection) -> None:
        written.append("too early")
        raise TooEarly

    with Database(migrated) as database:
        recorder = Recorder(database)
        recorder.put(too_early)
        recorder.put(lambda _: written.append("another"))
        until(lambda: written == ["too early", "another"], seconds=WAIT, what="the other one was written")
        assert recorder._waiting.unfinished_tasks == 1
        atexit.unregister(recorder.flush)


def test_a_record_that_comes_too_early_is_tried_again_so_often(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_mode, "PAUSE", 0.001)
    tries: list[str] = []

    def at_the_third(_: Connection) -> None:
        tries.append("third")
        if len(tries) < 3:
            raise TooEarly

    def never(_: Connection) -> None:
        tries.append("never")
        raise TooEarly

    with Database(migrated) as database:
        recorder = Recorder(database)
        recorder.put(at_the_third)
        recorder.flush(WAIT)
        assert tries == ["third"] * 3
        recorder.put(never)
        recorder.flush(WAIT)
        assert tries[3:] == ["never"] * TRIES
    assert recorder.dropped == 0
