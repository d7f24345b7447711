"""Many healthy chords under load, and a recovery that sweeps every second: `make soak-healthy`.

HEALTHY_CHORDS says how many (10,000), PATCHPILOT_TEST_COUNTING where they are counted.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

import pytest
from celery import chain, chord

from patchpilot.clock import SYSTEM, Clock
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from tests.support.processes import Shop
from tests.support.shop import add, total

CHORDS = int(os.environ.get("HEALTHY_CHORDS", "10000"))

MOST_OPEN = 300
"""Chords under way at once: enough for queues that are never empty."""

PREFETCH = '{"worker_prefetch_multiplier": 4}'


def producer(start: int, dice: random.Random, count: int, room: threading.Semaphore) -> Iterator[None]:
    for number in range(start, start + count):
        room.acquire()
        label = f"chord{number}"
        header = [add.s(number, i) for i in range(dice.randint(1, 4))]
        if dice.random() < 0.2:
            header.append(chain(add.s(1, number), add.s(1)))
        if dice.random() < 0.1:
            header.append(chord([add.s(1, 1), add.s(2, 2)], total.s(label="inner")))
        if dice.random() < 0.1:
            header[0].set(countdown=dice.uniform(0, 3))
        chord(header, total.s(label=label)).apply_async()
        yield


@pytest.mark.slow
@pytest.mark.healthy
@pytest.mark.timeout(3600)
def test_of_many_healthy_chords_none_is_touched(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.randrange(10**6)
    shop.worker("-c", "2", SHOP_SETTINGS=PREFETCH)
    shop.worker("-c", "2", SHOP_SETTINGS=PREFETCH, SHOP_ACKS_LATE="1")
    room, begun = threading.Semaphore(MOST_OPEN), SYSTEM.monotonic()
    sending = threading.Thread(target=lambda: list(producer(0, random.Random(seed), CHORDS, room)))
    sending.start()
    clock: Clock = SYSTEM
    sweeps = ran = 0
    with Recovery(Site(shop.broker, shop.dsn)) as recovery, Database(shop.dsn) as database:

        def pass_once() -> bool:
            nonlocal sweeps, ran
            applied = recovery.recover(Window(min_age=timedelta(0)))
            assert applied == (), f"seed {seed}, sweep {sweeps}: {applied}"
            sweeps += 1
            now = len({line for line in shop.ledger() if line.startswith("chord")})
            room.release(now - ran) if now > ran else None
            ran = now
            return ran == CHORDS

        until(pass_once, seconds=3000, what="all callbacks ran")
        sending.join()
        took = clock.monotonic() - begun
        assert database.fetch("SELECT * FROM patchpilot.remedy") == []
        open_chords = "SELECT 1 FROM patchpilot.chord WHERE state IN ('open', 'claimed')"
        until(lambda: database.fetch(open_chords) == [], seconds=60, what="every chord is over")
        assert recovery.survey(Window(min_age=timedelta(0))) == ()
    times = Counter(line.split()[0] for line in shop.ledger() if line.startswith("chord"))
    assert times == {f"chord{number}": 1 for number in range(CHORDS)}
    with capsys.disabled():
        tasks = len(shop.ledger())
        print(f"\n{CHORDS} chords, {tasks} tasks, {sweeps} sweeps, no remedy, {took:.0f} s")  # noqa: T201
