"""Who listens for remote control where we do not ask: under another control exchange, or another fanout prefix.

Workers subscribe by pattern, and the server lists no patterns. But each leaves its queue's binding, under the name of
the exchange, and the server says of whatever is published how many it reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from celery import Celery
from kombu.connection import Connection
from kombu.utils.json import dumps
from redis.exceptions import NoPermissionError

_NOBODY: dict[str, Any] = {
    "method": "ping",
    "arguments": {},
    "destination": ["nobody@patchpilot"],
    "matcher": None,
    "pattern": None,
}
"""A question that every worker takes for another's."""


def unreached(app: Celery, connection: Connection) -> frozenset[str]:
    """The topics of ``app``'s broker, other than where it asks itself, on which somebody listens for remote control.

    :raises RedisError: the broker cannot be read.
    """
    channel: Any = connection.default_channel
    client, database = channel.client, channel._connparams()["db"]
    own = f"{app.conf.control_exchange}.pidbox"
    asked = channel._get_publish_topic(own, "")
    exchanges = {own, *_bound(channel, client)}
    topics = {(start, exchange) for exchange in exchanges for start in (f"/{database}.", "", channel.keyprefix_fanout)}
    found = set()
    for start, exchange in sorted(topics):
        topic = f"{start}{exchange}"
        with suppress(NoPermissionError):  # then its users may not listen there either
            if topic != asked and client.publish(topic, dumps(_message(channel, exchange))):
                found.add(topic)
    return frozenset(found)


def _bound(channel: Any, client: Any) -> Iterator[str]:
    """The exchanges that workers of this database were asked over, now or once."""
    stem = f"{channel.global_keyprefix}_kombu.binding."
    # It is none of the commands that kombu puts its prefix before.
    for key in client.scan_iter(f"{_literally(stem)}*.pidbox", count=1000):
        name = (key.decode() if isinstance(key, bytes) else key).removeprefix(stem)
        if not name.startswith("reply."):
            yield name


def _message(channel: Any, exchange: str) -> dict[str, Any]:
    message: dict[str, Any] = channel.prepare_message(
        dumps(_NOBODY), content_type="application/json", content_encoding="utf-8", headers={}, properties={}
    )
    channel._inplace_augment_message(message, exchange, "")
    return message


def _literally(text: str) -> str:
    return "".join(f"\\{each}" if each in "*?[]\\^" else each for each in text)
