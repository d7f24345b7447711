"""Errbacks of a chord that recovery ends go where there are workers that call them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import redis
from celery import chain, chord, group

from patchpilot.backend.errbacks import ERRBACK
from patchpilot.backend.message import Part
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from patchpilot.valkey.broker import SEPARATOR
from tests.support.processes import Shop
from tests.support.shop import app, boom, mourn, note, total

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))

MINE = {"queue": "mine"}

CALLBACKS = {
    "chord": (total.s, mourn.s, MINE, {}, "mine"),
    "callback": (lambda: total.s().set(**MINE), mourn.s, {}, {}, "mine"),
    "group": (lambda: group(note.s(), note.s()), mourn.s, MINE, {}, "mine"),
    "chain": (lambda: chain(note.s().set(**MINE), total.s()), mourn.s, {}, {}, "mine"),
    "routes": (total.s, mourn.s, {}, {total.name: MINE}, "mine"),
    "exchange": (total.s, mourn.s, {"exchange": "papers", "routing_key": "news"}, {}, "mine"),
    "its own": (total.s, lambda: mourn.s().set(queue="errors"), MINE, {}, "errors"),
    "its own, not an exchange": (
        total.s, lambda: mourn.s().set(queue="errors"), {"exchange": "papers", "routing_key": "news"}, {}, "errors",
    ),
    "none": (total.s, mourn.s, {}, {}, "celery"),
}  # fmt: skip


def lose_error_path(shop: Shop, broker: redis.Redis, *queues: str, **sent: Any) -> None:
    """The last part, which failed, is on record, and the worker that was to end the chord is gone."""
    result = chord([boom.s()], sent["body"]).apply_async(**sent["options"]).parent
    [part] = result.results
    app.backend.chords.return_part(Part(result.id, part.id, 0), "FAILURE", ValueError("boom"))
    broker.delete(*queues)
    with Database(shop.dsn) as database:
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 min'")
        database.execute("UPDATE patchpilot.chord_part SET returned_at = now() - interval '1 min'")


@contextmanager
def routed(monkeypatch: pytest.MonkeyPatch, routes: dict[str, Any]) -> Iterator[None]:
    """Inside, these are the application's routes, which recovery does not see."""
    with monkeypatch.context() as patch:
        patch.setitem(app.conf, "task_routes", routes)
        forget_routes()
        yield
    forget_routes()


def forget_routes() -> None:
    app.amqp.flush_routes()
    app.amqp.__dict__.pop("router", None)


@pytest.mark.parametrize(("callback", "errback", "options", "routes", "queue"), CALLBACKS.values(), ids=CALLBACKS)
def test_an_errback_goes_where_it_says_or_else_where_the_callback_would_go(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch, callback: Any, errback: Any,
    options: dict[str, Any], routes: dict[str, Any], queue: str,
) -> None:  # fmt: skip
    broker.sadd("_kombu.binding.papers", SEPARATOR.join(("news", "", "mine")))
    body = callback()
    body.link_error(errback())
    with routed(monkeypatch, routes):
        lose_error_path(shop, broker, "mine", "celery", body=body, options=options)
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["error-path-lost"]
    found = {name: broker.lrange(name, 0, -1) for name in ("mine", "errors", "celery")}
    tasks = {name: {json.loads(it)["headers"]["task"] for it in raw} for name, raw in found.items() if raw}
    assert tasks == {queue: {ERRBACK}}


def test_it_is_called_where_only_the_queue_of_the_chord_is_consumed(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    lose_error_path(shop, broker, "mine", body=total.s().on_error(mourn.s()), options=MINE)
    shop.worker("-c", "1", "-Q", "mine")
    assert [it.diagnosis for it in recovery.recover(NOW)] == ["error-path-lost"]
    until(lambda: any("mourn ChordError" in line for line in shop.ledger()), seconds=30, what="its errback was called")
