"""Queues that are named as recovery does not know: nothing that may be in them is called lost."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
import redis

from patchpilot.clock import SYSTEM
from patchpilot.errors import NeedsOperator
from patchpilot.recovery import Finding, Recovery, Site, Window
from patchpilot.recovery.housekeeping import Housekeeping
from patchpilot.valkey.broker import SEPARATOR
from patchpilot.workers.application import site_of
from tests.support.processes import Shop
from tests.support.shop import add, app

pytestmark = pytest.mark.backend

NOW = Window(min_age=timedelta(0))


def ids(broker: redis.Redis, key: str) -> list[str]:
    """The tasks whose messages are in a list, the next in turn first."""
    return [json.loads(raw)["headers"]["id"] for raw in reversed(broker.lrange(key, 0, -1))]


def told(findings: tuple[Finding, ...]) -> list[tuple[str, str, bool]]:
    return [(it.id, it.diagnosis, it.curable) for it in findings]


def test_queues_that_are_named_otherwise_are_known_by_their_names_or_nothing_is_called_lost(
    shop: Shop, recovery: Recovery, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Celery's documentation proposes for priorities; and with a queue for two priorities only."""
    monkeypatch.setitem(app.conf, "broker_transport_options", {"sep": ":", "priority_steps": [0, 5]})
    queued = add.apply_async((1, 1), priority=6).id
    assert ids(broker, "celery:5") == [queued]
    with pytest.raises(NeedsOperator, match=r"set celery\.sep"):
        recovery.recover(NOW)
    with Housekeeping(Site(shop.broker, shop.dsn)) as misled, pytest.raises(NeedsOperator, match=r"set celery\.sep"):
        misled.adopt()
    with Recovery(replace(site_of(app), sep="|")) as other, pytest.raises(NeedsOperator, match=r"set celery\.sep"):
        other.recover(NOW)
    broker.sadd("_kombu.binding.celery", "celery\x06\x16\x06\x16celery")  # from before it was set
    with Recovery(site_of(app)) as informed:
        assert informed.survey(NOW) == ()
        broker.delete("celery:5")
        assert [it.id for it in informed.recover(NOW)] == [queued]
    assert ids(broker, "celery:5") == [queued]


@pytest.mark.parametrize(
    ("sep", "queue", "bound", "lists"),
    [
        (":", "x:y:z", "", ()),
        (":", "x:y", "", ()),
        (":", "ours", "theirs::theirs", ()),
        (":", "ours", "ours::ours", ("ours\x06\x166",)),
        (SEPARATOR, "ours", "", ("ours:6",)),
    ],
    ids=["colons", "two colons", "two separators", "a list as before", "a list as by another"],
)
def test_what_may_be_in_a_queue_that_is_named_otherwise_is_not_called_lost(
    shop: Shop, broker: redis.Redis, sep: str, queue: str, bound: str, lists: tuple[str, ...]
) -> None:
    task = add.apply_async((1, 1), queue=queue).id
    broker.delete(queue)
    with Recovery(Site(shop.broker, shop.dsn)) as informed:
        assert told(informed.survey(NOW)) == [(task, "message-lost", True)]
    for name in ("other:6", "ours-of-ours:6", *lists):
        broker.rpush(name, "{}")
    if bound:
        broker.sadd("_kombu.binding.shop", bound)
    misled = Recovery(Site(shop.broker, shop.dsn, sep=sep))
    with misled, pytest.raises(NeedsOperator, match=r"set celery\.sep"):
        misled.recover(NOW)


def test_lists_of_other_queues_are_not_taken_for_those_of_ours(shop: Shop, broker: redis.Redis) -> None:
    task = add.apply_async((1, 1), queue="ours").id
    broker.delete("ours")
    for name in ("other:6", "ours-of-ours:6", f"ours{SEPARATOR}6"):
        broker.rpush(name, "{}")
    add.apply_async((1, 1), queue="ours:7")
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        assert told(recovery.survey(NOW)) == [(task, "message-lost", True)]


def test_what_was_taken_is_found_under_the_keys_of_the_application(
    shop: Shop, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"unacked_key": "taken", "unacked_index_key": "taken-when"}
    monkeypatch.setitem(app.conf, "broker_transport_options", options)
    task = add.delay(1, 1).id
    [raw] = broker.lrange("celery", 0, -1)
    broker.delete("celery")
    broker.hset("taken", "tag", json.dumps([json.loads(raw), "", "celery"]))
    broker.zadd("taken-when", {"tag": SYSTEM.now().timestamp()})
    with Recovery(site_of(app)) as recovery:
        assert [(it.id, it.diagnosis) for it in recovery.recover(NOW)] == [(task, "abandoned")]
    assert ids(broker, "celery") == [task]
    assert not broker.exists("taken", "taken-when")
