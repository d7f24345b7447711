"""The schema: forward only, checksummed, safe to run twice and at once."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import psycopg
import pytest

from patchpilot.clock import FakeClock
from patchpilot.errors import Corrupt, NeedsOperator, Transient, Usage
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import _LOCK, migrate, migrations
from patchpilot.postgres.record import Record, check


def test_twice_is_once(dsn: str) -> None:
    with Database(dsn) as database:
        assert migrate(database) == migrations()
        assert migrate(database) == ()


def test_at_once(dsn: str) -> None:
    databases = [Database(dsn) for _ in range(6)]
    start = threading.Barrier(len(databases))
    applied: list[int] = []

    def go(database: Database) -> None:
        start.wait()
        applied.append(len(migrate(database)))

    threads = [threading.Thread(target=go, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(applied) == [0] * 5 + [len(migrations())]
    for database in databases:
        database.close()


WAITED_FOR = """
SELECT 1 FROM pg_locks l JOIN pg_database d ON d.oid = l.database
WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted
"""


class Hours(FakeClock):
    """An hour passes each time that somebody asks while our lock is waited for. After five the lock is there."""

    def __init__(self, holder: psycopg.Connection) -> None:
        super().__init__()
        self._holder = holder
        self.passed = 0
        holder.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))

    def monotonic(self) -> float:
        if self._holder.execute(WAITED_FOR).fetchone():
            self.passed += 1
            self.sleep(3600)
            if self.passed == 5:
                self._holder.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
        return super().monotonic()


def test_who_waits_for_another_migration_is_patient(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as holder:
        clock = Hours(holder)
        with Database(dsn, patience=10, clock=clock) as database:
            assert migrate(database) == migrations()
        assert clock.passed == 5


def test_what_was_applied_must_not_change(dsn: str) -> None:
    with Database(dsn) as database:
        migrate(database)
        database.execute("UPDATE patchpilot.migration SET checksum = 'other' WHERE number = 1")
        with pytest.raises(Corrupt, match="0001"):
            migrate(database)


def test_a_newer_schema_is_refused(dsn: str) -> None:
    with Database(dsn) as database:
        migrate(database)
        database.execute("INSERT INTO patchpilot.migration (number, name, checksum) VALUES (9999, 'future', 'x')")
        with pytest.raises(Corrupt, match="upgrade patchpilot"):
            migrate(database)


def test_a_newer_schema_is_used_unless_it_says_that_it_needs_a_newer_version(dsn: str) -> None:
    newest = migrations()[-1].number
    with Database(dsn) as database:
        migrate(database)
        for number, name, good in (
            (9997, "future", True),
            (9998, f"future_needs_{newest:04}", True),
            (9999, f"future_needs_{newest + 1:04}", False),
        ):
            add = "INSERT INTO patchpilot.migration (number, name, checksum) VALUES (%s, %s, 'x')"
            database.execute(add, [number, name])
            with Record(dsn) as record, nullcontext() if good else pytest.raises(Usage, match="upgrade patchpilot"):
                assert record.fetch("SELECT 1 AS one") == [{"one": 1}]
        assert database.fetch("SELECT 1 AS one") == [{"one": 1}]  # as workers do


def test_who_looks_at_the_schema_first_is_no_more_patient_for_that(dsn: str) -> None:
    with Database(dsn) as database:
        migrate(database)
    with psycopg.connect(dsn) as holder, Record(dsn, patience=0.5, budget=0) as record:
        holder.execute("LOCK TABLE patchpilot.migration")
        with pytest.raises(Transient, match=r"no answer for 0\.5 s"):
            record.fetch("SELECT 1")


def test_the_names_of_migrations_say_what_they_need_correctly() -> None:
    for migration in migrations():
        check([migration.name], migration.number)
        assert "_needs" not in migration.name.split("_needs_0")[0]


def test_missing_tables_say_what_to_do(dsn: str) -> None:
    with Record(dsn) as record, pytest.raises(NeedsOperator, match="patchpilot db migrate"):
        record.fetch("SELECT 1")
    with Database(dsn) as database, pytest.raises(NeedsOperator, match="patchpilot db migrate"):
        database.fetch("SELECT * FROM patchpilot.chord")


def test_an_unreachable_server_and_a_wrong_database(dsn: str) -> None:
    with Database("postgresql://nobody:hunter2@127.0.0.1:1/x", budget=0.2) as database:
        with pytest.raises(Transient, match="cannot be reached") as caught:
            database.fetch("SELECT 1")
        assert "hunter2" not in str(caught.value)
    with (
        Database(dsn + "_which_is_not_there", budget=5) as database,
        pytest.raises(NeedsOperator, match="does not exist"),
    ):
        database.fetch("SELECT 1")


def test_a_connection_that_was_cut_is_opened_again(dsn: str) -> None:
    with Database(dsn) as database, Database(dsn) as other:
        pid = database.fetch("SELECT pg_backend_pid() AS pid")[0]["pid"]
        other.execute("SELECT pg_terminate_backend(%s)", [pid])
        assert database.fetch("SELECT 1 AS one") == [{"one": 1}]
