"""What one call publishes: collected, written down at once, and then pushed.

Celery publishes message by message. What belongs together is held back here until it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from patchpilot.backend.message import Message
from patchpilot.postgres.connection import Connection
from patchpilot.postgres.queries import queries

AT_ONCE, BYTES_AT_ONCE = 5000, 64 << 20
"""How many messages of one header, and bytes of them, are held in memory and written down at once. Longer headers take
several turns: PostgreSQL takes no statement of more than a gigabyte."""

Work = Callable[[Connection], object]


class Opening(Protocol):
    """A chord that is about to be published: :class:`patchpilot.backend.chords.Opening`."""

    @property
    def group_id(self) -> str: ...

    def count_in_postgres(self) -> None:
        """Have its parts counted in PostgreSQL, whatever is configured."""

    def values(self) -> dict[str, Any]:
        """Its record, and its members."""


@dataclass
class Dispatch:
    """What one call publishes. It is written down in one transaction, and then pushed."""

    openings: list[Opening] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    """Group ids of the chords that are on record already."""
    at_once: float = 1
    """How many messages are held before they are sent."""
    size: int = 0
    """Of the bodies that are held, in bytes."""

    def hold(self, message: Message) -> bool:
        """Hold a message back. Whether no more should be held with it."""
        self.messages.append(message)
        self.size += len(message.payload)
        return len(self.messages) >= self.at_once or (self.at_once < math.inf and self.size >= BYTES_AT_ONCE)

    def take(self) -> list[Message]:
        """The messages that are held; from here on none is."""
        taken, self.messages, self.size = self.messages, [], 0
        return taken


def write_down(connection: Connection, openings: Sequence[Opening], publish_error: str | None = None) -> None:
    """Write chords and their members down, but for those that are on record already."""
    rows = [{**opening.values(), "publish_error": publish_error} for opening in openings]
    if rows:
        connection.execute(queries("chords")["open"], {name: [row[name] for row in rows] for name in rows[0]})


current: ContextVar[Dispatch | None] = ContextVar("patchpilot_current", default=None)
announced: ContextVar[Dispatch | None] = ContextVar("patchpilot_announced", default=None)
_callback_of: ContextVar[str | None] = ContextVar("patchpilot_callback_of", default=None)


@contextmanager
def callback_of(group_id: str) -> Iterator[None]:
    """Messages sent inside are the callback of chord ``group_id``: their start is fenced."""
    token = _callback_of.set(group_id)
    try:
        yield
    finally:
        _callback_of.reset(token)


def chord_called_back() -> str | None:
    """The chord whose callback is sent here and now."""
    return _callback_of.get()


def merged(dispatches: Mapping[str, Dispatch], ours: Collection[str]) -> Dispatch:
    """Those of the dispatches that are ours, as one."""
    parts = [dispatch for name, dispatch in dispatches.items() if name in ours]
    return Dispatch(
        openings=[opening for part in parts for opening in part.openings],
        messages=[message for part in parts for message in part.messages],
    )
