"""Which errors of Valkey pass by themselves, so that counting is tried again."""

from __future__ import annotations

import pytest
import redis

from patchpilot.backend.counter import is_failing_over
from patchpilot.backend.sockets import NotPrimary

pytestmark = pytest.mark.backend

# Codes that redis-py knows it takes off the message.
PASSING = [
    redis.ConnectionError("gone"),
    redis.TimeoutError("silent"),
    redis.BusyLoadingError("loading the dataset in memory"),
    redis.ReadOnlyError("You can't write against a read only replica."),
    redis.exceptions.MasterDownError("Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
    redis.ResponseError("UNBLOCKED force unblock from blocking operation"),
    redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
    redis.ResponseError("BUSY Valkey is busy running a script."),
    NotPrimary("connected to a replica"),
]
LASTING = [
    redis.ResponseError("WRONGTYPE"),
    redis.ResponseError("BUSYGROUP"),
    redis.OutOfMemoryError("OOM"),
    ValueError(),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_passes_is_tried_again(error: Exception) -> None:
    assert is_failing_over(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_lasts_is_not(error: Exception) -> None:
    assert not is_failing_over(error)
