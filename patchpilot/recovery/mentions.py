"""Which chords the messages of a broker tell of: the parts that they bring, and all that follows those.

They are looked for by their ids, which every serialiser of kombu's writes as they are. So it does not matter where in a
canvas they stand, nor whether we may decode it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from kombu.exceptions import KombuError

from patchpilot.errors import NeedsOperator
from patchpilot.recovery.stock import body_of
from patchpilot.valkey.broker import Delivery

READABLE = frozenset(
    {"application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack", "text/plain"}
)
"""Content types in which an id stands as it is."""

_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PLAIN = re.compile(r"[\w.:@-]+", re.ASCII)


def literal(group_id: str) -> bool:
    """Whether every serialiser writes this id as it is."""
    return _PLAIN.fullmatch(group_id) is not None


def mentioned(deliveries: Iterable[Delivery], group_ids: Collection[str]) -> set[str]:
    """Those of the chords that a message tells of.

    :param group_ids: of which all are :func:`literal`.
    :raises NeedsOperator: a message cannot be read: it may tell of any chord.
    """
    wanted = {group_id.encode(): group_id for group_id in group_ids}
    others = [each for each in wanted if not _UUID.fullmatch(each)]
    found: set[str] = set()
    for delivery in deliveries:
        for text in (delivery.raw, _body(delivery)):
            here = {*_UUID.findall(text), *(each for each in others if each in text)}
            found |= {wanted[each] for each in here & wanted.keys()}
    return found


def _body(delivery: Delivery) -> bytes:
    where = f"queue {delivery.queue!r}" if delivery.queue else "the unacknowledged messages"
    content_type = delivery.message.get("content-type")
    try:
        if content_type in READABLE:
            return body_of(delivery.message)
    except (KombuError, ValueError, TypeError):
        content_type = "a body that is garbled"
    raise NeedsOperator(
        f"a message in {where} cannot be read ({content_type or 'no message of kombu'}), so it may be of any chord"
    )
