"""The purge removes what is over, and never what is open."""

from __future__ import annotations

import json
from datetime import timedelta
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
        assert removed == {"results": 8, "saved_groups": 1, "chords": 3, "messages": 0, "starts": 3} | {
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
