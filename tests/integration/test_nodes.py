"""What a node says of itself, and what it refuses to say."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
import redis

from patchpilot.errors import Refused
from patchpilot.valkey import nodes
from patchpilot.valkey.nodes import Memory, Report


def test_a_node_tells_of_its_memory_and_its_limit(valkey: str) -> None:
    with redis.Redis.from_url(valkey) as client:
        client.config_set("maxmemory", "64mb")
        try:
            report = nodes.connect(valkey).endpoint()
        finally:
            client.config_set("maxmemory", "0")
    assert report.memory is not None
    assert (report.memory.limit, report.memory.policy) == (64 * 1024 * 1024, "noeviction")
    assert 0 < report.memory.used < report.memory.limit


def test_without_a_limit_the_machines_memory_is_the_limit() -> None:
    info = {"role": "master", "used_memory": 7, "maxmemory": 0, "total_system_memory": 9}
    assert Report.of(info).memory == Memory(7, 9)
    assert Report.of({"role": "slave"}).memory is None


def test_a_node_that_may_not_be_asked_refuses_this_and_nothing_else(valkey: str) -> None:
    with redis.Redis.from_url(valkey) as client:
        client.acl_setuser("pilot", enabled=True, passwords=["+hunter2"], commands=["+@all", "-info"], keys=["*"])
        try:
            with pytest.raises(Refused, match="allow this user the command INFO") as refusal:
                nodes.connect(valkey.replace("redis://", "redis://pilot:hunter2@")).endpoint()
        finally:
            client.acl_deluser("pilot")
    assert "hunter2" not in str(refusal.value)


def test_the_address_of_the_endpoint(valkey: str) -> None:
    assert nodes.connect(valkey).address == ("127.0.0.1", urlsplit(valkey).port)
    assert nodes.connect("rediss://user:secret@master.test/0").address == ("master.test", 6379)
