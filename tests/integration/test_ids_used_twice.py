"""One task id for two messages: what the one came to is not taken for what becomes of the other. On real servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from uuid import uuid4

import pytest
import redis
from billiard.exceptions import TimeLimitExceeded
from celery import Signature, chord, group
from celery.app.task import Context

from patchpilot.backend.config import MESSAGE_ID, ORIGIN
from patchpilot.backend.message import Part
from patchpilot.backend.purge import purge
from patchpilot.clock import SYSTEM
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.recovery import Recovery, Window
from tests.support.processes import Shop
from tests.support.shop import add, again, app, boom, later, mourn, note, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


@pytest.fixture
def database(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """The record; a part whose task has ended is missed at once."""
    monkeypatch.setattr("patchpilot.recovery.evidence.INTERRUPTED_AFTER", timedelta())
    with Database(shop.dsn) as opened:
        yield opened


def messages(database: Database) -> set[str]:
    return {str(row["message_id"]) for row in database.fetch("SELECT message_id FROM patchpilot.outbox")}


def consume_the_others() -> None:
    ask = partial(app.control.add_consumer, "later", reply=True, limit=1)
    until(lambda: ask(timeout=5) != [], seconds=30, what="the worker took to the other queue")


def one_callback_of_two_chords() -> None:
    for queue in ("later", "celery"):
        callback = note.s(label=queue).set(task_id="report", queue=queue)
        chord([add.s(1, 1)], callback).apply_async()


def one_header_of_two_chords() -> None:
    header = group(add.si(1, 1), add.si(2, 2))
    header.freeze()
    first, second = header | note.s(label="celery"), header | note.s(label="later")
    second.apply_async(queue="later")
    first.apply_async()


def one_callback_of_two_chords_of_which_one_fails() -> None:
    for queue, header in (("later", add.s(1, 1)), ("celery", boom.si())):
        callback = note.s(label=queue).set(task_id="report", queue=queue).on_error(mourn.s())
        chord([header], callback).apply_async()


def one_that_sends_itself_again() -> None:
    again.apply_async((1,), task_id="poll")


def one_that_is_sent_twice() -> None:
    for queue in ("later", "celery"):
        note.apply_async((1,), {"label": queue}, task_id="nightly", queue=queue)


FAILED = "mourn"

USES = {
    one_callback_of_two_chords: (1, ["callback-message-lost"], ["celery [2]"], ["later [2]"]),
    one_header_of_two_chords: (2, ["header-message-lost"], ["celery [2, 4]"], ["add 1 1", "add 2 2", "later [2, 4]"]),
    one_callback_of_two_chords_of_which_one_fails: (1, ["callback-message-lost"], [FAILED], ["later [2]"]),
    one_that_sends_itself_again: (1, ["message-lost"], ["again 1"], ["again 0"]),
    one_that_is_sent_twice: (1, ["message-lost"], ["celery 1"], ["later 1"]),
}
"""How many messages wait in the queue ``later``, what their loss is called, what has run before, and what runs then."""


@pytest.mark.parametrize("send", USES, ids=lambda it: it.__name__)
def test_what_one_message_came_to_says_nothing_of_the_other(
    shop: Shop, recovery: Recovery, broker: redis.Redis, database: Database, send: Callable[[], None]
) -> None:
    waiting, lost, before, then = USES[send]
    send()
    shop.worker("-c", "1", "-Q", "celery")
    for line in before:
        until(lambda line=line: any(it.startswith(line) for it in shop.ledger()), seconds=30, what=f"{line} had run")
    until(lambda: broker.llen("later") == len(messages(database)) == waiting, seconds=30, what="the others had ended")
    on_record, ran = messages(database), shop.ledger()

    assert recovery.survey(NOW) == recovery.recover(NOW) == ()  # nothing of it is lost yet
    assert (messages(database), broker.llen("later"), shop.ledger()) == (on_record, waiting, ran)

    broker.delete("later")
    assert [it.diagnosis for it in recovery.recover(NOW)] == lost
    assert (messages(database), broker.llen("later")) == (on_record, waiting)
    consume_the_others()
    until(lambda: len(shop.ledger()) >= len([*ran, *then]), seconds=30, what="they had run as well")
    until(lambda: messages(database) == set(), seconds=30, what="they had ended as well")
    assert sorted(shop.ledger()) == sorted([*ran, *then])
    assert recovery.survey(NOW) == recovery.recover(NOW) == ()


def test_a_chord_that_failed_fails_the_one_around_it_and_no_other(
    shop: Shop, recovery: Recovery, database: Database
) -> None:
    """Even if the callback of a chord in that has the same task id."""
    sent = []
    for queue, header in (("later", add.s(1, 1)), ("celery", boom.si())):
        inner = chord([header.set(queue=queue)], total.s().set(task_id="report"))
        sent.append(chord([inner], note.s(label=queue)).apply_async())
    failing = sent[1]
    shop.worker("-c", "1", "-Q", "celery")
    until(lambda: app.AsyncResult("report").state == "FAILURE", seconds=30, what="the chord within had failed")
    until(lambda: recovery.survey(NOW) != (), seconds=30, what="that was on record for a while")
    assert [(it.id, it.diagnosis) for it in recovery.recover(NOW)] == [(failing.parent.id, "part-return-interrupted")]
    assert failing.state == "FAILURE"
    consume_the_others()
    shop.await_line("later [2]")
    assert shop.ledger() == ["add 1 1", "total 2", "later [2]"]


def test_what_is_lost_of_a_header_and_has_expired_ends_its_own_chord(
    shop: Shop, recovery: Recovery, broker: redis.Redis, database: Database
) -> None:
    """However the task of the same id in another header ended."""
    over = add.s(1, 1).set(task_id="part", queue="later", expires=SYSTEM.now() - timedelta(seconds=1))
    expired = chord([over], total.s(label="expired")).apply_async()
    well = chord([add.s(1, 1).set(task_id="part")], total.s(label="well")).apply_async()
    shop.worker("-c", "1", "-Q", "celery")
    assert well.get(timeout=30) == 2
    broker.delete("later")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["header-expired"]
    assert expired.state == "FAILURE"
    assert app.AsyncResult("part").state == "SUCCESS"
    assert recovery.survey(NOW) == ()


def sent_twice(database: Database) -> tuple[str, str]:
    """Two messages with one task id, long ago. The first one has ended, and its worker could not say so here."""
    for number in (1, 2):
        note.apply_async((number,), task_id="nightly")
    database.execute("UPDATE patchpilot.outbox SET sent_at = now() - interval '30 d'")
    first, second = database.fetch("SELECT message_id::text AS id FROM patchpilot.outbox ORDER BY recorded_at")
    app.backend.store_result("nightly", 1, "SUCCESS", request=Context(id="nightly", **{MESSAGE_ID: first["id"]}))
    return first["id"], second["id"]


def test_what_is_over_is_taken_away_and_nothing_else(shop: Shop, database: Database) -> None:
    """Whatever it was that somebody saw before."""
    over, well = sent_twice(database)
    asked = {"group_id": None, "callback_ids": ["nightly"], "created_at": SYSTEM.now() - timedelta(days=1)}
    assert len(database.fetch(queries("inventory")["callback_messages"], asked)) == 1
    assert purge(database, timedelta(days=7))["messages"] == 1
    assert messages(database) == {well}

    close = queries("recovery")["close_ended"]
    assert database.execute(close, {"message_ids": [over, well], "resends": [0, 0]}) == 0
    database.execute(
        """INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, lease_until, finished_at)
        SELECT scope, task_id, attempt, gen_random_uuid(), 'w', now(), NULL FROM patchpilot.outbox"""
    )
    assert database.execute(close, {"message_ids": [well], "resends": [0]}) == 0
    database.execute("UPDATE patchpilot.fence SET finished_at = now()")
    assert database.execute(close, {"message_ids": [well], "resends": [0]}) == 1


def test_a_message_is_closed_whose_part_has_returned(shop: Shop, database: Database) -> None:
    """If it is the only one of its task id in the header; else when all of them have."""
    header = [add.s(1, 1), add.s(2, 2).set(task_id="twice"), add.s(2, 2).set(task_id="twice")]
    [single, *_] = (result := chord(header, total.s()).apply_async()).parent.results
    close = queries("recovery")["close_ended"]
    params = {"message_ids": sorted(messages(database)), "resends": [0, 0, 0]}
    assert database.execute(close, params) == 0
    for task_id, position, closed in ((single.id, 0, 1), ("twice", 1, 0), ("twice", 2, 2)):
        app.backend.chords.return_part(Part(result.parent.id, task_id, position), "SUCCESS", 2)
        assert database.execute(close, params) == closed


def test_a_message_is_closed_whose_task_has_ended(shop: Shop, database: Database) -> None:
    over, well = sent_twice(database)
    assert database.execute(queries("recovery")["close_ended"], {"message_ids": [over, well], "resends": [0, 0]}) == 1
    assert messages(database) == {well}


def test_parts_are_recorded_of_what_ended_in_their_own_header(
    shop: Shop, recovery: Recovery, database: Database
) -> None:
    """Of two that are awaited the one was interrupted; of the other only the task id has ended, elsewhere."""
    header = [add.s(1, 1).set(task_id="once"), add.s(2, 2).set(task_id="twice")]
    waiting = chord(header, total.s()).apply_async()
    app.backend.store_result("once", 2, "SUCCESS", request=Context(id="once", group=waiting.parent.id))
    app.backend.store_result("twice", 4, "SUCCESS", request=request("another"))
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["part-return-interrupted"]
    assert database.fetch("SELECT task_id FROM patchpilot.chord_part WHERE state IS NULL") == [{"task_id": "twice"}]


def test_what_recovery_ends_names_its_message(
    shop: Shop, recovery: Recovery, broker: redis.Redis, database: Database
) -> None:
    over = add.s(1, 1).set(expires=SYSTEM.now() - timedelta(seconds=1))
    expired = chord([over], total.s()).apply_async()
    [message_id] = messages(database)
    broker.delete("celery")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["header-expired"]
    stored = "SELECT message_id::text, group_id FROM patchpilot.result WHERE state = 'REVOKED'"
    assert database.fetch(stored) == [{"message_id": message_id, "group_id": expired.parent.id}]


def request(group_id: str | None = None, **more: object) -> Context:
    """As a worker has it of the task ``twice``."""
    return Context(id="twice", task=add.name, group=group_id, **{MESSAGE_ID: str(uuid4()), **more})


def test_a_time_limit_ends_the_task_that_it_struck(shop: Shop, database: Database) -> None:
    """And not only if no task of its id has ever succeeded."""
    result = chord([add.s(1, 1).set(task_id="twice")], total.s()).apply_async()
    app.backend.mark_as_done("twice", 2, request())
    struck = request(result.parent.id, chord=total.s())
    app.backend.mark_as_failure("twice", TimeLimitExceeded(1), request=struck)
    assert database.fetch("SELECT state FROM patchpilot.chord_part") == [{"state": "FAILURE"}]


def test_whose_a_result_is(shop: Shop, database: Database) -> None:
    """Of the message by which its task began. What is not final yet, or is told of another task, is nobody's."""
    began, retried = str(uuid4()), request("g", **{ORIGIN: str(uuid4())})
    stored: list[tuple[str, Context | None, tuple[str | None, str | None]]] = [
        ("STARTED", request(), (None, None)),
        ("FAILURE", None, (None, None)),
        ("FAILURE", Context(id="another", **{MESSAGE_ID: began}), (None, None)),
        ("FAILURE", Context(id="twice", group="g"), (None, "g")),
        ("FAILURE", request(**{MESSAGE_ID: began}), (began, "")),
        ("RETRY", retried, (None, None)),
        ("REVOKED", retried, (retried.get(ORIGIN), "g")),
    ]
    for state, by, whose in stored:
        app.backend.store_result("twice", None, state, request=by)
        [row] = database.fetch("SELECT state, message_id::text, group_id FROM patchpilot.result")
        assert (row["state"], (row["message_id"], row["group_id"])) == (state, whose)


KEEP = """
CREATE TABLE kept (LIKE patchpilot.outbox);
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO kept VALUES (OLD.*); RETURN OLD; END';
CREATE TRIGGER keep BEFORE DELETE ON patchpilot.outbox FOR EACH ROW EXECUTE FUNCTION keep();
"""
"""Keep what is taken out of the outbox."""


def test_the_end_of_a_retry_is_that_of_every_attempt(shop: Shop, recovery: Recovery, database: Database) -> None:
    """Even if no worker could say so of their messages."""
    database.run(lambda connection: connection.execute(KEEP.encode()))
    shop.worker("-c", "1")
    later.apply_async(("later", 0)).get(timeout=30)
    until(lambda: messages(database) == set(), seconds=30, what="both attempts had ended")
    database.execute("DROP TRIGGER keep ON patchpilot.outbox")
    assert database.execute("INSERT INTO patchpilot.outbox SELECT * FROM kept") == 2
    assert recovery.recover(NOW) == ()
    assert messages(database) == set()


BEFORE = {
    "end": """
        CALL patchpilot.end_task(
            %(task_id)s, 'SUCCESS', %(meta)s, NULL, NULL, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
        )
    """,
    "store": """
        INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at)
        VALUES (%(task_id)s, 'SUCCESS', %(meta)s, NULL)
        ON CONFLICT (task_id) DO UPDATE
        SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at
        WHERE r.state <> 'SUCCESS'
    """,
}
"""As workers of the version before store a result."""


@pytest.mark.parametrize("statement", BEFORE)
def test_what_a_worker_of_the_version_before_stores_counts_as_it_did(
    shop: Shop, recovery: Recovery, broker: redis.Redis, database: Database, statement: str
) -> None:
    """Whoever else had begun with it: for the message and the part that it ends, although it names neither."""
    waiting = chord([add.s(1, 1).set(task_id="twice")], total.s()).apply_async()
    app.backend.store_result("twice", None, "STARTED", request=request("another"))
    meta = app.backend._meta("twice", 2, "SUCCESS")
    database.execute(BEFORE[statement], {"task_id": "twice", "meta": meta.encode()})
    broker.delete("celery")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["part-return-interrupted"]
    assert broker.llen("celery") == 1  # its callback's
    assert [str(row["task_id"]) for row in database.fetch("SELECT task_id FROM patchpilot.outbox")] == [waiting.id]


def test_a_part_that_two_open_chords_would_return_is_one_part(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    def reported(queue: str) -> Signature:
        return chord([add.s(1, 1).set(queue=queue)], note.s().set(task_id="report"))

    outer = chord([reported("later"), add.s(2, 2)], total.s()).apply_async()
    reported("later").apply_async()
    broker.delete("celery")
    [found] = recovery.survey(NOW)
    assert (found.id, found.diagnosis, found.total) == (outer.parent.id, "header-message-lost", 2)


def test_what_a_version_before_stored_tells_of_no_message_that_is_still_on_record(
    shop: Shop, database: Database
) -> None:
    """It did not say whose a result is. Of a producer without patchpilot nobody knows at all."""
    note.apply_async((1,), task_id="nightly")
    [message_id] = messages(database)
    app.backend.store_result("nightly", 1, "SUCCESS")
    ours, stock = Context(id="nightly", **{MESSAGE_ID: message_id}), Context(id="nightly", delivery_info={"x": 1})
    assert [app.backend._had_succeeded("nightly", it) for it in (ours, stock)] == [False, False]
    database.execute("DELETE FROM patchpilot.outbox")
    assert [app.backend._had_succeeded("nightly", it) for it in (ours, stock)] == [True, False]
