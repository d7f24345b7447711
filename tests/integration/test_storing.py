"""Callbacks that cannot be stored are never skipped silently: it is said when the chord is sent."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
from celery import chord
from celery.exceptions import ChordError
from kombu.exceptions import EncodeError

from patchpilot.backend.message import Part
from patchpilot.backend.storing import store
from patchpilot.recovery import Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, app, note

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def record(shop: Shop) -> list[tuple[Any, ...]]:
    with psycopg.connect(shop.dsn) as connection:
        sql = b"SELECT unrecoverable, callback IS NULL, publish_error FROM patchpilot.chord"
        return connection.execute(sql).fetchall()


@pytest.mark.parametrize(
    ("serializer", "argument", "flaw"),
    [
        ("json", {"plan": {"2026-11-01": [1, 2]}}, None),
        ("json", {"when": datetime(2026, 11, 1, tzinfo=UTC), "sum": Decimal("1.5"), "id": UUID(int=1)}, None),
        ("json", {"tuple": (1, (2, 3))}, None),
        ("json", {"ids": {1, 2}}, "json cannot store ['kwargs']['value']['ids'] (set)"),
        ("json", {(1, 2): "x"}, "json cannot store ['kwargs']['value']"),
        ("json", {"by": {7: "x"}}, "json changes the key 7 (int) at ['kwargs']['value']['by']"),
        ("json", {"call": print}, "json cannot store ['kwargs']['value']['call'] (builtin_function_or_method)"),
        ("pickle", {"ids": {1, 2}, (1, 2): {7: "x"}}, None),
        ("pickle", {"call": lambda: 1}, "pickle cannot store ['kwargs']['value']['call'] (function)"),
    ],
)
def test_what_becomes_of_a_callback(serializer: str, argument: Any, flaw: str | None) -> None:
    stored = store(note.s(value=argument), serializer)
    if flaw is None:
        assert stored.flaw is None
        assert stored.payload
    else:
        assert flaw in (stored.flaw or "")
        assert (stored.payload is None) == ("cannot store" in (stored.flaw or ""))


def test_one_that_cannot_be_stored_is_on_record_with_the_reason_and_the_place(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header travels in pickle, which can carry a set; its own message, like its record, is JSON."""
    with caplog.at_level(logging.WARNING):
        result = chord([add.s(i, 1).set(serializer="pickle") for i in range(3)], note.s(label={1, 2})).apply_async()
    [(why, missing, error)] = record(shop)
    assert why.startswith("json cannot store ['kwargs']['label'] (set)")
    assert (missing, error) == (True, None)
    assert f"Chord {result.parent.id} cannot be recovered: its callback {note.name}: {why}" in caplog.text
    app.backend.client.delete("celery")
    for place, part in enumerate(result.parent.results):
        app.backend.chords.return_part(Part(result.parent.id, part.id, place), "SUCCESS", 1)
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        [found] = [it for it in recovery.survey(NOW) if it.kind == "chord"]
        assert (found.diagnosis, found.curable) == ("unrecoverable", False)
        assert why in found.reason
        assert recovery.recover(NOW) == ()


def test_its_chord_ends_as_it_would_with_celery(shop: Shop) -> None:
    result = chord([add.s(i, 1).set(serializer="pickle") for i in range(3)], note.s(label={1, 2})).apply_async()
    shop.worker(SHOP_ACCEPT="json,pickle", C_FORCE_ROOT="1")
    error = result.get(timeout=30, propagate=False)
    assert isinstance(error, ChordError)
    assert "Callback error" in str(error)
    assert sorted(shop.ledger()) == ["add 0 1", "add 1 1", "add 2 1"]


@pytest.mark.parametrize("argument", [{1, 2}, {7: "x"}], ids=["a set", "an int key"])
def test_if_strict_nothing_of_it_is_published(shop: Shop, argument: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "patchpilot_strict", True)
    with pytest.raises(EncodeError, match=r"cannot be stored as it is: json (cannot store|changes) .*'label'"):
        chord([add.s(1, 1).set(serializer="pickle")], note.s(label=argument)).apply_async()
    assert record(shop) == []
    with redis.Redis.from_url(shop.broker) as broker:
        assert broker.llen("celery") == 0


def test_what_json_changes_is_said_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chord([add.s(1, 1)], note.s(label={7: "x"})).apply_async()
    assert record(shop) == [(None, False, None)] * 2
    assert caplog.text.count("does not get what it was sent with: json changes the key 7 (int)") == 1
