"""Bring the schema up to date: forward only, checksummed, safe to run twice and at once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import LiteralString

from patchpilot.errors import Corrupt
from patchpilot.postgres.connection import Connection, Database

# Any constant will do; all migrations of all processes take the same one, for their transaction only.
_LOCK = 0x7061746368  # "patch"

_BOOKKEEPING: LiteralString = """
CREATE SCHEMA IF NOT EXISTS patchpilot;
CREATE TABLE IF NOT EXISTS patchpilot.migration (
    number      int PRIMARY KEY,
    name        text NOT NULL,
    checksum    text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
);
"""


@dataclass(frozen=True)
class Migration:
    """One step of the schema."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> tuple[Migration, ...]:
    """Every migration that this version knows, in order."""
    folder = files("patchpilot.postgres.migrations")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    return tuple(Migration(int(entry.name[:4]), entry.name[5:-4], entry.read_text(encoding="utf-8")) for entry in found)


def migrate(database: Database) -> tuple[Migration, ...]:
    """Apply what is missing, all or nothing, and return it: empty when the schema was up to date.

    :raises Corrupt: a migration that was applied differs from ours, or the schema is newer than this version.
    :raises Transient: PostgreSQL cannot be reached.
    """
    return database.run(_migrate)


def _migrate(connection: Connection) -> tuple[Migration, ...]:
    with connection.unhurried():
        return _migrate_patiently(connection)


def _migrate_patiently(connection: Connection) -> tuple[Migration, ...]:
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
    connection.execute(_BOOKKEEPING)
    applied = {
        row["number"]: row["checksum"]
        for row in connection.execute("SELECT number, checksum FROM patchpilot.migration").fetchall()
    }
    known = migrations()
    _check(applied, known)
    missing = tuple(migration for migration in known if migration.number not in applied)
    for migration in missing:
        connection.execute(migration.sql.encode())
        connection.execute(
            "INSERT INTO patchpilot.migration (number, name, checksum) VALUES (%s, %s, %s)",
            (migration.number, migration.name, migration.checksum),
        )
    return missing


def _check(applied: dict[int, str], known: tuple[Migration, ...]) -> None:
    for migration in known:
        if applied.get(migration.number, migration.checksum) != migration.checksum:
            raise Corrupt(
                f"migration {migration.number:04} {migration.name} was applied with other content than this version "
                "has: install the version that made the schema, or restore it"
            )
    newer = set(applied) - {migration.number for migration in known}
    if newer:
        raise Corrupt(f"the schema is newer than this patchpilot (migration {max(newer):04}): upgrade patchpilot")
