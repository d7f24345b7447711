"""What is on record, and what workers say, as recovery understands it: one case for each comparison that it makes."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import timedelta
from typing import Any, LiteralString
from uuid import uuid4

import pytest
import redis
from celery import chord

from patchpilot.backend.message import Part
from patchpilot.clock import SYSTEM
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Finding, Recovery, Window, evidence, hands
from patchpilot.recovery.quiet import Outside
from patchpilot.recovery.remedy import Remedies
from patchpilot.valkey.broker import MESSAGE_ID, Broker
from tests.support.processes import Shop
from tests.support.shop import add, app, hold, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def told(findings: Collection[Finding]) -> list[tuple[str, str, bool]]:
    return [(it.id, it.diagnosis, it.curable) for it in findings]


def write(shop: Shop, *statements: LiteralString) -> None:
    with Database(shop.dsn) as database:
        for statement in statements:
            database.execute(statement)


def workers_say(patch: pytest.MonkeyPatch, running: Collection[str] = (), silent: Collection[str] = ()) -> None:
    """Have workers answer that of the tasks they are asked about they run these; or not answer."""

    def ask(_asking: object, _message_ids: Collection[str], task_ids: Collection[str]) -> hands.Hands:
        return hands.Hands(active=frozenset(running) & frozenset(task_ids), silent=frozenset(silent))

    patch.setattr(evidence, "ask", ask)


def test_a_chord_is_as_old_as_its_last_message(shop: Shop, recovery: Recovery) -> None:
    """What a recovery has just sent again, the next leaves alone for a while."""
    chord([add.s(1, 1)], total.s()).apply_async()
    write(shop, "UPDATE patchpilot.chord SET created_at = now() - interval '1 h'")
    assert recovery.look(Window()).quiet.outside == Outside(young=1)
    write(shop, "UPDATE patchpilot.outbox SET sent_at = now() - interval '1 h'")
    assert recovery.look(Window()).quiet.outside == Outside()


def test_whoever_runs_one_of_the_last_parts_of_a_chord_may_be_finishing_it(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large one, too: those that returned last, whatever the order, and those that ended and did not return."""
    header = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().parent
    ended = [part.id for part in header.results]
    for task_id in ended:
        app.backend.store_result(task_id, 2, "SUCCESS")
    write(
        shop,
        "UPDATE patchpilot.chord SET created_at = now() - interval '1 h'",
        "UPDATE patchpilot.outbox SET sent_at = now() - interval '1 h', recorded_at = now() - interval '1 h'",
        "UPDATE patchpilot.result SET stored_at = now() - interval '10 min'",
        """INSERT INTO patchpilot.chord_part (group_id, position, task_id, state, payload, returned_at)
           SELECT group_id, n, 'part' || n, 'SUCCESS', '2', now() - interval '10 min' - n * interval '1 s'
           FROM patchpilot.chord, generate_series(2, 151) n""",
    )
    workers_say(monkeypatch)
    assert told(recovery.survey(NOW)) == [(header.id, "part-return-interrupted", True)]
    for task_id in (*ended, "part2", "part3", "part20"):
        workers_say(monkeypatch, running=[task_id])
        look = recovery.look(NOW)
        assert (look.findings, look.quiet.chords["finishing"]) == ((), 1)
    write(
        shop,
        """UPDATE patchpilot.chord_part SET state = 'SUCCESS', payload = '2', returned_at = now() - interval '1 h'
           WHERE state IS NULL""",
    )
    assert recovery.look(NOW).quiet.chords["finishing"] == 1
    workers_say(monkeypatch)
    assert told(recovery.survey(NOW)) == [(header.id, "dispatch-lost", True)]


def test_a_chord_that_is_complete_waits_for_who_does_not_answer_but_not_for_ever(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody but the claim keeps a worker and recovery from finishing it together."""
    header = chord([add.s(1, 1)], total.s()).apply_async().parent
    app.backend.chords.return_part(Part(header.id, header.results[0].id, 0), "SUCCESS", 2)
    write(
        shop,
        "DELETE FROM patchpilot.outbox",
        "UPDATE patchpilot.chord SET created_at = now() - interval '1 h'",
        "UPDATE patchpilot.chord_part SET returned_at = now() - interval '10 s'",
    )
    stuck = [(header.id, "dispatch-lost", True)]
    workers_say(monkeypatch)
    assert told(recovery.survey(NOW)) == stuck
    workers_say(monkeypatch, silent=["w"])
    assert recovery.look(NOW).quiet.chords == {"finishing": 1}
    write(shop, "UPDATE patchpilot.chord_part SET returned_at = now() - interval '3 min'")
    assert told(recovery.survey(NOW)) == stuck
    write(
        shop,
        """UPDATE patchpilot.chord
           SET state = 'claimed', claim_token = gen_random_uuid(), claim_until = now() - interval '1 s'""",
    )
    assert recovery.look(NOW).quiet.chords == {"finishing": 1}, "who does not answer may be at its errbacks"
    workers_say(monkeypatch)
    assert told(recovery.survey(NOW)) == [(header.id, "dispatch-interrupted", True)]
    workers_say(monkeypatch, silent=["w"])
    write(shop, "UPDATE patchpilot.chord_part SET returned_at = now() - interval '10 s'")
    write(shop, "UPDATE patchpilot.chord SET state = 'open', claim_token = NULL, claim_until = NULL")
    assert told(recovery.sweep(NOW, assume_lost=True).findings) == stuck


BEGUN = "UPDATE patchpilot.fence SET starts = 1"


@pytest.mark.parametrize(
    "end",
    [
        "UPDATE patchpilot.fence SET finished_at = now()",
        "UPDATE patchpilot.fence SET lease_until = now() + interval '1 h'",
        BEGUN,
    ],
    ids=["ended", "runs", "began"],
)
def test_only_a_start_of_the_attempt_that_a_message_is_tells_of_it(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch, end: LiteralString
) -> None:
    """A retry goes by the id of its task, whose first attempt is over; or was being cleared away when it was sent."""
    task = add.delay(1, 1).id
    broker.delete("celery")
    workers_say(monkeypatch)
    write(
        shop,
        "UPDATE patchpilot.outbox SET pushes = 5",
        """INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, lease_until)
           SELECT scope, task_id, 'another', gen_random_uuid(), 'w', now() - interval '1 h' FROM patchpilot.outbox""",
        end,
    )
    assert told(recovery.survey(NOW)) == [(task, "refused", False)]
    write(shop, "UPDATE patchpilot.fence SET attempt = (SELECT attempt FROM patchpilot.outbox)")
    assert told(recovery.survey(NOW)) == ([(task, "message-lost", True)] if end is BEGUN else [])


def test_the_message_of_a_task_that_has_ended_is_closed(shop: Shop, recovery: Recovery) -> None:
    ended, _ = add.delay(1, 1), add.delay(2, 2)
    app.backend.store_result(ended.id, 2, "SUCCESS")
    assert recovery.recover(NOW) == ()
    with Database(shop.dsn) as database:
        assert ended.id not in [row["task_id"] for row in database.fetch("SELECT task_id FROM patchpilot.outbox")]
        assert len(database.fetch("SELECT FROM patchpilot.outbox")) == 1


def test_beside_a_part_that_was_interrupted_one_with_the_result_of_another_time_is_not_recorded(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header was sent before, under the same ids; whoever runs that part is not at the end of the chord."""
    header = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().parent
    again, interrupted = header.results
    workers_say(monkeypatch, running=[again.id])
    write(
        shop,
        "UPDATE patchpilot.chord SET created_at = now() - interval '1 min'",
        "UPDATE patchpilot.outbox SET recorded_at = now() - interval '1 min'",
    )
    app.backend.store_result(again.id, 2, "SUCCESS")
    write(shop, "UPDATE patchpilot.result SET stored_at = now() - interval '1 h'")
    assert recovery.survey(NOW) == ()
    app.backend.store_result(interrupted.id, 2, "SUCCESS")
    lately = "UPDATE patchpilot.result SET stored_at = {} WHERE stored_at > now() - interval '10 min'"
    write(shop, lately.format("now() + interval '1 min'"))
    assert recovery.survey(NOW) == (), "it may still be returned"
    write(shop, lately.format("now() - interval '30 s'"))
    assert [(it.id, it.diagnosis) for it in recovery.recover(NOW)] == [(header.id, "part-return-interrupted")]
    with Database(shop.dsn) as database:
        parts = database.fetch("SELECT state FROM patchpilot.chord_part ORDER BY position")
    assert [part["state"] for part in parts] == [None, "SUCCESS"]


def test_a_part_that_returned_before_its_message_was_written_down_says_nothing_of_it(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a chain that was delivered twice sends its chord's header twice."""
    header = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().parent
    broker.delete("celery")
    app.backend.chords.return_part(Part(header.id, header.results[0].id, 0), "SUCCESS", 2)
    workers_say(monkeypatch)
    [found] = recovery.survey(NOW)
    assert (found.diagnosis, len(found.messages)) == ("header-message-lost", 1)
    write(shop, "UPDATE patchpilot.chord_part SET returned_at = returned_at - interval '1 h' WHERE state IS NOT NULL")
    [found] = recovery.survey(NOW)
    assert (found.diagnosis, len(found.messages)) == ("header-message-lost", 2)


def test_what_has_ended_meanwhile_is_not_ended_as_expired(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result stays, and is what its part is recorded from."""
    expired = add.s(1, 1).set(queue="elsewhere", expires=SYSTEM.now() - timedelta(seconds=1))
    waiting = chord([expired, add.s(2, 2)], total.s()).apply_async()
    task = waiting.parent.results[0]
    broker.delete("elsewhere")
    revoke = Remedies._revoke

    def late(self: Remedies, *args: Any) -> set[str]:
        app.backend.store_result(task.id, 2, "SUCCESS")
        return revoke(self, *args)

    workers_say(monkeypatch)
    monkeypatch.setattr(Remedies, "_revoke", late)
    assert [(it.diagnosis, it.remedy) for it in recovery.sweep(NOW).findings] == [("header-expired", "revoke-part")]
    assert task.state == "SUCCESS"
    with Database(shop.dsn) as database:
        parts = database.fetch("SELECT state FROM patchpilot.chord_part ORDER BY position")
    assert [part["state"] for part in parts] == ["SUCCESS", None]


@pytest.mark.parametrize("counting", ["valkey"], indirect=True)
def test_from_a_recovery_on_parts_are_counted_in_postgresql(shop: Shop, recovery: Recovery) -> None:
    """The count in Valkey was cut short before it. Nobody would see that until the last part has returned."""
    header = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().parent
    one, other = (Part(header.id, part.id, place) for place, part in enumerate(header.results))
    app.backend.chords.return_part(one, "SUCCESS", 2)
    assert recovery.recover(NOW) == ()
    returned = app.backend.chords.return_part(other, "SUCCESS", 4)
    assert returned.counted_here


def test_a_long_queue_is_read_in_pages(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    result = chord([add.s(i, i) for i in range(2500)], total.s()).apply_async()
    assert recovery.survey(NOW) == ()
    for place in (1, 1000, 2496):  # of those that are left each time
        broker.lrem("celery", 1, broker.lindex("celery", place))
    broker.config_resetstat()
    [found] = recovery.survey(NOW)
    assert (found.id, found.diagnosis, len(found.messages)) == (result.parent.id, "header-message-lost", 3)
    pages = broker.info("commandstats")["cmdstat_lrange"]["calls"]
    # Twice: each of ten priorities to its end, and three full pages.
    assert pages <= 2 * (10 + 3)


def test_what_stays_in_a_queue_that_moves_while_it_is_read_is_seen(
    shop: Shop, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one end messages arrive, at the other they are taken."""

    def queued(message_id: str) -> str:
        return json.dumps({"body": "", "properties": {}, "headers": {MESSAGE_ID: message_id}})

    ids = [str(number) for number in range(5000)]
    broker.lpush("celery", *(queued(it) for it in ids))
    lrange = redis.Redis.lrange
    rounds = 0

    def moving(self: redis.Redis, name: str, start: int, end: int) -> Any:
        nonlocal rounds
        rounds += name == "celery"
        page = lrange(self, name, start, end)
        broker.lpush("celery", queued(f"new {rounds}"))
        broker.rpop("celery")
        return page

    monkeypatch.setattr(redis.Redis, "lrange", moving)
    left = ids[20:]
    assert not {*left} - Broker(shop.broker).holdings(["celery"]).queued
    assert 2 < rounds < 20


def test_what_workers_without_patchpilot_run_and_remember_is_believed(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    """One may be finishing a chord; and what one knows to be revoked nobody sends again."""
    gate, revoked = shop.directory / "gate", str(uuid4())
    header = chord([hold.s(1, str(gate))], total.s()).apply_async().parent
    shop.worker("-c", "1", SHOP_STOCK="1", SHOP_BACKEND=shop.broker)
    shop.await_line("hold began")
    app.backend.chords.return_part(Part(header.id, header.results[0].id, 0), "SUCCESS", 1)
    write(
        shop,
        "UPDATE patchpilot.chord SET created_at = now() - interval '1 h'",
        "UPDATE patchpilot.outbox SET sent_at = now() - interval '1 h'",
        "UPDATE patchpilot.chord_part SET returned_at = now() - interval '10 min'",
    )
    app.control.revoke(revoked)
    until(lambda: revoked in str(app.control.inspect(timeout=1).revoked()), seconds=30, what="the worker heard of it")
    add.apply_async((1, 1), task_id=revoked, queue="elsewhere")
    broker.delete("elsewhere")
    look = recovery.look(NOW)
    assert (told(look.findings), look.quiet.chords) == ([(revoked, "revoked", False)], {"finishing": 1})
    gate.touch()
