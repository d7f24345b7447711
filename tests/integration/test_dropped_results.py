"""Results that nobody keeps: the garbage collector gives their subscriptions back, wherever it strikes."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import redis

from patchpilot.lab.processes import until
from tests.support.processes import Shop
from tests.support.shop import add, app

pytestmark = pytest.mark.backend


def subscribers(broker: redis.Redis, key: str) -> int:
    """How many listen for the result under ``key``."""
    [(_, count)] = broker.pubsub_numsub(key)
    return int(count)


def test_a_result_that_is_dropped_in_the_middle_of_a_subscription(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py may hold its lock then. Waiting for it, in the very thread that holds it, would be for ever."""
    consumer = app.backend.result_consumer
    results = [add.delay(1, 1)]
    key = app.backend.get_key_for_task(results[0].id)
    kept = weakref.ref(results[0])
    execute = consumer._pubsub._execute

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        results.clear()
        return execute(*args, **kwargs)

    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: subscribers(broker, key) == 1, seconds=30, what="the result was subscribed to")
        monkeypatch.setattr(consumer._pubsub, "_execute", interrupted)
        subscribing = threading.Thread(target=lambda: consumer.consume_from("another"), daemon=True)
        subscribing.start()
        subscribing.join(30)
        assert not subscribing.is_alive()
        assert results == []
        gc.collect()  # an error on the way to the broker, even one that was dealt with, can leave the result in a cycle
        assert kept() is None
        assert (list(consumer._let_go), consumer.subscribed_to) == ([], {app.backend.get_key_for_task("another")})
        until(lambda: subscribers(broker, key) == 0, seconds=30, what="the subscription was given back")


@pytest.mark.parametrize("end", ["get", "forget", "drop"])
def test_the_subscription_goes_with_the_last_use_of_a_result(shop: Shop, end: str) -> None:
    """Nothing else has to be waited for until then."""
    if end == "get":
        shop.worker("-c", "1")
    results = [add.delay(1, 1)]
    key = app.backend.get_key_for_task(results[0].id)
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: subscribers(broker, key) == 1, seconds=30, what="the result was subscribed to")
        if end == "get":
            assert results[0].get(timeout=30) == 2
        elif end == "forget":
            results[0].forget()
        else:
            results.clear()
        until(lambda: subscribers(broker, key) == 0, seconds=30, what="the subscription was given back")
