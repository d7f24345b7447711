"""Waiting for a result across an outage of Valkey: the notification counts again when it is back."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from patchpilot.backend import waiting
from patchpilot.lab.links import Link
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode
from tests.conftest import shop_on
from tests.support.shop import app

pytestmark = pytest.mark.backend

WAIT = 60
NEVER = 3600.0


def test_a_waiter_is_woken_by_the_notification_after_an_outage(
    lab_roster: Roster, tmp_path: Path, valkey: str, valkey_server: ValkeyNode, migrated: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not only by asking PostgreSQL, which is what finds out that the subscription is gone."""
    monkeypatch.setattr(waiting, "ASK_EVERY", 0.05)
    with (
        Link(valkey_server.address) as link, ThreadPoolExecutor(1) as threads, redis.Redis.from_url(valkey) as client,
        shop_on(lab_roster, tmp_path, f"redis://{link.address}/0", migrated, monkeypatch),
    ):  # fmt: skip
        result = app.AsyncResult(str(uuid.uuid4()))
        key, consumer = app.backend.get_key_for_task(result.id), app.backend.result_consumer

        def subscribers() -> int:
            return int(client.pubsub_numsub(key)[0][1])

        waiter = threads.submit(result.get, timeout=2 * WAIT)
        until(lambda: subscribers() == 1, seconds=WAIT, what="the waiter was subscribed")
        link.refuse()
        until(lambda: consumer._pubsub is None and subscribers() == 0, seconds=WAIT, what="it lost its subscription")
        link.retarget(valkey_server.address)
        until(lambda: subscribers() == 1, seconds=WAIT, what="it was subscribed again")
        monkeypatch.setattr(waiting, "ASK_EVERY", NEVER)
        app.backend.store_result(result.id, 8, "SUCCESS")
        assert waiter.result(WAIT) == 8
