"""The purge removes what is over, and never what is open."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from celery import chord

from patchpilot.backend.purge import purge
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from tests.support.commands import patchpilot
from tests.support.processes import Shop
from tests.support.shop import add, app, hold, note, total

pytestmark = pytest.mark.backend

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
TABLES = ("result", "saved_group", "chord", "chord_part", "outbox", "fence")


def counts(shop: Shop) -> dict[str, int]:
    with psycopg.connect(shop.dsn) as connection:
        return {
            table: connection.execute(f"SELECT count(*) FROM patchpilot.{table}".encode()).fetchone()[0]  # type: ignore[index]  # noqa: S608
            for table in TABLES
        }


def age(shop: Shop, by: str) -> None:
    """Make everything on record that much older."""
    with psycopg.connect(shop.dsn) as connection:
        for table, columns in {
            "result": ("stored_at", "expires_at"), "saved_group": ("stored_at", "expires_at"),
            "chord": ("created_at", "finished_at"), "chord_part": ("returned_at",),
            "outbox": ("recorded_at", "sent_at"), "fence": ("started_at", "lease_until", "finished_at"),
        }.items():  # fmt: skip
            changes = ", ".join(f"{column} = {column} - interval '{by}'" for column in columns)
            connection.execute(f"UPDATE patchpilot.{table} SET {changes}".encode())  # noqa: S608 - the names are ours


def test_what_is_over_goes_and_what_is_open_stays(shop: Shop, tmp_path: Path) -> None:
    gate = shop.directory / "gate"
    worker = shop.worker("-c", "2")
    over = [chord([add.s(i, 1), add.s(i, 2)], total.s(label=f"sum{i}")).apply_async() for i in range(3)]
    for result in over:
        result.get(timeout=30)
    over[0].parent.save()
    with Database(shop.dsn) as database:
        until(
            lambda: database.fetch("SELECT 1 FROM patchpilot.fence WHERE finished_at IS NULL") == [],
            seconds=30, what="every callback had ended",
        )  # fmt: skip
        fresh = counts(shop)
        assert fresh == {"result": 9, "saved_group": 1, "chord": 3, "chord_part": 6, "outbox": 0, "fence": 3}
        assert not any(purge(database, timedelta(days=7)).values())
        assert counts(shop) == fresh

        # One is open: a part runs. One is finished, but its callback's message waits. Both are a month old.
        chord([hold.s(1, str(gate)), add.s(1, 1)], note.s(label="late")).apply_async()
        waiting = chord([add.s(5, 5)], note.s(label="waits").set(queue="nobody")).apply_async()
        shop.await_line("hold began")
        until(lambda: counts(shop)["chord_part"] == 9 and counts(shop)["outbox"] == 2, seconds=30, what="it waits")
        age(shop, "30 days")
        removed = purge(database, timedelta(days=7), batch=2)
        assert removed == {"results": 8, "saved_groups": 1, "parts": 6, "chords": 3, "messages": 0, "starts": 3} | {
            "results": removed["results"]
        }
        assert counts(shop)["chord"] == 2
        assert counts(shop)["chord_part"] == 3
        assert counts(shop)["outbox"] == 2
        gate.touch()
        shop.await_line("late [1, 2]")
        shop.worker("-Q", "nobody", "-c", "1")
        assert waiting.get(timeout=30) == [10]
        assert worker.process.poll() is None


def test_the_result_of_a_part_that_an_open_chord_waits_for_stays(shop: Shop) -> None:
    """Its worker died between the two. Recovery records the part from the result."""
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    app.backend.store_result(result.parent.results[0].id, 2, "SUCCESS")
    app.backend.store_result("other", 2, "SUCCESS")
    age(shop, "30 days")
    with Database(shop.dsn) as database:
        assert purge(database, timedelta(days=7))["results"] == 1
    assert counts(shop)["result"] == 1
    assert app.AsyncResult(result.parent.results[0].id).state == "SUCCESS"


def test_the_result_that_tells_that_a_message_is_over_stays_as_long_as_that(shop: Shop) -> None:
    """Its worker died before the end of the message was on record. Without the result its task would run again."""
    over, anew = (add.apply_async((1, 1), queue="nobody") for _ in range(2))
    app.backend.store_result(over.id, ValueError("x"), "FAILURE")
    app.backend.store_result(anew.id, 2, "SUCCESS")
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.result SET expires_at = now()")
        database.execute("UPDATE patchpilot.outbox SET recorded_at = now() WHERE task_id = %s", (anew.id,))
        assert purge(database, timedelta(days=7))["results"] == 1
        assert database.fetch("SELECT task_id FROM patchpilot.result") == [{"task_id": over.id}]
        age(shop, "30 days")
        removed = purge(database, timedelta(days=7))
    assert (removed["messages"], removed["results"]) == (1, 1)


# What each transaction removes.
WATCHED = """
CREATE TABLE gone (transaction xid8, rows bigint);
CREATE FUNCTION count_gone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO gone SELECT pg_current_xact_id(), count(*) FROM old_rows;
    RETURN NULL;
END
$$;
CREATE TRIGGER gone AFTER DELETE ON patchpilot.chord REFERENCING OLD TABLE AS old_rows
FOR EACH STATEMENT EXECUTE FUNCTION count_gone();
CREATE TRIGGER gone AFTER DELETE ON patchpilot.chord_part REFERENCING OLD TABLE AS old_rows
FOR EACH STATEMENT EXECUTE FUNCTION count_gone();
"""

MAKE_CHORDS = """
INSERT INTO patchpilot.chord (
    group_id, state, callback_id, callback_name, unrecoverable, opener, result_serializer, finished_at
)
SELECT %(name)s || number, %(state)s::patchpilot.chord_state, 'c', 'c', 'made by a test', 'o', 'json',
       CASE WHEN %(state)s <> 'open' THEN now() - interval '30 days' END
FROM generate_series(1, %(chords)s) AS number
"""

MAKE_PARTS = """
INSERT INTO patchpilot.chord_part (group_id, position, task_id, state, payload, returned_at)
SELECT group_id, place, place::text, 'SUCCESS', 'x', now()
FROM patchpilot.chord, generate_series(1, %(parts)s) AS place WHERE group_id LIKE %(name)s || '%%'
"""


def make(database: Database, name: str, *, chords: int, parts: int, state: str = "dispatched") -> None:
    asked = {"name": name, "chords": chords, "parts": parts, "state": state}
    database.execute(MAKE_CHORDS, asked)
    database.execute(MAKE_PARTS, asked)


def test_however_many_parts_there_are_a_transaction_removes_a_few(shop: Shop) -> None:
    with Database(shop.dsn) as database:
        make(database, "large", chords=3, parts=250)
        make(database, "small", chords=130, parts=2)
        make(database, "empty", chords=40, parts=0)
        make(database, "open", chords=2, parts=250, state="open")
        for statement in WATCHED.split(";\nCREATE"):
            database.execute(statement if statement.startswith("\n") else f"CREATE{statement}")  # type: ignore[arg-type]
        removed = purge(database, timedelta(days=7), batch=100)
        assert (removed["parts"], removed["chords"]) == (3 * 250 + 130 * 2, 3 + 130 + 40)
        assert database.fetch("SELECT max(rows) AS most FROM gone") == [{"most": 100}]
        assert (counts(shop)["chord"], counts(shop)["chord_part"]) == (2, 500)


def test_what_somebody_else_is_at_is_left_whole(shop: Shop) -> None:
    """A frozen chord of long ago is sent again: it begins anew while the purge looks at it."""
    frozen = chord([add.s(1, 1), add.s(2, 2)], total.s().set(task_id="callback"))
    frozen.freeze(group_id="again")
    frozen.apply_async()
    with Database(shop.dsn) as database, psycopg.connect(shop.dsn) as other:
        database.execute("UPDATE patchpilot.chord SET state = 'dispatched', finished_at = now()")
        age(shop, "30 days")
        other.execute("UPDATE patchpilot.chord SET state = 'open', finished_at = NULL")
        removed = purge(database, timedelta(days=7))
        assert (removed["parts"], removed["chords"]) == (0, 0)
        other.rollback()
        removed = purge(database, timedelta(days=7))
        assert (removed["parts"], removed["chords"]) == (2, 1)


def test_beside_the_traffic_it_removes_only_what_is_over(shop: Shop) -> None:
    shop.worker("-c", "2")
    over = threading.Event()

    def work() -> int:
        parts = 0
        with Database(shop.dsn) as database:
            while not over.is_set():
                parts += purge(database, timedelta(0), batch=3)["parts"]
        return parts

    with ThreadPoolExecutor(1) as threads:
        purging = threads.submit(work)
        try:
            results = [chord([add.s(i, 1), add.s(i, 2)], total.s(label=f"sum{i}")).apply_async() for i in range(30)]
            assert [result.get(timeout=60) for result in results] == [2 * i + 3 for i in range(30)]
            until(lambda: counts(shop)["chord"] == 0, seconds=60, what="all chords were gone")
        finally:
            over.set()
        assert purging.result() == 60
    assert sorted(line for line in shop.ledger() if line.startswith("sum")) == sorted(
        f"sum{i} {2 * i + 3}" for i in range(30)
    )


def test_the_start_of_what_is_still_to_end_stays(shop: Shop) -> None:
    """Its worker has died, and its message is there: recovery sends it again, and the report says that it ran twice."""
    waiting = add.apply_async((1, 1), queue="nobody")
    start = """
        INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, lease_until, finished_at)
        VALUES (%s, %s, '0/0', gen_random_uuid(), 'gone', now() - interval '30 days', %s)
    """
    with Database(shop.dsn) as database:
        for scope, task_id, finished_at in [
            ("waits", waiting.id, None), ("left", "nobody's", None), ("over", waiting.id, LONG_AGO)
        ]:  # fmt: skip
            database.execute(start, (scope, task_id, finished_at))
        assert purge(database, timedelta(days=7))["starts"] == 2
        assert database.fetch("SELECT scope FROM patchpilot.fence") == [{"scope": "waits"}]


@pytest.mark.parametrize(
    ("state", "stored_at", "goes"),
    [("SUCCESS", "later", True), ("FAILURE", "later", True), ("REVOKED", "later", True), ("SUCCESS", "before", False)]
    + [(state, "later", False) for state in ("STARTED", "RETRY", "PROGRESS")],
)
def test_a_message_goes_if_its_task_has_ended_since(shop: Shop, state: str, stored_at: str, goes: bool) -> None:
    """A frozen signature that is sent again has the result of the time before."""
    waiting = add.apply_async((1, 1), queue="nobody")
    app.backend.store_result(waiting.id, ValueError("x") if state == "FAILURE" else 2, state)
    age(shop, "30 days")
    by = timedelta(hours=1 if stored_at == "later" else -1)
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.result SET stored_at = stored_at + %s, expires_at = NULL", (by,))
        assert purge(database, timedelta(days=7))["messages"] == int(goes)
    assert counts(shop)["outbox"] == int(not goes)


def test_results_without_an_expiry_are_kept(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    app.backend.expires = None
    app.backend.failure_expires = None
    app.backend.store_result("kept", 1, "SUCCESS")
    age(shop, "300 days")
    app.backend.cleanup()  # as Celery beat's daily task does
    assert counts(shop)["result"] == 1


def test_the_command(shop: Shop, tmp_path: Path) -> None:
    app.backend.store_result("gone", 1, "SUCCESS")
    age(shop, "30 days")
    config = tmp_path / "patchpilot.toml"
    config.write_text(f'[postgres]\ndsn = "{shop.dsn}"\n')
    done = patchpilot("db", "purge", "--config", config, "--output", "json")
    assert json.loads(done.stdout)["removed"]["results"] == 1, done.stderr
    done = patchpilot("db", "purge", "--config", config, "--retention", "1d")
    assert done.stderr.startswith("removed 0 results")
    assert patchpilot("db", "purge", "--config", config, "--retention", "soon").returncode == 2
    done = patchpilot("db", "purge", "--config", config, "--retention", "0s")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--retention: must be 1s at least" in done.stderr
