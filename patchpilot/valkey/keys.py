"""The keys that a chord has in Valkey while it is under way, by Celery's names: read, and removed under a guard.

A chord's keys are those of its group with a suffix: ``.j`` what its parts returned, ``.s`` its size, ``.t`` what was
added since, ``.d`` which parts returned, ``.c`` who dispatches it; and without one, the group itself if it nests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import celery
import redis
from redis.exceptions import RedisError, ResponseError

from patchpilot.dsn import mask
from patchpilot.errors import Transient

STEM = "celery-taskset-meta-"
TASK_STEM = "celery-task-meta-"
SUFFIXES = (".j", ".t", ".s", ".d", ".c", "")
PAGE = 1000
"""How many keys are looked at with one command."""

# Untouched for long enough, all of them, or none goes. Somebody who begins the chord anew touches them.
_REMOVE = """
for _, key in ipairs(KEYS) do
    if redis.call('EXISTS', key) == 1 and redis.call('OBJECT', 'IDLETIME', key) < tonumber(ARGV[1]) then return -1 end
end
return redis.call('UNLINK', unpack(KEYS))
"""


_READ = """
local parts = {}
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'zset' then parts = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES') end
if kind == 'list' then
    for _, part in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
        table.insert(parts, part)
        table.insert(parts, '')
    end
end
local found = {parts}
for place = 2, 5 do
    local kind = redis.call('TYPE', KEYS[place]).ok
    if kind == 'string' then found[place] = redis.call('GET', KEYS[place])
    else found[place] = kind ~= 'none' and '' end
end
if kind ~= 'zset' and kind ~= 'list' and kind ~= 'none' then found[2] = '' end
"""
_STOP = _READ + "if not found[4] then redis.call('DEL', KEYS[2]) end return found"
_READ += "return found"

_DROP = """
local kind = redis.call('TYPE', KEYS[1]).ok
local parts = 0
if kind == 'zset' then parts = redis.call('ZCARD', KEYS[1]) end
if kind == 'list' then parts = redis.call('LLEN', KEYS[1]) end
if parts > tonumber(ARGV[1]) then return 0 end
redis.call('UNLINK', unpack(KEYS))
return 1
"""


@dataclass(frozen=True)
class Count:
    """How far Celery's own backend has counted a chord."""

    parts: tuple[tuple[bytes, int | None], ...] = ()
    """What has returned, encoded, each with its place in the header if that is known."""
    size: int | None = None
    """None if it has not been sent to its end, or that was lost, or is garbled."""
    added: int = 0
    claimed: bool = False
    """Somebody dispatches its callback, or has."""
    group: bytes | None = None
    """The header's results, encoded, if they nest."""
    garbled: bool = False
    """One of the keys holds what Celery does not write there."""

    @property
    def over(self) -> bool:
        """Its callback has been dispatched: all that is left is who did it."""
        return self.claimed and self.size is None and not (self.parts or self.garbled)


@dataclass(frozen=True)
class Keys:
    """What one chord has in Valkey."""

    group_id: str
    suffixes: tuple[str, ...]
    idle: timedelta | None
    """For how long nobody has touched any of them; None if the server does not keep that (an LFU eviction policy)."""
    expires: timedelta | None
    """When the last of them goes by itself; None if one never does."""


class ChordKeys:
    """The keys of chords on one server.

    :param url: of the server, with the database number.
    :param prefix: the ``global_keyprefix`` of the application's result backend transport options.
    """

    def __init__(self, url: str, prefix: str = "") -> None:
        self._client = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
        self.address = mask(url)
        self._prefix = _completed(prefix)
        self._stem = f"{self._prefix}{STEM}"

    def close(self) -> None:
        self._client.close()

    def key(self, group_id: str, suffix: str) -> str:
        return f"{self._stem}{group_id}{suffix}"

    def pages(self) -> Iterator[list[Keys]]:
        """All chords that have keys, a page at a time. One may come more than once, each time with some of its keys.

        :raises Transient: the server cannot be read.
        """
        with self._away():
            cursor = 0
            while True:
                page: Any = self._client.scan(cursor, match=f"{_literally(self._stem)}*", count=PAGE)
                cursor, found = page
                if names := sorted({self._group_of(key) for raw in found if (key := _text(raw)) is not None}):
                    yield self.of(names)
                if cursor == 0:
                    return

    def of(self, group_ids: Iterable[str]) -> list[Keys]:
        """What these chords have. Of those that have nothing, nothing.

        :raises Transient: the server cannot be read.
        """
        asked = [(group_id, suffix) for group_id in group_ids for suffix in SUFFIXES]
        with self._away(), self._client.pipeline(transaction=False) as pipe:
            for group_id, suffix in asked:
                pipe.pttl(self.key(group_id, suffix))
                pipe.object("IDLETIME", self.key(group_id, suffix))
            answers = pipe.execute(raise_on_error=False)
        found: dict[str, dict[str, tuple[int, Any]]] = {}
        for (group_id, suffix), ttl, idle in zip(asked, answers[::2], answers[1::2], strict=True):
            if isinstance(ttl, Exception):
                raise Transient(f"{self.address} cannot be read: {ttl}") from ttl
            if ttl != -2:  # there is such a key
                found.setdefault(group_id, {})[suffix] = (ttl, idle)
        return [_keys(group_id, by_suffix) for group_id, by_suffix in found.items()]

    def remove(self, group_id: str, idle: timedelta, keep: Iterable[str] = ()) -> int:
        """Remove what a chord has, if nobody has touched any of it for ``idle``.

        :returns: how many keys went; -1 if somebody has.
        :raises Transient: the server cannot be reached.
        """
        names = [self.key(group_id, suffix) for suffix in SUFFIXES if suffix not in set(keep)]
        with self._away():
            removed: Any = self._client.eval(_REMOVE, len(names), *names, int(idle.total_seconds()))
        return int(removed)

    def count(self, group_id: str) -> Count:
        """What Celery's own backend has counted of a chord.

        :raises Transient: the server cannot be read.
        """
        return self._count(_READ, group_id)

    def results(self, task_ids: Sequence[str]) -> list[bytes]:
        """What Celery's own backend has stored as the results of these tasks, encoded.

        :raises Transient: the server cannot be read.
        """
        with self._away():
            found: Any = self._client.mget([f"{self._prefix}{TASK_STEM}{task_id}" for task_id in task_ids])
        return [raw for raw in found if raw is not None]

    def stop(self, group_id: str) -> Count:
        """As :meth:`count`; unless somebody is dispatching the chord, Celery's own backend can count no more of it.

        :raises Transient: the server cannot be reached.
        """
        return self._count(_STOP, group_id)

    def drop(self, group_id: str, parts: int) -> bool:
        """Remove what is left of a chord that was stopped, unless more than ``parts`` have returned by now.

        :raises Transient: the server cannot be reached.
        """
        names = [self.key(group_id, suffix) for suffix in (".j", ".t", ".d", ".s", "")]
        with self._away():
            return bool(self._client.eval(_DROP, len(names), *names, parts))

    def _count(self, script: str, group_id: str) -> Count:
        names = [self.key(group_id, suffix) for suffix in (".j", ".s", ".t", ".c", "")]
        with self._away():
            answer: Any = self._client.eval(script, len(names), *names)
        parts, size, added, claim, group = answer
        pairs = tuple((part, _place(score)) for part, score in zip(parts[::2], parts[1::2], strict=True))
        garbled = not all(raw is None or raw.isdigit() for raw in (size, added))
        size, added = (int(raw) if raw and raw.isdigit() else None for raw in (size, added))
        return Count(pairs, size, added or 0, claim is not None, group, garbled)

    def _group_of(self, key: str) -> str:
        name = key.removeprefix(self._stem)
        return name[:-2] if name[-2:] in SUFFIXES else name

    @contextmanager
    def _away(self) -> Iterator[None]:
        try:
            yield
        except ResponseError as error:
            raise Transient(f"{self.address} does not say how long a key has been idle: {error}") from error
        except RedisError as error:
            raise Transient(f"{self.address} cannot be read: {error}") from error


def _completed(prefix: str) -> str:
    """A global prefix as Celery's Redis backend puts it in front: 5.4 always sets it off, later ones if it is not."""
    if not prefix or (celery.VERSION >= (5, 5) and prefix[-1] in ":_-."):
        return prefix
    return f"{prefix}_"


def _keys(group_id: str, by_suffix: Mapping[str, tuple[int, Any]]) -> Keys:
    ttls = [ttl for ttl, _ in by_suffix.values()]
    idles = [idle for _, idle in by_suffix.values()]
    known = all(isinstance(idle, int) for idle in idles)
    return Keys(
        group_id,
        tuple(suffix for suffix in SUFFIXES if suffix in by_suffix),
        timedelta(seconds=min(idles)) if known else None,
        None if -1 in ttls else timedelta(milliseconds=max(ttls)),
    )


def _text(raw: bytes) -> str | None:
    """None for what is not UTF-8, or has a NUL in it: Celery has not written it, and PostgreSQL does not take it."""
    try:
        return None if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return None


def _place(score: bytes) -> int | None:
    return int(float(score)) if score and b"inf" not in score else None


def _literally(text: str) -> str:
    """A pattern that matches ``text`` only."""
    return "".join(f"\\{each}" if each in "*?[]\\^" else each for each in text)
