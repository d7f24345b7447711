"""A failover loses what it is meant to lose, and nothing else."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import pytest
import redis

from patchpilot.clock import SYSTEM
from patchpilot.errors import Unsafe
from patchpilot.lab.processes import until
from patchpilot.lab.replicas import ReplicaSet, Windows
from patchpilot.lab.roster import Roster


@dataclass
class Writer:
    """Numbered writes through the endpoint for as long as the block lasts, each remembered once it is acknowledged."""

    endpoint: str
    acknowledged: dict[int, datetime] = field(default_factory=dict)
    refused: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Self:
        self._thread.start()
        self.await_writes(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.await_writes(20)
        self._stop.set()
        self._thread.join()

    def await_writes(self, count: int) -> None:
        goal = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= goal, seconds=30, what="writes were acknowledged")

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with redis.Redis.from_url(self.endpoint, retry=None, socket_timeout=2) as client:
                    while not self._stop.wait(0.001):
                        number += 1
                        client.set(f"n:{number}", number)
                        self.acknowledged[number] = SYSTEM.now()
            except (redis.ConnectionError, redis.TimeoutError):
                self.refused += 1
                self._stop.wait(0.005)


def held(replicas: ReplicaSet) -> set[int]:
    with replicas.primary.client() as client:
        return {int(str(key).removeprefix("n:")) for key in client.keys("n:*")}


@pytest.fixture
def three(lab_roster: Roster, tmp_path: Path) -> Iterator[ReplicaSet]:
    """A primary and two replicas."""
    with ReplicaSet(tmp_path, roster=lab_roster, name=f"three-{uuid.uuid4().hex[:8]}") as replicas:
        yield replicas


def test_writes_in_the_window_are_lost_and_those_before_and_after_are_kept(three: ReplicaSet) -> None:
    with Writer(three.endpoint) as writer:
        done = three.failover(Windows(write_loss=0.3, endpoint_lag=0.3))

    kept = held(three)
    lost = {number for number in writer.acknowledged if number not in kept}
    assert lost, "the window is there to lose something"
    assert all(done.promoted <= writer.acknowledged[number] <= done.closed for number in lost)
    # A write can be under way while the replica is told; well inside the window none survives.
    inside = {
        n for n, at in writer.acknowledged.items() if done.promoted + timedelta(milliseconds=100) < at < done.closed
    }
    assert inside
    assert inside <= lost
    assert any(at > done.moved for at in writer.acknowledged.values())
    assert writer.refused > 0


def test_the_windows_are_as_long_as_they_are_set(replicated: ReplicaSet) -> None:
    done = replicated.fail_over(Windows(write_loss=0.2, endpoint_lag=0.4))
    # At least: how much longer they are is the machine's affair.
    assert done.closed - done.promoted >= timedelta(seconds=0.2)
    assert done.moved - done.closed >= timedelta(seconds=0.4)


def test_the_endpoint_moves_and_its_address_stays(three: ReplicaSet) -> None:
    old, endpoint = three.primary, three.endpoint

    done = three.failover(Windows(0.05, 0.05))

    assert (done.old, done.new) == (old.name, three.primary.name)
    assert three.primary is not old
    assert three.endpoint == endpoint
    with redis.Redis.from_url(endpoint, decode_responses=True) as client:
        assert client.info("replication")["role"] == "master"
        assert client.info("server")["tcp_port"] == three.primary.address.port
    assert {node.replication().follows for node in three.replicas} == {three.primary.address}
    assert done.promoted.tzinfo is UTC


def test_after_a_failover_no_node_has_what_was_lost(three: ReplicaSet) -> None:
    old, replicas = three.primary, three.replicas

    def write_within() -> None:
        """To the old primary, once a replica was promoted."""
        until(lambda: any(node.replication().primary for node in replicas), seconds=30, what="one was promoted")
        with old.client() as client:
            client.set("within", 1)

    with redis.Redis.from_url(three.endpoint) as client:
        client.set("before", 1)
        three.await_sync()
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(write_within)
            three.failover(Windows(write_loss=3.0, endpoint_lag=0.0))
            written.result()
    for node in three.nodes.values():
        with node.client() as client:
            assert client.keys("*") == ["before"]


def test_without_a_loss_window_no_acknowledged_write_is_lost(replicated: ReplicaSet) -> None:
    with Writer(replicated.endpoint) as writer:
        replicated.failover(Windows(write_loss=0.0, endpoint_lag=0.1))
    assert set(writer.acknowledged) <= held(replicated)


def test_failovers_can_go_round_and_round(replicated: ReplicaSet) -> None:
    primaries = [replicated.failover(Windows(0.01, 0.01)).new for _ in range(4)]
    assert len(set(primaries)) == 2
    assert primaries[:2] == primaries[2:]


def test_a_second_failover_at_the_same_time_is_refused(replicated: ReplicaSet) -> None:
    first = threading.Thread(target=replicated.failover, args=(Windows(0.3, 0.0),))
    first.start()
    with pytest.raises(Unsafe, match="under way"):
        until(lambda: bool(replicated.fail_over(Windows(0.3, 0.0))), seconds=5, what="the second one was refused")
    first.join()


def test_without_a_replica_there_is_no_failover_and_nothing_is_touched(replicated: ReplicaSet) -> None:
    (replica,) = replicated.replicas
    replica.stop(hard=True)
    with pytest.raises(Unsafe, match="no replica"):
        replicated.fail_over(Windows())
    with redis.Redis.from_url(replicated.endpoint) as client:
        assert client.ping()


def test_a_dead_primary_is_failed_over_from(replicated: ReplicaSet) -> None:
    replicated.primary.stop(hard=True)
    done = replicated.failover(Windows(0.0, 0.0))
    with redis.Redis.from_url(replicated.endpoint) as client:
        assert client.ping()
    assert replicated.nodes[done.old].replication().link_up
