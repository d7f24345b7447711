"""Counting a chord's parts in Valkey: a hint that the chord is complete, never the truth about it.

The keys have Celery's own names, so that what looks after those looks after these: ``.d`` the set of parts that
returned, ``.s`` the header's size. Counting is by membership, so a part that is counted twice counts once. A chord that
grows, or whose count failed, is counted in PostgreSQL from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from celery.utils.log import get_logger
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from patchpilot.clock import SYSTEM, Backoff

logger = get_logger(__name__)

T = TypeVar("T")

_COUNT = """
redis.call('SADD', KEYS[1], ARGV[1])
local expires = tonumber(ARGV[2])
if expires > 0 then
    for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, expires) end
end
return {redis.call('SCARD', KEYS[1]), redis.call('GET', KEYS[2])}
"""

SUFFIXES = (".d", ".s")
CELERY_SUFFIXES = (*SUFFIXES, ".t", ".c", "")
"""Every key that Celery's own backends, or we, may have made for a chord while it was under way."""

PARTS = ".j"
"""What the parts of a failed chord returned, for people: Celery's Redis backend leaves it behind too."""

HASTE = 1.0
"""Seconds for which the size of a chord is tried to be set: somebody waits for the chord to be sent."""

FAILING_OVER = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, MasterDownError)
"""What a failover looks like from a client: a lost connection, silence, or a primary that no longer is one."""


def is_failing_over(error: BaseException) -> bool:
    """Whether ``error`` is what a client sees of a failover, or of a node that is loading or busy with a script."""
    if isinstance(error, FAILING_OVER):
        return True
    return isinstance(error, ResponseError) and str(error).startswith(
        ("LOADING", "MASTERDOWN", "UNBLOCKED", "READONLY", "NOREPLICAS", "BUSY ")
    )


class Counter:
    """Counts parts.

    :param client: gives the Redis client; asked each time, because a fork changes it.
    :param key: the key of a group with a suffix, global prefix included.
    :param budget: seconds for which a failing-over Valkey is retried.
    """

    def __init__(self, client: Callable[[], Any], key: Callable[[str, str], Any], budget: float) -> None:
        self._client = client
        self._key = key
        self._budget = budget

    def expect(self, group_id: str, size: int, expires: int) -> None:
        """Say how many parts a chord has.

        :param expires: the key's time to live in seconds; 0 for none.
        :raises RedisError: if Valkey cannot be told now.
        """
        key = self._key(group_id, ".s")
        self._persistently(group_id, lambda client: client.set(key, size, ex=expires or None), HASTE)

    def add(self, group_id: str, member: str, expires: int) -> bool:
        """Count one part.

        :param expires: the keys' time to live in seconds; 0 for none.
        :returns: whether this may have completed the chord.
        :raises RedisError: if Valkey stayed away for the whole budget.
        """
        keys = [self._key(group_id, suffix) for suffix in SUFFIXES]
        count, size = self._persistently(
            group_id, lambda client: client.eval(_COUNT, len(keys), *keys, member, expires), self._budget
        )
        return size is not None and int(count) >= int(size)

    def clear(self, group_id: str) -> None:
        """Remove every key of a chord that is over. Best effort: the keys expire anyway."""
        keys = [self._key(group_id, suffix) for suffix in CELERY_SUFFIXES]
        try:
            self._client().delete(*keys)
        except RedisError as error:
            logger.info("Keys of chord %s are left to expire: %r", group_id, error)

    def leave(self, group_id: str, parts: Sequence[Any], expires: int, *, ordered: bool) -> bool:
        """Leave what the parts of a failed chord returned. Best effort.

        :param parts: as Celery's Redis backend encodes them.
        :param expires: the key's time to live in seconds; 0 for none.
        :returns: whether Valkey took it.
        """
        key = self._key(group_id, PARTS)
        try:
            with self._client().pipeline() as pipe:
                pipe.delete(key)
                if ordered:
                    pipe.zadd(key, {part: place for place, part in enumerate(parts)})
                else:
                    pipe.rpush(key, *parts)
                if expires > 0:
                    pipe.expire(key, expires)
                pipe.execute()
        except (RedisError, OSError) as error:
            logger.info("The parts of chord %s are in PostgreSQL only: %r", group_id, error)
            return False
        return True

    def _persistently(self, group_id: str, call: Callable[[Any], T], budget: float) -> T:
        backoff = Backoff(SYSTEM, budget)
        told = False
        while True:
            client = self._client()
            try:
                return call(client)
            except RedisError as error:
                if not is_failing_over(error):
                    raise
                # Whatever is pooled leads to where the primary was.
                client.connection_pool.disconnect()
                if not told:
                    logger.warning("Valkey is away, counting the parts of chord %s is tried again: %r", group_id, error)
                    told = True
                if not backoff.pause():
                    raise
