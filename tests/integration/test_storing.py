"""Callbacks that cannot be stored are never skipped silently: it is said when the chord is sent."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
from celery import Signature, chain, chord, group
from celery.exceptions import ChordError
from kombu.exceptions import EncodeError

from patchpilot.backend.message import Part
from patchpilot.backend.storing import store, stored
from patchpilot.recovery import Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, app, note, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def record(shop: Shop) -> list[tuple[Any, ...]]:
    with psycopg.connect(shop.dsn) as connection:
        sql = b"SELECT unrecoverable, callback IS NULL, publish_error FROM patchpilot.chord"
        return connection.execute(sql).fetchall()


LOOP: list[Any] = []
LOOP.append(LOOP)


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
        ("json", {"loop": LOOP}, "json cannot store ['kwargs']['value']['loop'][0] (which contains itself)"),
        ("yaml", {"plan": [{"a": 1}, (1, 2)], "then": note.s(1)}, None),
        ("yaml", {"call": print}, "yaml cannot store ['kwargs']['value']['call'] (builtin_function_or_method)"),
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


IN_PICKLE = {"serializer": "pickle"}


def sent(label: Any, pickled: bool = False) -> Signature:
    """A note that is sent in pickle, or in JSON, as everything is here that says nothing."""
    return note.s(label=label).set(**IN_PICKLE if pickled else {})


SET = {1, 2}
IN_THE_SECOND = "json cannot store ['kwargs']['tasks'][1]['kwargs']['label'] (set)"
IN_THE_FIRST = IN_THE_SECOND.replace("[1]", "[0]")
IN_THE_BODY = "json cannot store ['kwargs']['body']['kwargs']['label'] (set)"
IN_THE_LINK = "json cannot store ['options']['link'][0]['kwargs']['label'] (set)"
A_KEY = "json changes the key 7 (int) at ['kwargs']['tasks'][0]['kwargs']['label']"


@pytest.mark.parametrize(
    ("callback", "flaw"),
    [
        (chain(sent("x"), sent(SET, pickled=True)), IN_THE_SECOND),
        (chain(sent("x", pickled=True), sent(SET, pickled=True)), None),
        (chain(sent(SET, pickled=True), sent("x")), None),
        (chain(sent(SET), sent("x")).set(**IN_PICKLE), None),
        (chain(sent("x"), sent(SET)).set(**IN_PICKLE), IN_THE_SECOND),
        (chain(group(sent("x"), sent("x", pickled=True)), sent(SET, pickled=True)), IN_THE_BODY),
        (group(sent("x"), sent(SET, pickled=True)), None),
        (group(sent(SET), sent("x", pickled=True)), IN_THE_FIRST),
        (group(sent(SET), sent("x")).set(**IN_PICKLE), None),
        (group(sent({7: 1}), sent(SET, pickled=True)), A_KEY),
        (chord([sent(SET, pickled=True)], sent("x")), None),
        (sent("x").set(link=[sent(SET, pickled=True)]), IN_THE_LINK),
        (sent("x", pickled=True).set(link=[sent(SET)]), IN_THE_LINK),
        (chain(sent("x"), sent("x", pickled=True)).set(link=[sent(SET, pickled=True)]), IN_THE_LINK),
        (sent("x", pickled=True).set(link_error=sent(SET, pickled=True)), None),
    ],
)
def test_each_message_of_a_callback_carries_all_that_follows_it(callback: Signature, flaw: str | None) -> None:
    found = stored(callback, {}, "json")
    if flaw is None:
        assert found.flaw is None
        assert found.content_type == "application/x-python-serialize"
    else:
        assert (found.flaw or "").startswith(flaw)
        assert (found.payload is None) == ("cannot store" in flaw)


def test_what_an_application_routes_counts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what a signature says does: here all notes are sent in pickle, and nothing else is."""
    monkeypatch.setitem(app.conf, "patchpilot_strict", True)
    monkeypatch.setattr(note, "serializer", "pickle")
    monkeypatch.setattr(note, "_exec_options", None)
    header = [add.s(1, 1).set(**IN_PICKLE)]
    chord(header, chain(note.s(label={1, 2}), note.s(label={1, 2}))).apply_async()
    with pytest.raises(EncodeError, match=re.escape(IN_THE_SECOND)):
        chord(header, chain(total.s(), note.s(label={1, 2}))).apply_async()
    assert record(shop) == [(None, False, None)]


class Torn(Exception):
    """Pickle makes it anew from its arguments, of which it has fewer than it wants."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


@pytest.mark.parametrize("strict", [False, True])
def test_what_no_worker_could_read_is_said_when_it_is_sent(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    """An argument in the header: a worker drops the message, and the chord would wait for ever."""
    monkeypatch.setitem(app.conf, "patchpilot_strict", strict)
    canvas = chord([add.s(1, 1), note.s(Torn("x", "y")).set(**IN_PICKLE)], total.s())
    why = "pickle cannot read what it wrote: .*missing 1 required positional argument: 'where'"
    if strict:
        with pytest.raises(EncodeError, match=why):
            canvas.apply_async()
    else:
        with caplog.at_level(logging.WARNING):
            canvas.apply_async()
        assert re.search(rf"No worker will be able to read {re.escape(note.name)}\[.*\]: {why}", caplog.text)
    assert record(shop) == [(None, False, "EncodeError" if strict else None)]
    with redis.Redis.from_url(shop.broker) as broker:
        assert broker.llen("celery") == (0 if strict else 2)


def test_what_json_changes_is_said_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chord([add.s(1, 1)], note.s(label={7: "x"})).apply_async()
    assert record(shop) == [(None, False, None)] * 2
    assert caplog.text.count("does not get what it was sent with: json changes the key 7 (int)") == 1
