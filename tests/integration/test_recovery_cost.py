"""What a sweep costs PostgreSQL: statements by the batch, and rows by what is open, however much was ever run."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, LiteralString
from unittest.mock import patch

import psycopg
import pytest
import redis
from celery import Signature, chain, chord, group
from psycopg.rows import dict_row

from patchpilot.backend.message import Part
from patchpilot.clock import SYSTEM
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.recovery import Recovery, Site, Window
from patchpilot.recovery.sweep import BATCH
from tests.support.processes import Shop
from tests.support.shop import add, app, mourn, note, total

NOW = Window(min_age=timedelta(0))

OPEN = 200
"""Chords that are open, with two parts and messages each."""

CLOSED = 50_000

TOUCHED = 30 * OPEN
"""Rows that a statement may look at: far more than what is open has, far fewer than what is over."""


class Statements:
    """Counts what is sent to PostgreSQL while the block lasts, by whatever connection."""

    def __enter__(self) -> list[str]:
        seen: list[str] = []
        execute = psycopg.Connection.execute

        def counted(connection: Any, query: Any, *args: Any, **options: Any) -> Any:
            seen.append(str(query))
            return execute(connection, query, *args, **options)

        self._patch = patch.object(psycopg.Connection, "execute", counted)
        self._patch.start()
        return seen

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def lose(shop: Shop, number: int) -> int:
    """Lose so many of each: a header's messages, a dispatch, a part's return, a task. How many findings."""
    for _ in range(number):
        chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    dispatches = [chord([add.s(1, 1)], total.s()).apply_async() for _ in range(number)]
    returns = [chord([add.s(1, 1)], total.s()).apply_async() for _ in range(number)]
    group(add.s(3, 3) for _ in range(number)).apply_async()
    for result in dispatches:
        [part] = result.parent.results
        app.backend.chords.return_part(Part(result.parent.id, part.id, 0), "SUCCESS", 2)
    for result in returns:
        app.backend.store_result(result.parent.results[0].id, 2, "SUCCESS")
    with Database(shop.dsn) as database:
        database.execute(
            "DELETE FROM patchpilot.outbox WHERE group_id = ANY(%s)",
            ([it.parent.id for it in (*dispatches, *returns)],),
        )
        database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 min'")
        database.execute(
            "UPDATE patchpilot.chord_part SET returned_at = now() - interval '1 min' WHERE state IS NOT NULL"
        )
        database.execute("UPDATE patchpilot.result SET stored_at = now() - interval '30 s'")
        database.execute("UPDATE patchpilot.outbox SET recorded_at = now() - interval '1 min'")
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete("celery")
    return 4 * number


def test_a_batch_costs_the_same_number_of_statements_however_much_is_in_it(shop: Shop) -> None:
    counted = []
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        recovery.recover(NOW)  # opens what has to be opened
        for number in (2, BATCH // 4):
            expected = lose(shop, number)
            with Statements() as seen:
                applied = recovery.recover(NOW)
            assert len(applied) == expected
            assert {it.diagnosis for it in applied} == {
                "header-message-lost", "dispatch-lost", "part-return-interrupted", "message-lost",
            }  # fmt: skip
            counted.append(seen)
            with Database(shop.dsn) as database:
                database.execute("DELETE FROM patchpilot.outbox")
                database.execute("DELETE FROM patchpilot.chord")
    few, many = counted
    assert len(many) == len(few), [it for it in many if many.count(it) > few.count(it)]


ENDINGS: dict[str, tuple[Callable[[], Signature], str]] = {
    "failed": (lambda: total.s().on_error(mourn.s()), "FAILURE"),
    "a chord is called back": (lambda: chord([note.s()], note.s()), "SUCCESS"),
    "a group is called back": (lambda: group(note.s(), note.s()), "SUCCESS"),
    "a chain is called back": (lambda: chain(note.s(), note.s()), "SUCCESS"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_batch_of_endings_costs_the_same_number_of_statements(shop: Shop, ending: str) -> None:
    callback, state = ENDINGS[ending]
    counted = []
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        recovery.recover(NOW)
        for number in (1, 7):
            for _ in range(number):
                header = chord([add.s(1, 1)], callback()).apply_async().parent
                while header.parent is not None:  # a callback may be a canvas with results of its own
                    header = header.parent
                returned = 2 if state == "SUCCESS" else ValueError("no")
                app.backend.chords.return_part(Part(header.id, header.results[0].id, 0), state, returned)
            with Database(shop.dsn) as database:
                database.execute("DELETE FROM patchpilot.outbox")
                for what in ("chord SET created_at", "chord_part SET returned_at"):
                    database.execute(f"UPDATE patchpilot.{what} = now() - interval '2 min'".encode())
            with Statements() as seen:
                applied = recovery.recover(NOW)
            assert len(applied) == number
            counted.append(seen)
            with Database(shop.dsn) as database:
                database.execute("DELETE FROM patchpilot.outbox")
                database.execute("DELETE FROM patchpilot.chord")
    few, many = counted
    assert len(many) == len(few), [it for it in many if many.count(it) > few.count(it)]


HISTORY: dict[str, LiteralString] = {
    "chords that are over": """
        INSERT INTO patchpilot.chord (group_id, state, callback_id, callback_name, callback, callback_type,
            callback_encoding, opener, result_serializer, created_at, finished_at, broker, counting, swept)
        SELECT 'g' || n, 'dispatched', 'c' || n, 'shop.total', 'x', 't', 'e', 'o', 'json', now() - interval '2 h',
            now() - interval '1 h', 'b', 'valkey', n > 10 FROM generate_series(1, %(closed)s) n
    """,
    "their parts": """
        INSERT INTO patchpilot.chord_part (group_id, position, task_id, state, payload, returned_at)
        SELECT 'g' || n, p, 't' || n || '-' || p, 'SUCCESS', 'x', now() - interval '1 h'
        FROM generate_series(1, %(closed)s) n, generate_series(0, 1) p
    """,
    "results": """
        INSERT INTO patchpilot.result (task_id, state, meta, stored_at)
        SELECT 't' || n || '-0', 'SUCCESS', 'x', now() - interval '1 h' FROM generate_series(1, %(closed)s) n
    """,
    "starts that are over": """
        INSERT INTO patchpilot.fence (scope, task_id, attempt, owner, worker, started_at, lease_until,
            finished_at, starts)
        SELECT 'g' || n, 'c' || n, '0/0', gen_random_uuid(), 'w', now() - interval '1 h', now() - interval '1 h',
            now() - interval '1 h', CASE WHEN n <= 10 THEN 2 ELSE 1 END FROM generate_series(1, %(closed)s) n
    """,
    "chords that are open": """
        INSERT INTO patchpilot.chord (group_id, state, callback_id, callback_name, callback, callback_type,
            callback_encoding, opener, result_serializer, created_at, broker, counting)
        SELECT 'open' || n, 'open', 'oc' || n, 'shop.total', 'x', 't', 'e', 'o', 'json', now() - interval '20 min', 'b',
            'valkey' FROM generate_series(1, %(open)s) n
    """,
    "the parts of those": """
        INSERT INTO patchpilot.chord_part (group_id, position, task_id, state, payload, returned_at)
        SELECT 'open' || n, p, 'ot' || n || '-' || p, s.state, CASE WHEN s.state IS NULL THEN NULL ELSE 'x'::bytea END,
            CASE WHEN s.state IS NULL THEN NULL ELSE now() - interval '15 min' END
        FROM generate_series(1, %(open)s) n, generate_series(0, 1) p,
            LATERAL (SELECT CASE WHEN n %% 2 = 0 THEN 'SUCCESS' END AS state) s
    """,
    "the results of those": """
        INSERT INTO patchpilot.result (task_id, state, meta, stored_at)
        SELECT 'ot' || n || '-0', 'SUCCESS', 'x', now() - interval '15 min' FROM generate_series(1, %(open)s) n
    """,
    "their messages": """
        INSERT INTO patchpilot.outbox (message_id, task_id, task_name, group_id, scope, attempt, exchange, routing_key,
            headers, properties, body, content_type, content_encoding, recorded_at, sent_at, broker)
        SELECT gen_random_uuid(), 'ot' || n || '-' || p, 'shop.add', 'open' || n, 'm' || n || p, '0/0', '', 'celery',
            '{}', '{}', 'x', 't', 'e', now() - interval '20 min', now() - interval '20 min', 'b'
        FROM generate_series(1, %(open)s) n, generate_series(0, 1) p
    """,
}


@pytest.fixture(scope="module")
def long_lived(postgres_server: Any, migrated_template: str) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A database with a long history and some open work."""
    name = f"history_{uuid.uuid4().hex[:12]}"
    dsn = postgres_server.create_database(name, template=migrated_template)
    with psycopg.connect(dsn, row_factory=dict_row, autocommit=True) as connection:
        for sql in HISTORY.values():
            connection.execute(sql, {"closed": CLOSED, "open": OPEN})
        connection.execute("VACUUM ANALYZE")
        yield connection
    postgres_server.drop_database(name)


def parameters(connection: psycopg.Connection[dict[str, Any]]) -> dict[str, Any]:
    """For every statement: those of one full batch."""
    sql = "SELECT message_id::text, resends, sent_at FROM patchpilot.outbox LIMIT %s"
    rows = connection.execute(sql, (BATCH,)).fetchall()
    group_ids = [f"open{number}" for number in range(1, BATCH + 1)]
    texts = ["x"] * BATCH
    return {
        "min_age": timedelta(minutes=5), "max_age": timedelta(hours=24), "brokers": ["b"],
        "interrupted_after": timedelta(seconds=10), "message_ids": [row["message_id"] for row in rows],
        "resends": [row["resends"] for row in rows], "sent_at": [row["sent_at"] for row in rows],
        "group_ids": group_ids, "run_id": "r", "kind": texts, "id": texts,
        "diagnosis": texts, "remedy": texts, "callback": texts, "reason": texts, "token": str(uuid.uuid4()),
        "lease": timedelta(seconds=30), "ordered": True, "states": ["dispatched"] * BATCH,
        "since": SYSTEM.now() - timedelta(days=1), "created_at": [SYSTEM.now()] * BATCH,
        "age": timedelta(minutes=10), "error": "x", "task_ids": [f"ot{number}-0" for number in range(1, BATCH + 1)],
        "payloads": [b"x"] * BATCH, "metas": [b"x"] * BATCH, "expires": timedelta(days=1), "batch": BATCH,
        "retention": timedelta(days=7),
    }  # fmt: skip


def scans(plan: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Every node that reads a table: how, which, and how many rows it looked at in all."""
    if "Relation Name" in plan:
        looked = sum(
            plan.get(key, 0) for key in ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
        )
        yield plan["Node Type"], plan["Relation Name"], looked * plan["Actual Loops"]
    for child in plan.get("Plans", ()):
        yield from scans(child)


ASKED = [
    *(("recovery", name) for name in queries("recovery")),
    *(("chords", name) for name in ("ready", "claim", "join", "finish", "release")),
    *(("inventory", name) for name in ("by_callback", "backlog", "elsewhere")),
    ("canaries", "purge"),
    *(("strays", name) for name in queries("strays")),
    *(("purge", name) for name in queries("purge")),
]


def check(connection: psycopg.Connection[dict[str, Any]], sql: str, **changes: Any) -> None:
    """That a statement looks at few rows."""
    with connection.transaction(force_rollback=True):
        [row] = connection.execute(
            b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + sql.encode(), {**parameters(connection), **changes}
        ).fetchall()
    plan = row["QUERY PLAN"][0]["Plan"]
    found = list(scans(plan))
    assert [it for it in found if it[2] > TOUCHED] == []
    history = {"chord", "chord_part", "result", "fence"}
    assert [it for it in found if it[0] == "Seq Scan" and it[1] in history] == []
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 4 * TOUCHED


@pytest.mark.parametrize(("file", "name"), ASKED)
def test_a_statement_looks_at_what_is_open_and_not_at_what_is_over(
    long_lived: psycopg.Connection[dict[str, Any]], file: str, name: str
) -> None:
    check(long_lived, queries(file)[name])


@pytest.mark.parametrize("name", queries("purge"))
def test_the_purge_looks_at_a_batch_however_much_may_go(
    long_lived: psycopg.Connection[dict[str, Any]], name: str
) -> None:
    check(long_lived, queries("purge")[name], retention=timedelta(minutes=30))


def test_the_limit_is_one_that_a_scan_of_what_is_over_exceeds(
    long_lived: psycopg.Connection[dict[str, Any]],
) -> None:
    [row] = long_lived.execute("EXPLAIN (ANALYZE, FORMAT JSON) SELECT count(*) FROM patchpilot.fence").fetchall()
    assert max(looked for _, _, looked in scans(row["QUERY PLAN"][0]["Plan"])) > TOUCHED
