"""Nothing that we say to PostgreSQL relies on a session: any transaction may go over any connection.

That is what a pooler in transaction mode needs. With a real one there is `test_pgbouncer.py`; this needs none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate, migrations
from patchpilot.postgres.queries import queries
from tests.conftest import shop_on
from tests.support.shop import app
from tests.support.workload import work_and_recovery

pytestmark = pytest.mark.backend

# What outlives its transaction, each as it would begin or stand in a statement.
SESSION_STATE = {
    "setting": r"^(SET|RESET)\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)|\bset_config\s*\([^)]*\bfalse\s*\)|^DISCARD\b",
    "subscription": r"^(UN)?LISTEN\b",
    "prepared statement": r"^(PREPARE\s+(?!TRANSACTION\b)|EXECUTE\b|DEALLOCATE\b)",
    "lock of the session": r"\bpg_(try_)?advisory_(un)?lock(_shared|_all)?\s*\(",
    "temporary object": r"\bCREATE\s+((LOCAL|GLOBAL)\s+)?TEMP|\bINTO\s+TEMP|\bpg_temp\b",
    "cursor": r"\bWITH\s+HOLD\b",
}


def session_state(sql: str) -> list[str]:
    """Which kinds of session state the statements in ``sql`` make or use."""
    uncommented = re.sub(r"--[^\n]*", "", sql)
    statements = [statement.strip() for statement in uncommented.split(";")]
    return [
        kind for kind, pattern in SESSION_STATE.items()
        if any(re.search(pattern, statement, re.IGNORECASE) for statement in statements)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SET search_path TO patchpilot", "setting"),
        ("SET SESSION statement_timeout = 1", "setting"),
        ("SELECT set_config('a.b', 'c', false)", "setting"),
        ("SELECT 1; -- and\nLISTEN results", "subscription"),
        ("PREPARE one AS SELECT 1", "prepared statement"),
        ("SELECT pg_advisory_lock(1)", "lock of the session"),
        ("SELECT pg_try_advisory_lock_shared(1)", "lock of the session"),
        ("CREATE TEMPORARY TABLE t (x int)", "temporary object"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "cursor"),
    ],
)
def test_session_state_would_be_noticed(sql: str, kind: str) -> None:
    assert session_state(sql) == [kind]


@pytest.mark.parametrize(
    "sql",
    [
        "SET LOCAL statement_timeout = 1",
        "UPDATE patchpilot.lease\nSET until = now()",
        "SELECT pg_advisory_xact_lock(1)",
        "SELECT set_config('a.b', 'c', true)",
    ],
)
def test_what_ends_with_its_transaction_is_no_session_state(sql: str) -> None:
    assert session_state(sql) == []


def written() -> Iterator[tuple[str, str]]:
    """Every statement in our files, by name, and every migration."""
    for file in (files("patchpilot.postgres") / "sql").iterdir():
        yield from ((f"{file.name}: {name}", sql) for name, sql in queries(Path(file.name).stem).items())
    yield from ((it.name, it.sql) for it in migrations())


def test_no_statement_in_our_files_uses_session_state() -> None:
    found = {name: session_state(sql) for name, sql in written()}
    assert len(found) > 50
    assert {name: kinds for name, kinds in found.items() if kinds} == {}


@pytest.fixture
def recording(lab_roster: Roster, tmp_path: Path) -> Iterator[Postgres]:
    """A PostgreSQL server of its own that writes every statement into its log."""
    options = {"log_statement": "all", "log_line_prefix": "%a says "}
    server = Postgres(tmp_path, roster=lab_roster, name="recording", options=options)
    try:
        server.start()
        yield server
    finally:
        server.discard()


def said(log: Path) -> list[tuple[str, str]]:
    """What our connections said to the server: the name of the prepared statement, if any, and the SQL."""
    line = re.compile(r"^patchpilot says LOG:  (?:statement|execute ([^:\n]+)): (.*(?:\n\t.*)*)", re.MULTILINE)
    return line.findall(log.read_text(encoding="utf-8"))


def test_nothing_that_is_said_in_earnest_uses_session_state(
    recording: Postgres, lab_roster: Roster, tmp_path: Path, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database(recording.dsn) as database:
        migrate(database)
    with shop_on(lab_roster, tmp_path, valkey, recording.dsn, monkeypatch) as shop:
        work_and_recovery(shop)
        assert app.backend.database.fetch("SELECT name FROM pg_prepared_statements") == []
        assert app.backend.database.fetch("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'") == []
    statements = said(tmp_path / "recording.log")
    everything = " ".join(sql for _, sql in statements)
    for table in ("migration", "result", "chord", "chord_part", "outbox", "fence", "worker", "remedy"):
        assert f"patchpilot.{table}" in everything
    assert {name for name, _ in statements} <= {"", "<unnamed>"}
    assert {sql: kinds for _, sql in statements if (kinds := session_state(sql))} == {}
