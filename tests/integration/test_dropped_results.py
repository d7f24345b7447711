"""Results that nobody keeps: the garbage collector gives their subscriptions back, wherever it strikes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import redis

from patchpilot.lab.processes import until
from tests.support.processes import Shop
from tests.support.shop import add, app

pytestmark = pytest.mark.backend


def test_a_result_that_is_dropped_in_the_middle_of_a_subscription(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py may hold its lock then. Waiting for it, in the very thread that holds it, would be for ever."""
    consumer = app.backend.result_consumer
    results = [add.delay(1, 1)]
    key = app.backend.get_key_for_task(results[0].id)
    execute = consumer._pubsub._execute

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        results.clear()
        return execute(*args, **kwargs)

    def subscribers() -> int:
        [(_, count)] = broker.pubsub_numsub(key)
        return int(count)

    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: subscribers() == 1, seconds=30, what="the result was subscribed to")
        monkeypatch.setattr(consumer._pubsub, "_execute", interrupted)
        subscribing = threading.Thread(target=lambda: consumer.consume_from("another"), daemon=True)
        subscribing.start()
        subscribing.join(30)
        assert not subscribing.is_alive()
        assert results == []
        monkeypatch.undo()
        consumer.consume_from("yet another")
        until(lambda: subscribers() == 0, seconds=30, what="the subscription was given back")
