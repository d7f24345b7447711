"""Counting the parts of a chord on real nodes: where it goes on, for how long it is tried, and that nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from patchpilot.backend.counter import SUFFIXES, Counter
from patchpilot.lab.launch import HOST, Address, free_port
from patchpilot.lab.links import Link
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode

pytestmark = pytest.mark.backend

WAIT = 60


@pytest.fixture
def link(valkey: str, valkey_server: ValkeyNode) -> Iterator[Link]:
    with Link(valkey_server.address) as opened:
        yield opened


def counter(client: redis.Redis, budget: float) -> Counter:
    return Counter(lambda: client, lambda group_id, suffix: f"{group_id}{suffix}", budget)


@pytest.mark.parametrize(("expires", "lasting"), [(3600, False), (0, True)], ids=["expire", "stay"])
def test_the_keys_of_a_chord_expire(valkey: str, expires: int, lasting: bool) -> None:
    """If nobody removes them. What the size was set with does not matter: an older chord may have no end."""
    with redis.Redis.from_url(valkey) as client:
        counting = counter(client, WAIT)
        counting.expect("g", 2, 0)
        assert not counting.add("g", "part", expires)
        assert [client.ttl(f"g{suffix}") == -1 for suffix in SUFFIXES] == [lasting, lasting]


def test_counting_goes_on_at_the_new_primary(
    link: Link, valkey_server: ValkeyNode, lab_roster: Roster, tmp_path: Path
) -> None:
    """Connections that are pooled lead to the old one, which lives and answers."""
    old = ValkeyNode("old", tmp_path, roster=lab_roster)
    old.start()
    try:
        link.retarget(old.address)
        with redis.Redis(host=link.address.host, port=link.address.port) as client:
            counting = counter(client, WAIT)
            counting.expect("g", 1, 0)
            old.follow(Address(HOST, free_port()))
            link.retarget(valkey_server.address)
            valkey_server.ask(lambda new: new.set("g.s", 1))
            assert counting.add("g", "part", 0)
            assert valkey_server.ask(lambda new: new.smembers("g.d")) == {"part"}
    finally:
        old.stop()


def test_whoever_sends_a_chord_does_not_wait_for_as_long_as_its_parts_do(link: Link) -> None:
    link.refuse()
    with redis.Redis(host=link.address.host, port=link.address.port) as client, ThreadPoolExecutor(2) as threads:
        counting = counter(client, 600)
        adding = threads.submit(counting.add, "g", "part", 0)
        expecting = threads.submit(counting.expect, "g", 1, 0)
        try:
            until(expecting.done, seconds=WAIT, what="the sender gave up")
            assert isinstance(expecting.exception(), redis.ConnectionError)
            assert not adding.done()
        finally:
            link.retarget(link.target)
        assert not adding.result(WAIT)
