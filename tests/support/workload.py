"""A bit of everything, for tests that ask whether the backend works in some surroundings at all."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import redis
from celery import Signature, chain, chord, group
from celery.exceptions import ChordError

from patchpilot.recovery import Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, becomes_chain, boom, note, stubborn, total

WAIT = 60


def work_of_every_kind(**more: tuple[Signature, Any]) -> None:
    """Send tasks and canvases of several kinds, all at once, and check what each of them returns."""
    canvases: dict[str, tuple[Signature, Any]] = {
        "task": (add.s(1, 2), 3),
        "chain": (chain(add.s(1, 2), add.s(3)), 6),
        "group": (group(add.s(1, 1), add.s(2, 2)), [2, 4]),
        "chord": (chord([add.s(i, i) for i in range(10)], total.s()), 90),
        "chord in a chain": (chain(add.s(1, 1), chord([add.s(1), add.s(2)], total.s())), 7),
        "group body": (chord([add.s(1, 1)], group(total.s(), note.s())), [2, [2]]),
        "retried part": (chord([stubborn.s(5), add.s(1, 1)], total.s()), 7),
        "replaced part": (chord([becomes_chain.s(1), add.s(1, 1)], total.s()), 5),
        "failed part": (chord([boom.s(), add.s(1, 1)], total.s()), ChordError),
        **more,
    }
    sent = {name: canvas.apply_async() for name, (canvas, _) in canvases.items()}
    got = {name: outcome(result) for name, result in sent.items()}
    assert got == {name: expected for name, (_, expected) in canvases.items()}


def work_and_recovery(shop: Shop) -> None:
    """A producer, a worker with two children and a recovery, each with something to do. The worker stays."""
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        lost = chord([add.s(2, 3)], total.s()).apply_async()
        with redis.Redis.from_url(shop.broker) as broker:
            broker.delete("celery")
        shop.worker("-c", "2")
        [remedy] = recovery.recover(Window(min_age=timedelta(0)))
        assert remedy.diagnosis == "header-message-lost"
        work_of_every_kind()
        assert lost.get(timeout=WAIT) == 5


def outcome(result: Any) -> Any:
    """What a result returned, or the class of what it raised."""
    value = result.get(timeout=WAIT, propagate=False)
    return type(value) if isinstance(value, Exception) else value
