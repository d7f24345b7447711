"""The outbox: what is in PostgreSQL before it leaves, exactly enough to send it again."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import redis
from celery import Celery, chain, chord
from celery.beat import Scheduler
from celery.worker.request import Request
from kombu import Message
from kombu.common import Broadcast
from kombu.exceptions import OperationalError

from patchpilot.backend import dispatch as dispatch_module
from patchpilot.backend import outbox as outbox_module
from patchpilot.backend.message import moment
from patchpilot.clock import SYSTEM
from patchpilot.lab.launch import free_port
from patchpilot.lab.processes import until
from patchpilot.recovery import Recovery, Site, Window
from tests.conftest import shop_on
from tests.support.processes import ROOT, Shop
from tests.support.shop import add, app, note, relay, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


@pytest.fixture
def recovery(shop: Shop) -> Iterator[Recovery]:
    with Recovery(Site(shop.broker, shop.dsn, accept_content=("json", "pickle")), stale=timedelta(seconds=4)) as opened:
        yield opened


def fetch(shop: Shop, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(shop.dsn) as connection:
        return connection.execute(sql.encode()).fetchall()


def raw(broker: redis.Redis, queue: str) -> dict[str, Any]:
    """The one message in ``queue``, less its delivery tag, which has to be fresh each time."""
    [message] = broker.lrange(queue, 0, -1)
    content: dict[str, Any] = json.loads(message)
    del content["properties"]["delivery_tag"]
    return content


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority": 6},
        {"serializer": "pickle"},
        {"compression": "zlib"},
        {"countdown": 3600, "expires": 7200},
        {"headers": {"tenant": "blue"}, "queue": "elsewhere"},
        {"task_id": "my-own-id", "ignore_result": True, "shadow": "other"},
        {"link": note.s(), "link_error": note.si("gone")},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_lost_message_is_sent_again_as_it_was(
    shop: Shop, recovery: Recovery, broker: redis.Redis, options: dict[str, Any]
) -> None:
    assert app.backend  # nothing is seen before it is loaded, and what ignores its result does not load it
    add.apply_async((1, 2), **options)
    [queue] = [key.decode() for key in broker.keys("*") if broker.type(key) == b"list"]
    before = raw(broker, queue)
    broker.delete(queue)
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["message-lost"]
    assert raw(broker, queue) == before
    assert base64.b64decode(before["body"])


def test_a_header_its_chord_and_its_members_are_one_transaction(shop: Shop) -> None:
    chord([chain(add.s(i, 1), add.s(1)) if i % 3 else add.s(i, 1) for i in range(20)], total.s()).apply_async()
    of_chord = fetch(shop, "SELECT DISTINCT xmin::text FROM patchpilot.chord")
    assert len(of_chord) == 1
    assert fetch(shop, "SELECT DISTINCT xmin::text FROM patchpilot.chord_part") == of_chord
    assert fetch(shop, "SELECT DISTINCT xmin::text FROM patchpilot.outbox") == of_chord
    assert fetch(shop, "SELECT count(*), count(group_id) FROM patchpilot.outbox") == [(20, 20)]


def test_chords_in_a_header_are_part_of_its_transaction(shop: Shop, broker: redis.Redis) -> None:
    chord([chord([add.s(i, 1), add.s(1, 1)], total.s()) for i in range(3)], total.s()).apply_async()
    assert fetch(shop, "SELECT count(*), count(DISTINCT xmin::text) FROM patchpilot.chord") == [(4, 1)]
    assert fetch(shop, "SELECT count(*), count(DISTINCT xmin::text) FROM patchpilot.outbox") == [(6, 1)]
    assert broker.llen("celery") == 6
    shop.worker()
    shop.await_line("total 12")


@pytest.mark.parametrize("limit", ["number", "bytes"])
def test_a_header_that_is_too_long_for_one_turn_takes_several(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    if limit == "number":
        monkeypatch.setattr(outbox_module, "AT_ONCE", 8)
    else:
        chord([add.s(0, 0)], total.s()).apply_async()
        [(size,)] = fetch(shop, "DELETE FROM patchpilot.outbox RETURNING octet_length(body)")
        monkeypatch.setattr(dispatch_module, "BYTES_AT_ONCE", 8 * size)
    result = chord([add.s(i, 0) for i in range(20)], total.s()).apply_async()
    assert fetch(shop, "SELECT count(*), count(DISTINCT xmin::text) FROM patchpilot.outbox") == [(20, 3)]
    shop.worker()
    assert result.get(timeout=30) == 190


def test_what_cannot_be_written_down_is_not_published(
    shop: Shop, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses connections: the caller hears of it, in Celery's own words, and nothing is in the broker."""
    nowhere = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/x"
    monkeypatch.setitem(app.conf, "patchpilot_postgres_budget", 0.2)
    with shop_on(shop.roster, shop.directory, shop.broker, nowhere, monkeypatch):
        for canvas in (add.s(1, 1), chord([add.s(1, 1)], total.s())):
            with pytest.raises(OperationalError, match="not published: PostgreSQL cannot be reached") as refused:
                canvas.apply_async(retry=False)
            assert "hunter2" not in str(refused.value)
        assert broker.llen("celery") == 0


def test_a_chord_without_a_record_is_not_published_whatever_becomes_of_messages(
    shop: Shop, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts would run, and nobody would call its callback, or tell."""
    nowhere = f"postgresql://u@127.0.0.1:{free_port()}/x"
    monkeypatch.setitem(app.conf, "patchpilot_postgres_budget", 0.2)
    for journal in ("warn", False):
        monkeypatch.setitem(app.conf, "patchpilot_journal_messages", journal)
        with shop_on(shop.roster, shop.directory, shop.broker, nowhere, monkeypatch):
            header = [add.s(1, 1), add.s(2, 2)]
            inside = chord([chord(header, total.s()), add.s(3, 3)], total.s())
            for canvas in (chord(header, total.s()), chord((it for it in header), total.s()), inside):
                with pytest.raises(OperationalError, match="not published: PostgreSQL cannot be reached"):
                    canvas.apply_async(retry=False)
            assert broker.llen("celery") == 0
            add.apply_async((1, 1))  # of a message that is no chord's, the setting says what becomes
            assert broker.llen("celery") == 1
            broker.delete("celery")


def test_without_the_journal_only_callbacks_are_on_record(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(app.conf, "patchpilot_journal_messages", False)
    add.apply_async((1, 1))
    result = chord([add.s(1, 2), add.s(1, 1)], total.s().set(queue="callbacks")).apply_async()
    assert fetch(shop, "SELECT task_name FROM patchpilot.outbox") == []
    assert fetch(shop, "SELECT state::text FROM patchpilot.chord") == [("open",)]
    shop.worker()
    until(lambda: broker.llen("callbacks") == 1, seconds=30, what="the callback was queued")
    assert fetch(shop, "SELECT task_name FROM patchpilot.outbox") == [(total.name,)]
    broker.delete("callbacks")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["callback-message-lost"]
    shop.worker("-Q", "callbacks", "-c", "1")
    assert result.get(timeout=30) == 5


def test_a_header_that_could_not_be_pushed_is_marked_and_withdrawn(
    shop: Shop, recovery: Recovery, broker: redis.Redis, forbidden: str
) -> None:
    """The caller hears of it, and may send the chord again: nobody may finish this one for them."""
    header = [add.s(1, 1), add.s(2, 2).set(queue=forbidden), add.s(3, 3)]
    with pytest.raises(Exception, match=r"(?i)no permission|NOPERM"):
        chord(header, total.s()).apply_async()
    assert broker.llen("celery") == 1
    assert fetch(shop, "SELECT count(*) FROM patchpilot.outbox") == [(1,)]
    [found] = recovery.survey(NOW)
    assert (found.diagnosis, found.curable) == ("half-published", False)


def test_what_follows_a_task_that_succeeded_is_left_to_recovery_if_it_cannot_be_pushed(
    shop: Shop, recovery: Recovery, broker: redis.Redis, forbidden: str
) -> None:
    """Celery would turn the success into a failure, and the rest of the chain would be gone."""
    result = chain(add.s(1, 1), add.s(2).set(queue=forbidden), note.s(label="end")).apply_async()
    worker = shop.worker("-c", "1")
    until(lambda: "left to recovery" in worker.output(), seconds=30, what="the push had failed")
    assert result.parent.parent.get(timeout=30) == 2
    broker.execute_command("ACL", "SETUSER", "default", "allkeys")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["message-lost"]
    shop.worker("-Q", forbidden, "-c", "1")
    assert result.get(timeout=30) == 4
    assert shop.ledger() == ["add 1 1", "add 2 2", "end 4"]


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({"patchpilot_journal_messages": "warn"}, {"SHOP_POSTGRES": "postgresql://u@127.0.0.1:1/x"}),
        ({"patchpilot_journal_messages": False}, {}),
        ({}, {"SHOP_MODE": "shadow"}),
    ],
    ids=["warn", "off", "shadow"],
)
def test_a_task_hears_that_what_it_sends_cannot_be_pushed_if_nobody_would_send_it_later(
    shop: Shop, forbidden: str, settings: dict[str, Any], environment: dict[str, str]
) -> None:
    """It is not on record, or it is only watched: there a task hears what it hears from Celery."""
    settings = {"task_routes": {relay.name: {"queue": forbidden}}, "patchpilot_postgres_budget": 0.2, **settings}
    worker = shop.worker("-c", "1", SHOP_SETTINGS=json.dumps(settings), **environment)
    relay.apply_async(("relay", 1), ignore_result=True)  # a result would wait for PostgreSQL
    ended = re.compile(rf"{relay.name}\[\S+\] (raised unexpected|succeeded)")
    until(lambda: ended.search(worker.output()), seconds=60, what="the task had ended")
    assert ended.findall(worker.output()) == ["raised unexpected"]
    assert "on are left to recovery" not in worker.output()
    if "SHOP_MODE" in environment:
        until(lambda: fetch(shop, "SELECT FROM patchpilot.outbox") == [], seconds=60, what="it was withdrawn")


def tokyo(shop: Shop) -> None:
    """From now on sessions of the shop's database are in a time zone of their own."""
    with psycopg.connect(shop.dsn, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET timezone = 'Asia/Tokyo'".encode())


def test_a_time_without_an_offset_is_in_utc_wherever_postgresql_is(shop: Shop) -> None:
    tokyo(shop)
    soon = SYSTEM.now() + timedelta(hours=2)
    for expires in (soon, soon.replace(tzinfo=None), soon.replace(tzinfo=None).isoformat()):
        add.apply_async((1, 1), expires=expires)
    assert fetch(shop, "SELECT DISTINCT expires FROM patchpilot.outbox") == [(soon,)]


@pytest.mark.parametrize("settings", [{}, {"enable_utc": False}, {"timezone": "Asia/Tokyo", "enable_utc": False}])
@pytest.mark.parametrize("expires", ["2026-03-29T02:30:00.5", "2026-03-29T02:30:00Z", "2026-03-29T02:30:00+09:00"])
def test_a_time_is_read_as_workers_read_it(settings: dict[str, Any], expires: str) -> None:
    reader = Celery("reader", set_as_current=False)
    reader.conf.update(settings)
    headers = {"id": "1", "task": "celery.ping", "expires": expires}
    request = Request(Message(headers=headers, body=((), {}, {})), app=reader, task=add, decoded=True)
    assert moment(expires) == request.expires


PRODUCER = """
import sys
from celery import chord
from tests.support.shop import add, note
for number in range(1000):
    chord([add.si(number, i) for i in range(1000)], note.si(number, label="end")).apply_async()
    print(number, flush=True)
"""


@pytest.mark.timeout(180)
def test_a_producer_killed_while_it_dispatches_leaves_whole_chords_or_none(shop: Shop, recovery: Recovery) -> None:
    """kill -9 somewhere in the middle of dispatching chords of 1,000: each is on record with all its messages, or not
    at all, and recovery finishes the one whose messages were not all pushed."""
    for kill_after in ("INSERT", "LPUSH"):
        producer = subprocess.Popen(
            [sys.executable, "-c", PRODUCER], cwd=ROOT, env={**os.environ, **shop.environment}, stdout=subprocess.PIPE
        )
        assert producer.stdout is not None
        producer.stdout.readline()
        if kill_after == "LPUSH":
            with redis.Redis.from_url(shop.broker) as broker:
                mark = broker.llen("celery") // 1000 * 1000
                until(lambda mark=mark: broker.llen("celery") - mark > 0, seconds=30, what="a push")  # type: ignore[misc]
        producer.kill()
        producer.communicate()
    counts = fetch(shop, "SELECT count(*) FROM patchpilot.outbox GROUP BY group_id")
    assert counts
    assert set(counts) == {(1000,)}
    with redis.Redis.from_url(shop.broker) as broker:
        pushed = broker.llen("celery")
        applied = recovery.recover(NOW)
        assert broker.llen("celery") == 1000 * len(counts)
        assert (pushed < 1000 * len(counts)) == bool(applied)
    assert recovery.survey(NOW) == ()
    assert -producer.returncode == signal.SIGKILL


def test_what_goes_to_all_who_listen_is_not_on_record(shop: Shop, recovery: Recovery) -> None:
    """Nobody can say who has missed it, and sent again it would be run again by those who have not."""
    everybody = Broadcast("everybody")
    with app.connection_for_write() as connection:
        everybody(connection.default_channel).declare()
        with app.amqp.Producer(connection) as producer:
            add.apply_async((1, 1), queue=everybody, producer=producer)
    assert fetch(shop, "SELECT FROM patchpilot.outbox") == []
    assert recovery.survey(NOW) == ()


def test_what_beat_sends_is_on_record(shop: Shop) -> None:
    with app.connection_for_write() as connection, connection.channel() as channel:
        scheduler = Scheduler(app, producer=app.amqp.Producer(channel, auto_declare=False), lazy=True)
        entry = scheduler.Entry("each second", add.name, schedule=1, args=(1, 1), app=app)
        scheduler.apply_async(entry, producer=scheduler.producer, advance=False)
        plain = scheduler.Entry("by name", "somebody.elses", schedule=1, args=(1, 1), app=app)
        scheduler.apply_async(plain, producer=scheduler.producer, advance=False)
    names = fetch(shop, "SELECT task_name FROM patchpilot.outbox ORDER BY recorded_at")
    assert names == [(add.name,), ("somebody.elses",)]
