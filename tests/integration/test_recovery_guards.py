"""What keeps recovery's hands off: workers that it cannot ask, and the guards in its statements."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any, LiteralString

import pytest
import redis
from celery import Signature, chain, chord
from kombu import Exchange, Queue

from patchpilot.clock import SYSTEM
from patchpilot.errors import NeedsOperator
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Finding, Recovery, Site, Window, evidence, hands
from patchpilot.recovery.housekeeping import Housekeeping
from tests.support.extras import mourns_long
from tests.support.processes import Shop
from tests.support.shop import add, app, boom, hold, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def told(findings: tuple[Finding, ...]) -> list[tuple[str, str, bool]]:
    return [(it.id, it.diagnosis, it.curable) for it in findings]


def test_what_workers_refuse_is_not_sent_again_for_ever(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """They acknowledge what they do not accept, and drop it. Of what began, something may come yet."""
    task = add.apply_async((1, 1), serializer="pickle").id
    worker = shop.worker("-c", "1")
    until(lambda: told(recovery.survey(NOW)) == [(task, "message-lost", True)], seconds=30, what="it was dropped")
    worker.stop()
    for _ in range(5):
        assert [it.id for it in recovery.recover(NOW)] == [task]
        assert broker.llen("celery") == 1
        broker.delete("celery")
    assert told(recovery.survey(NOW)) == [(task, "refused", False)]
    assert recovery.recover(NOW) == ()
    assert broker.llen("celery") == 0
    header = chord([add.s(1, 1)], total.s()).apply_async().parent.id
    broker.delete("celery")
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.outbox SET pushes = 5")
        assert told(recovery.survey(NOW)) == [(header, "header-refused", False), (task, "refused", False)]
        begun = """INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, lease_until)
                   SELECT scope, task_id, attempt, gen_random_uuid(), 'gone', now() FROM patchpilot.outbox
                   WHERE group_id IS NOT NULL"""
        database.execute(begun)
    assert [it.id for it in recovery.recover(NOW)] == [header]
    assert [it.id for it in recovery.sweep(NOW, assume_lost=True).applied] == [task]


def test_what_never_reached_the_broker_was_refused_by_nobody(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    task = add.delay(1, 1).id
    broker.delete("celery")
    broker.acl_setuser("default", enabled=True, commands=["-lpush"])
    try:
        for _ in range(6):
            assert recovery.recover(NOW) == ()
    finally:
        broker.acl_setuser("default", enabled=True, commands=["+lpush"])
    assert told(recovery.survey(NOW)) == [(task, "message-lost", True)]
    assert [it.id for it in recovery.recover(NOW)] == [task]
    assert broker.llen("celery") == 1


@pytest.mark.parametrize(
    ("settings", "topic", "prefix"),
    [
        ({"control_exchange": "mine"}, "/{database}.mine.pidbox", ""),
        (
            {"control_exchange": "mine", "broker_transport_options": {"global_keyprefix": "shop:"}},
            "/{database}.mine.pidbox", "shop:",
        ),
        ({"broker_transport_options": {"fanout_prefix": False}}, "celery.pidbox", ""),
    ],
    ids=["exchange", "exchange, keys with a prefix", "fanout prefix"],
    indirect=["prefix"],
)  # fmt: skip
def test_workers_that_are_asked_elsewhere_may_have_anything(
    shop: Shop, recovery: Recovery, settings: dict[str, Any], topic: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without patchpilot, so that nothing else tells of them; and nothing is adopted beside them."""
    options = settings.get("broker_transport_options", {})
    monkeypatch.setitem(app.conf, "broker_transport_options", options)
    gate = shop.directory / "gate"
    running = hold.apply_async((1, str(gate)))
    shop.worker("-c", "1", SHOP_STOCK="1", SHOP_BACKEND=shop.broker, SHOP_SETTINGS=json.dumps(settings))
    shop.await_line("hold began")
    [found] = recovery.survey(NOW)
    assert told((found,)) == [(running.id, "unknown", False)]
    listens = topic.format(database=shop.broker.rpartition("/")[2])
    assert f"workers listen on {listens}, where they are not asked: set celery.control_exchange" in found.reason
    here = Site(shop.broker, shop.dsn, key_prefix=prefix)
    with Housekeeping(here) as housekeeping, pytest.raises(NeedsOperator, match=listens):
        housekeeping.adopt()
    there = replace(
        here,
        control_exchange=settings.get("control_exchange", "celery"),
        fanout_prefix=options.get("fanout_prefix", True),
    )
    with Recovery(there, stale=timedelta(seconds=4)) as asking:
        assert asking.survey(NOW) == ()
        gate.touch()


def test_what_could_not_be_pushed_does_not_count_as_recovered(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """Not even beside a chord that takes two remedies at once."""
    gone = add.s(1, 1).set(queue="elsewhere", expires=SYSTEM.now() - timedelta(seconds=1))
    half = chord([gone, add.s(2, 2).set(queue="elsewhere")], total.s()).apply_async().parent.id
    odd = add.apply_async((5, 5)).id
    broker.delete("elsewhere", "celery")
    with Database(shop.dsn) as database:
        database.execute(
            "UPDATE patchpilot.outbox SET properties = %s WHERE task_id = %s", (b'{"compression":"?"}', odd)
        )
    sweep = recovery.sweep(NOW)
    assert {(it.id, it.curable) for it in sweep.findings} == {(half, True), (odd, True)}
    assert [(it.id, it.diagnosis) for it in sweep.applied] == [(half, "header-expired"), (half, "header-message-lost")]
    assert sweep.left == 1


@pytest.mark.parametrize("move", ["taken again", "given back"])
def test_what_changes_hands_while_recovery_looks_is_in_somebody_s(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    task = add.delay(1, 1).id
    raw = json.loads(broker.rpop("celery"))
    broker.hset("unacked", "tag", json.dumps([raw, "", "celery"]))
    if move == "taken again":
        broker.zadd("unacked_index", {"tag": SYSTEM.now().timestamp()})
    assert told(recovery.survey(NOW)) == [(task, "abandoned", True)]

    def meanwhile(*args: Any) -> hands.Hands:
        if move == "taken again":
            broker.zincrby("unacked_index", 1, "tag")
        else:
            broker.hdel("unacked", "tag")
        return hands.ask(*args)

    monkeypatch.setattr(evidence, "ask", meanwhile)
    assert recovery.survey(NOW) == ()


def test_what_another_recovery_has_sent_again_meanwhile_is_left_to_it(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = add.delay(1, 1).id
    broker.delete("celery")
    assert told(recovery.survey(NOW)) == [(task, "message-lost", True)]

    def meanwhile(*args: Any) -> hands.Hands:
        with Database(shop.dsn) as database:
            database.execute("UPDATE patchpilot.outbox SET resends = resends + 1")
        return hands.ask(*args)

    monkeypatch.setattr(evidence, "ask", meanwhile)
    assert recovery.survey(NOW) == ()


def test_what_has_been_running_for_long_does_not_tell_that_its_header_is_being_pushed(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    gate = shop.directory / "gate"
    header = [hold.s(1, str(gate)), add.s(1, 1).set(queue="elsewhere")]
    result = chord(header, total.s()).apply_async().parent
    broker.delete("elsewhere")
    shop.worker("-c", "1")
    shop.await_line("hold began")
    lost = [(result.id, "header-message-lost", True)]
    until(lambda: told(recovery.survey(NOW)) == lost, seconds=30, what="it had begun before recovery looked")
    gate.touch()


@pytest.mark.parametrize("header", [boom.s(), chain(boom.s(), add.s(1)), chain(add.s(1, 1), boom.s(), add.s(1))])
def test_a_chord_whose_errback_takes_longer_than_the_claim_is_its_worker_s_as_long_as_that_lives(
    shop: Shop, recovery: Recovery, header: Signature
) -> None:
    """Which part of its header failed does not matter: a chain fails at its beginning or on the way."""
    gate = shop.directory / "gate"
    worker = shop.worker("-c", "1", "-I", "tests.support.extras", SHOP_CLAIM_LEASE="1")
    failing = chord([header], total.s().on_error(mourns_long.s(gate=str(gate)))).apply_async().parent.id
    shop.await_line("mourning began")
    with Database(shop.dsn) as database:
        over = "SELECT FROM patchpilot.chord WHERE state = 'claimed' AND claim_until < now()"
        until(lambda: database.fetch(over) != [], seconds=30, what="the lease was over")
    assert [recovery.recover(NOW) for _ in range(3)] == [()] * 3
    worker.kill()
    found = [(failing, "dispatch-interrupted", True)]
    until(lambda: told(recovery.survey(NOW)) == found, seconds=30, what="its worker counted as dead")
    assert [it.id for it in recovery.recover(NOW)] == [failing]
    gate.touch()
    shop.worker("-c", "1", "-I", "tests.support.extras")
    shop.await_line("mourning ended")
    assert shop.ledger().count("mourning began") == 2


@pytest.mark.parametrize(("dead_after", "diagnosis"), [(10, "message-lost"), (60, "unknown")])
def test_how_long_a_worker_may_be_silent_the_site_says(
    shop: Shop, broker: redis.Redis, dead_after: int, diagnosis: str
) -> None:
    task = add.delay(1, 1).id
    broker.delete("celery")
    site = Site(shop.broker, shop.dsn, dead_after=timedelta(seconds=dead_after))
    with Database(shop.dsn) as database, Recovery(site) as recovery:
        database.execute(
            """INSERT INTO patchpilot.worker (instance, name, seen_at)
               VALUES (gen_random_uuid(), 'silent', now() - interval '30 s')"""
        )
        assert told(recovery.survey(NOW)) == [(task, diagnosis, diagnosis == "message-lost")]


def test_what_is_only_watched_is_never_taken(shop: Shop) -> None:
    add.delay(1, 1)
    with Database(shop.dsn) as database:
        sql = "UPDATE patchpilot.outbox SET shadow = true RETURNING message_id::text AS message_ids, resends, sent_at"
        [row] = database.fetch(sql)
        asked = {name: [value] for name, value in row.items()}
        assert database.fetch(evidence.SQL["take"], asked) == []
        database.execute("UPDATE patchpilot.outbox SET shadow = false")
        assert len(database.fetch(evidence.SQL["take"], asked)) == 1


def test_what_is_only_watched_is_never_ended(shop: Shop) -> None:
    chord([add.s(1, 1)], total.s()).apply_async()
    left = "SELECT (SELECT count(*) FROM patchpilot.outbox), (SELECT count(*) FROM patchpilot.result) AS results"
    with Database(shop.dsn) as database:
        [row] = database.fetch("UPDATE patchpilot.outbox SET shadow = true RETURNING message_id::text, resends")
        asked = {
            "message_ids": [row["message_id"]], "resends": [row["resends"]], "metas": [b"x"], "payloads": [b"x"],
            "expires": timedelta(days=1),
        }  # fmt: skip
        database.execute(evidence.SQL["revoke"], asked)
        assert database.fetch(left) == [{"count": 1, "results": 0}]
        database.execute("UPDATE patchpilot.outbox SET shadow = false")
        database.execute(evidence.SQL["revoke"], asked)
        assert database.fetch(left) == [{"count": 0, "results": 1}]


def test_of_several_recoveries_that_saw_a_message_one_takes_it(shop: Shop) -> None:
    add.delay(1, 1)
    with Database(shop.dsn) as database:
        [row] = database.fetch("SELECT message_id::text AS message_ids, resends, sent_at FROM patchpilot.outbox")
        asked = {name: [value] for name, value in row.items()}
        assert [len(database.fetch(evidence.SQL["take"], asked)) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("taken", [False, True])
def test_a_topic_exchange_that_another_process_declared_is_known_by_its_bindings(
    shop: Shop, broker: redis.Redis, *, taken: bool
) -> None:
    news = Queue("news", Exchange("papers", type="topic"), routing_key="news.#")
    task = add.apply_async((1, 1), queue=news, routing_key="news.today").id
    [raw] = broker.lrange("news", 0, -1)
    broker.delete("news")
    if taken:
        broker.hset("unacked", "tag", json.dumps([json.loads(raw), "papers", "news.today"]))
        broker.zadd("unacked_index", {"tag": SYSTEM.now().timestamp()})
    # With other options, which mean the same, no connection is shared with the application of this process.
    with Recovery(Site(shop.broker, shop.dsn, fanout_prefix="/{db}.")) as other:
        assert [it.id for it in other.recover(NOW)] == [task]
    assert [json.loads(it)["headers"]["id"] for it in broker.lrange("news", 0, -1)] == [task]


def test_a_part_is_recorded_once(shop: Shop) -> None:
    result = chord([add.s(1, 1)], total.s()).apply_async().parent
    columns: dict[str, Any] = {"group_ids": [result.id], "task_ids": [result.results[0].id], "payloads": [b"x"]}
    with Database(shop.dsn) as database:
        [row] = database.fetch("SELECT created_at FROM patchpilot.chord")
        columns["created_at"] = [row["created_at"] - timedelta(seconds=1)]  # it has begun anew since
        assert database.fetch(evidence.SQL["record_parts"], {**columns, "states": ["SUCCESS"]}) == []
        columns["created_at"] = [row["created_at"]]
        assert len(database.fetch(evidence.SQL["record_parts"], {**columns, "states": ["SUCCESS"]})) == 1
        assert database.fetch(evidence.SQL["record_parts"], {**columns, "states": ["FAILURE"]}) == []
        assert database.fetch("SELECT state FROM patchpilot.chord_part") == [{"state": "SUCCESS"}]


def test_the_message_of_a_task_that_has_ended_is_closed_unless_somebody_has_sent_it_again(shop: Shop) -> None:
    sent = add.delay(1, 1)
    with Database(shop.dsn) as database:
        [row] = database.fetch("UPDATE patchpilot.outbox SET resends = 1 RETURNING message_id::text")
        for ended, resends, left in ((False, 1, 1), (True, 0, 1), (True, 1, 0)):
            if ended:
                app.backend.store_result(sent.id, 2, "SUCCESS")
            seen = {"message_ids": [row["message_id"]], "resends": [resends]}
            database.execute(evidence.SQL["close_ended"], seen)
            assert len(database.fetch("SELECT FROM patchpilot.outbox")) == left


@pytest.mark.parametrize(
    "change",
    [
        "chord SET publish_error = 'E' WHERE state = 'open'",
        "chord SET shadow = true WHERE state = 'open'",
        "chord_part SET state = 'FAILURE', payload = 'x', returned_at = now()",
    ],
)
def test_around_a_chord_that_failed_one_that_does_not_wait_for_it_or_is_left_alone_is_not_ended(
    shop: Shop, change: LiteralString
) -> None:
    """Its sending raised, or it is only watched; or somebody has returned the part, and is at the end of it himself."""
    chord([chord([add.s(1, 1)], total.s(label="inner")), add.s(2, 2)], total.s(label="outer")).apply_async()
    with Database(shop.dsn) as database:
        database.execute(
            """UPDATE patchpilot.chord SET state = 'failed', finished_at = now()
               WHERE callback_id IN (SELECT task_id FROM patchpilot.chord_part)"""
        )
        asked = {"task_ids": [row["callback_id"] for row in database.fetch("SELECT callback_id FROM patchpilot.chord")]}
        assert len(database.fetch(evidence.SQL["around"], asked)) == 1
        database.execute(f"UPDATE patchpilot.{change}")
        assert database.fetch(evidence.SQL["around"], asked) == []


def test_workers_that_do_not_say_what_they_consume_may_have_anything() -> None:
    row = {"queue": "celery", "routing_key": "celery", "exchange": ""}
    assert hands.Hands(places=None).may_have(row)
    assert hands.Hands(places=frozenset({"celery"})).may_have(row)
    assert not hands.Hands(places=frozenset({"other"})).may_have(row)


@pytest.mark.parametrize("taken", [False, True], ids=["lost", "taken"])
@pytest.mark.parametrize(("kind", "pattern"), [("topic", "news.#"), ("direct", "news.today")])
def test_into_an_exchange_that_has_lost_its_bindings_nothing_is_sent(
    shop: Shop, broker: redis.Redis, kind: str, pattern: str, *, taken: bool
) -> None:
    """Nor taken from the unacknowledged. It is said, and when the binding is back it is sent."""
    news = Queue("news", Exchange("papers", type=kind), routing_key=pattern)
    with app.connection_for_write() as connection:
        news.bind(connection.default_channel).declare()
        task = add.apply_async((1, 1), exchange="papers", routing_key="news.today", connection=connection).id
    beside = add.delay(2, 2).id
    [raw] = broker.lrange("news", 0, -1)
    broker.delete("news", "celery", "_kombu.binding.papers")
    if taken:
        broker.hset("unacked", "tag", json.dumps([json.loads(raw), "papers", "news.today"]))
        broker.zadd("unacked_index", {"tag": SYSTEM.now().timestamp()})
    said: list[tuple[str, str]] = []
    site = Site(shop.broker, shop.dsn, fanout_prefix="/{db}.")
    with Recovery(site, complain=lambda finding, error: said.append((finding.id, str(error)))) as other:
        passes = [other.recover(NOW) for _ in range(evidence.RESENDS + 2)]
        assert [[it.id for it in applied] for applied in passes[:1]] == [[beside]]
        assert not any(passes[1:])
        assert {it[0] for it in said} == {task}
        assert said[0][1].startswith("no queue is bound to exchange 'papers' for routing key 'news.today'")
        assert broker.hexists("unacked", "tag") == taken
        with app.connection_for_write() as connection:
            news.bind(connection.default_channel).declare()
        assert [it.id for it in other.recover(NOW)] == [task]
    assert [json.loads(it)["headers"]["id"] for it in broker.lrange("news", 0, -1)] == [task]
