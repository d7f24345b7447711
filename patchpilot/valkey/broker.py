"""The broker as Valkey holds it: which messages are queued, and which a worker has taken and not yet acknowledged.

Reads only, except for the canaries' queues. The layout is kombu's Redis transport's (read in kombu 5.7.0): a queue is a
list per priority step, named ``<queue>`` or ``<queue><sep><priority>``, whose head is the newest message; what a
consumer took is in the hash ``unacked`` under its delivery tag, with the time it was taken in the sorted set
``unacked_index``, if the application does not call them otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

import redis
from redis.exceptions import NoPermissionError, RedisError

from patchpilot.broker_name import NAMES, name_of_url
from patchpilot.dsn import mask
from patchpilot.errors import NeedsOperator, Transient

SEPARATOR = "\x06\x16"
"""kombu's own, where the broker transport options have no ``sep``."""

UNACKED = ("unacked", "unacked_index")
"""kombu's own, where they have no ``unacked_key`` and ``unacked_index_key``."""

_CHUNK = 1000
MESSAGE_ID = "patchpilot_message"


@dataclass(frozen=True)
class Holdings:
    """What the broker held at one moment, by our message id."""

    queued: frozenset[str]
    unacked: dict[str, str]
    """Message id -> delivery tag."""
    taken: dict[str, float] = field(default_factory=dict)
    """Message id -> when it was taken, by the clock of the worker that did."""


@dataclass(frozen=True)
class Delivery:
    """One message as the broker has it."""

    key: str
    """Of the list that it is in, or of the unacknowledged."""
    queue: str | None
    """None if it is unacknowledged."""
    raw: bytes
    message: dict[str, Any]
    """Empty, if it is no message of kombu's."""
    tag: str | None = None
    """Its delivery tag, if it is unacknowledged."""


# True also for what has been replaced like this before.
_REPLACE = """
if ARGV[3] ~= '' then
    local found = redis.call('HGET', KEYS[1], ARGV[3])
    if found == ARGV[1] then redis.call('HSET', KEYS[1], ARGV[3], ARGV[2]) end
    return (found == ARGV[1] or found == ARGV[2]) and 1 or 0
end
local place = redis.call('LPOS', KEYS[1], ARGV[1])
if place then redis.call('LSET', KEYS[1], place, ARGV[2]) end
return (place or redis.call('LPOS', KEYS[1], ARGV[2])) and 1 or 0
"""


class Broker:
    """Reads one broker.

    :param url: the primary endpoint, ``redis://`` or ``rediss://``, with the database number.
    :param prefix: the ``global_keyprefix`` of the application's broker transport options.
    :param name: what the record calls it, if not by its address.
    :param sep: the ``sep`` of the options.
    :param unacked: the ``unacked_key`` and the ``unacked_index_key`` of the options.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "",
        name: str | None = None,
        sep: str = SEPARATOR,
        unacked: tuple[str, str] = UNACKED,
    ) -> None:
        self._client = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
        self._prefix = prefix
        self._sep = sep
        self._unacked_key, self._index_key = (f"{prefix}{key}" for key in unacked)
        self._url = mask(url)
        self._own = {found for found in (name, name_of_url(url, prefix)) if found}
        self.name = name or name_of_url(url, prefix)
        """What to call it in the record."""

    def holdings(self, queues: Iterable[str], exchanges: Iterable[str] = ()) -> Holdings:
        """Everything in ``queues``, and in the queues bound to ``exchanges``, and everything unacknowledged.

        A message moves from a queue to the unacknowledged ones, so those are read last. One that is between the two,
        in a worker's hands, is in neither: look twice before calling a message lost.

        :raises Transient: if the broker cannot be read.
        """
        try:
            names = set(queues).union(*(self._bound(exchange) for exchange in exchanges))
            queued = frozenset(found for name in sorted(names) for found in self._queued(name))
            taken = {tag: float(at) for tag, at in self._taken()}
            unacked = dict(self._unacked())
            return Holdings(queued, unacked, {key: taken[tag] for key, tag in unacked.items() if tag in taken})
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error

    def names(self) -> frozenset[str]:
        """What the record calls this broker: by its address as we know it, and by those that its users left in it.

        :raises Transient: if the broker cannot be read.
        """
        try:
            left: Any = self._client.smembers(f"{self._prefix}{NAMES}")
        except NoPermissionError:  # then nobody left a name either
            left = ()
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error
        return frozenset(self._own | {name.decode() for name in left})

    def declared(self) -> set[str]:
        """The queues that somebody has declared and bound to an exchange.

        :raises Transient: if the broker cannot be read.
        """
        try:
            return {queue for exchange in self._exchanges() for queue in self._bound(exchange)}
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error

    def messages(self, queues: Iterable[str]) -> Iterator[Delivery]:
        """Every message in ``queues``, and every one that is unacknowledged, as it is. Some come more than
        once.

        A message moves between the two, both ways: those unacknowledged are read first, and last again.

        :raises Transient: if the broker cannot be read.
        """
        try:
            yield from chain(self._abandonable(), self._lying(queues), self._abandonable())
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error

    def replace(self, delivery: Delivery, message: dict[str, Any]) -> bool:
        """Put ``message`` in the place of one that was read. False if that is not there any more.

        :raises Transient: if the broker cannot be reached.
        """
        place, new = delivery.tag or "", json.dumps(message)
        if delivery.tag is not None:
            _, exchange, routing_key = json.loads(delivery.raw)
            new = json.dumps([message, exchange, routing_key])
        try:
            return bool(self._client.eval(_REPLACE, 1, delivery.key, delivery.raw, new, place))
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be reached: {error}") from error

    def depth(self, queue: str) -> tuple[int, str]:
        """How many messages are in ``queue``, and a digest of those next in turn: the oldest of each priority.

        :raises Transient: if the broker cannot be read.
        """
        try:
            with self._client.pipeline(transaction=True) as both:
                for name in self._lists(queue):
                    both.llen(name)
                    both.lindex(name, -1)
                found: list[Any] = both.execute()
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error
        oldest = b"".join(filter(None, found[1::2]))
        return sum(found[::2]), hashlib.sha256(oldest).hexdigest()[:12] if oldest else ""

    def expire(self, queue: str, after: timedelta) -> None:
        """Let what is in ``queue`` now go away by itself if nobody has taken it ``after`` so long.

        :raises RedisError: if the broker does not answer.
        """
        for name in self._lists(queue):
            self._client.expire(name, after)

    def discard(self, queues: Iterable[str]) -> None:
        """Remove these queues with all that is in them.

        :raises RedisError: if the broker does not answer.
        """
        if names := [name for queue in queues for name in self._lists(queue)]:
            self._client.delete(*names)

    def check(self) -> None:
        """Make sure that the broker answers.

        :raises Transient: if it does not.
        """
        try:
            self._client.ping()
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error

    def check_layout(self, queues: Iterable[str] = (), exchanges: Iterable[str] = ()) -> None:
        """Make sure that queues are called here as we call them.

        :param queues: those that matter, with those bound to ``exchanges``.
        :raises NeedsOperator: if a binding or a list shows that one is not.
        :raises Transient: if the broker cannot be read.
        """
        try:
            bound = [member for exchange in self._exchanges() for member in self._members(exchange)]
            names = set(queues).union(*(self._bound(exchange) for exchange in exchanges))
            # Of the time before an application set a separator, bindings with kombu's own are left.
            ours, before = ({_queue(it, sep) for it in bound} - {None} for sep in (self._sep, SEPARATOR))
            known = all(_queue(it, self._sep) or _queue(it, SEPARATOR) for it in bound)
            known = known and bool(ours or not bound) and names & before <= ours
            others = self._other_lists(names, names | ours | before) if known else []
        except RedisError as error:
            raise Transient(f"the broker at {self._url} cannot be read: {error}") from error
        if not known or others:
            raise NeedsOperator(
                "the queues of this broker are named with another separator than we know of, so that nothing can be "
                "called lost: set celery.sep to the sep of the application's broker_transport_options; if it has none "
                "any more, or had none before, remove what is left of "
                + (f"that: the list {others[0]!r}" if others else "it from the sets _kombu.binding.*")
            )

    def close(self) -> None:
        self._client.close()

    def _exchanges(self) -> Iterator[str]:
        stem = f"{self._prefix}_kombu.binding."
        return (key.decode().removeprefix(stem) for key in self._client.scan_iter(f"{stem}*", count=_CHUNK))

    def _members(self, exchange: str) -> Iterator[str]:
        members: Any = self._client.smembers(f"{self._prefix}_kombu.binding.{exchange}")
        return (member.decode() for member in members)

    def _bound(self, exchange: str) -> set[str]:
        seps = {True: SEPARATOR, False: self._sep}
        return {member.rsplit(seps[SEPARATOR in member], 1)[-1] for member in self._members(exchange)}

    def _other_lists(self, queues: Collection[str], known: Collection[str | None]) -> list[str]:
        """Lists that look like those of one of ``queues`` for a priority, by another separator than ours.

        :param known: names that are those of queues.
        """
        keys = self._client.scan_iter(f"{self._prefix}*[1-9]", count=_CHUNK, _type="list")
        names = {key.decode().removeprefix(self._prefix) for key in keys}.difference(known)
        found = ((name, name.removeprefix(queue)[:-1]) for name in names for queue in queues if name.startswith(queue))
        # What stands between the name and the priority; names that have a word more are those of other queues.
        return sorted(name for name, sep in found if sep not in ("", self._sep) and not re.search(r"\w", sep))

    def _lists(self, queue: str) -> list[str]:
        """The keys of one queue's lists."""
        names = (queue, *(f"{queue}{self._sep}{priority}" for priority in range(1, 10)))
        return [f"{self._prefix}{name}" for name in names]

    def _lying(self, queues: Iterable[str]) -> Iterator[Delivery]:
        for queue in sorted(queues):
            for name in self._lists(queue):
                yield from (Delivery(name, queue, raw, _message(raw)) for raw in self._all(name))

    def _abandonable(self) -> Iterator[Delivery]:
        for tag, raw in self._client.hscan_iter(self._unacked_key, count=_CHUNK):
            yield Delivery(self._unacked_key, None, raw, _message(raw, unacked=True), tag.decode())

    def _queued(self, queue: str) -> Iterator[str]:
        for name in self._lists(queue):
            yield from (found for raw in self._all(name) if (found := _message_id(_message(raw))))

    def _all(self, name: str) -> Iterator[bytes]:
        start = 0
        # From the newest on: those that arrive meanwhile move the rest down; some are read twice, none is missed.
        while chunk := self._chunk(name, start):
            yield from chunk
            start += len(chunk)

    def _chunk(self, name: str, start: int) -> list[bytes]:
        chunk: Any = self._client.lrange(name, start, start + _CHUNK - 1)
        return list(chunk)

    def _taken(self) -> Iterator[tuple[str, float]]:
        for tag, at in self._client.zscan_iter(self._index_key, count=_CHUNK):
            yield tag.decode(), at

    def _unacked(self) -> Iterator[tuple[str, str]]:
        for tag, raw in self._client.hscan_iter(self._unacked_key, count=_CHUNK):
            if found := _message_id(_message(raw, unacked=True)):
                yield found, tag.decode()


def _queue(binding: str, sep: str) -> str | None:
    """The queue of a binding, if its parts are joined by ``sep``: routing key, pattern and queue. Only a topic exchange
    has patterns. kombu cannot read a binding of which a part has its separator."""
    if sep != SEPARATOR and SEPARATOR in binding:
        return None
    parts = binding.split(sep)
    fits = len(parts) == len(("routing key", "pattern", "queue")) and re.fullmatch(r"|\^.*\$", parts[1])
    return parts[-1] if fits else None


def _message(raw: bytes, *, unacked: bool = False) -> dict[str, Any]:
    """A message as kombu writes it. Empty, if something else was put in its place."""
    try:
        found = json.loads(raw)
        message, headers = (found[0], found[0]["headers"]) if unacked else (found, found["headers"])
    except (ValueError, TypeError, LookupError):
        return {}
    fits = isinstance(message.get("properties"), dict) and isinstance(headers, dict | None) and "body" in message
    return message if fits else {}


def _message_id(message: dict[str, Any]) -> str | None:
    found: str | None = (message.get("headers") or {}).get(MESSAGE_ID)
    return found
