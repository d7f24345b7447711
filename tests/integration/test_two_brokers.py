"""Two brokers behind one PostgreSQL: recovery of one touches nothing of the other, and waits for no worker of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from queue import Empty

import pytest
import redis
from celery import Celery, chord

from patchpilot.backend.identity import Identity
from patchpilot.backend.message import Part
from patchpilot.broker_name import NAMES, name_of_url
from patchpilot.lab.launch import Address
from patchpilot.lab.links import Link
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from patchpilot.recovery.inventory import Elsewhere
from patchpilot.workers.application import site_of
from tests.conftest import forget_connections, shop_on
from tests.support.processes import Shop
from tests.support.shop import add, app, boom, hold, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))
SOON = timedelta(seconds=4)


@pytest.fixture
def other(lab_roster: Roster, tmp_path: Path) -> Iterator[str]:
    """The URL of a second broker."""
    node = ValkeyNode("other-broker", tmp_path, roster=lab_roster)
    try:
        node.start()
        yield node.url
    finally:
        node.stop()


def lost_chord(broker: str) -> str:
    """Sent to ``broker`` by the application as it is set up now, and lost there. Its group id."""
    result = chord([add.s(1, 1)], total.s()).apply_async()
    with redis.Redis.from_url(broker) as client:
        assert client.delete("celery") == 1
    return str(result.parent.id)


def test_a_name_is_left_beside_the_wait_for_messages(valkey: str) -> None:
    """A worker leaves it when it is ready. The answer must not be taken for a message."""
    app = Celery(broker=valkey, set_as_current=False)
    with app.connection_for_read() as connection, redis.Redis.from_url(valkey) as broker:
        channel = connection.default_channel
        channel.queue_declare("celery")
        channel.basic_consume("celery", no_ack=True, callback=print, consumer_tag="tag")
        channel.connection.cycle._register_BRPOP(channel)  # as the hub does
        assert channel._in_poll
        Identity(app).leave(connection)
        assert broker.scard(NAMES) == 1
        with pytest.raises(Empty):
            channel._brpop_read()


def test_each_broker_is_recovered_by_itself(
    shop: Shop, other: str, lab_roster: Roster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    busy = shop.worker("--pool", "solo")  # alive, and answers nobody
    hold.delay(1, str(gate))
    shop.await_line("hold began")
    forget_connections(app)
    (tmp_path / "other").mkdir()
    with shop_on(lab_roster, tmp_path / "other", other, shop.dsn, monkeypatch) as there:
        group_id = lost_chord(other)
        with Recovery(Site(shop.broker, shop.dsn), stale=SOON) as here:
            assert [it for it in here.survey(NOW) if it.id == group_id] == []
            assert [it for it in here.recover(NOW) if it.id == group_id] == []
            assert here.elsewhere() == (Elsewhere(str(name_of_url(other)), 1, 1),)
        with Recovery(Site(other, shop.dsn), stale=SOON) as recovery:
            [applied] = recovery.recover(NOW)
            assert (applied.id, applied.diagnosis) == (group_id, "header-message-lost")
        there.worker("-c", "1")
        there.await_line("total 2")
    assert busy.process.poll() is None
    gate.touch()


def test_a_worker_that_knows_the_broker_by_another_name_keeps_what_it_may_have(shop: Shop, tmp_path: Path) -> None:
    host, port = shop.broker.split("/")[2].split(":")
    gate = tmp_path / "gate"
    with Link(Address(host, int(port))) as link:
        alias = f"redis://{link.address}/0"
        worker = shop.worker("--pool", "solo", SHOP_BROKER=alias)
        result = hold.delay(1, str(gate))
        shop.await_line("hold began")
        with redis.Redis.from_url(shop.broker) as client:
            assert client.smembers(NAMES) == {str(name_of_url(url)).encode() for url in (alias, shop.broker)}
        with Recovery(Site(shop.broker, shop.dsn), stale=SOON) as recovery:
            assert [(it.id, it.diagnosis) for it in recovery.survey(NOW)] == [(result.id, "unknown")]
        gate.touch()
        shop.await_line("hold ended")
        worker.kill()  # before its link goes


def test_what_somebody_published_by_another_name_is_recovered(shop: Shop) -> None:
    host, port = shop.broker.split("/")[2].split(":")
    with Link(Address(host, int(port))) as link:
        alias = f"redis://{link.address}/0"
        app.conf.update(broker_url=alias, broker_write_url=alias, broker_read_url=alias)
        group_id = lost_chord(shop.broker)
        forget_connections(app)
    with Recovery(Site(shop.broker, shop.dsn), stale=SOON) as recovery:
        assert [it.id for it in recovery.recover(NOW)] == [group_id]


def test_what_a_version_before_wrote_belongs_to_any_broker(shop: Shop, other: str) -> None:
    group_id = lost_chord(shop.broker)
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.chord SET broker = NULL")
        database.execute("UPDATE patchpilot.outbox SET broker = NULL")
    with Recovery(Site(other, shop.dsn), stale=SOON) as recovery:
        assert recovery.elsewhere() == ()
        assert [it.id for it in recovery.survey(NOW)] == [group_id]


def test_a_callback_is_dispatched_to_the_broker_of_its_chord(
    shop: Shop, other: str, lab_roster: Roster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_connections(app)
    (tmp_path / "other").mkdir()
    with shop_on(lab_roster, tmp_path / "other", other, shop.dsn, monkeypatch):
        result = chord([add.s(1, 1)], total.s()).apply_async()
        app.backend.chords.return_part(Part(result.parent.id, result.parent.results[0].id, 0), "SUCCESS", 2)
        with Database(shop.dsn) as database:
            database.execute("DELETE FROM patchpilot.outbox")
            database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 min'")
            database.execute("UPDATE patchpilot.chord_part SET returned_at = now() - interval '1 min'")
        with redis.Redis.from_url(shop.broker) as here, redis.Redis.from_url(other) as there:
            there.delete("celery")
            for broker in (shop.broker, other):
                with Recovery(Site(broker, shop.dsn), stale=SOON) as recovery:
                    recovery.recover(NOW)
            assert (here.llen("celery"), there.llen("celery")) == (0, 1)


def test_results_are_read_and_told_of_where_and_as_the_application_at_hand_does_it(
    shop: Shop, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are pickled, which messages may not be, and their Valkey is another one than the broker."""
    forget_connections(app)
    monkeypatch.setitem(app.conf, "result_serializer", "pickle")
    monkeypatch.setitem(app.conf, "result_accept_content", ["json", "pickle"])
    monkeypatch.setitem(app.conf, "result_backend", f"patchpilot+{other}")
    monkeypatch.setitem(app.conf, "result_backend_transport_options", {"global_keyprefix": "shop:"})
    result = chord([boom.s()], total.s()).apply_async()
    part = Part(result.parent.id, result.parent.results[0].id, 0)
    app.backend.chords.return_part(part, "FAILURE", ValueError("boom"))
    with Database(shop.dsn) as database:
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 min'")
        database.execute("UPDATE patchpilot.chord_part SET returned_at = now() - interval '1 min'")
    with redis.Redis.from_url(other) as results, results.pubsub() as told, Recovery(site_of(app)) as recovery:
        told.psubscribe("*")
        told.get_message(timeout=30)
        assert [it.diagnosis for it in recovery.recover(NOW)] == ["error-path-lost"]
        message = told.get_message(timeout=30)
        assert message is not None
        assert message["channel"] == f"shop:celery-task-meta-{result.id}".encode()
    assert "boom" in str(result.result)
