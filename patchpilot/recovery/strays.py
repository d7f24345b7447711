"""Keys that chords have left behind in Valkey: whose they are, which may go, and removing those.

Of a chord that PostgreSQL says is over, they go. Of one that is open, never. Those of a chord that is on no record are
strays: left by a group within a header, by a worker that died, or in use by a chord that was sent without patchpilot.
Valkey does not tell these apart, but for how long nobody has touched them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.valkey.keys import ChordKeys, Keys

SQL = queries("strays")

BATCH = 500
"""How many chords that are over are looked after in one pass."""

SETTLED = timedelta(minutes=1)
"""A chord that begins anew under its old id touches its keys. What was touched later than this is left alone."""


@dataclass(frozen=True)
class Stray:
    """What one chord that is on no record has in Valkey."""

    server: str
    keys: Keys
    goes: bool
    """Whether it has been left alone for long enough to be removed."""


@dataclass
class Strays:
    """What was found, and how many of the keys were removed."""

    found: list[Stray] = field(default_factory=list)
    removed: int = 0

    @property
    def keys(self) -> int:
        return sum(len(stray.keys.suffixes) for stray in self.found)


def decide(keys: Keys, on_record: Collection[str], idle: timedelta | None) -> bool | None:
    """Whether these keys may go. None if they are no strays: PostgreSQL knows the chord.

    :param idle: how long nobody may have touched any of them. None: nothing may go.
    """
    if keys.group_id in on_record:
        return None
    return idle is not None and keys.idle is not None and keys.idle >= idle


def strays(database: Database, servers: Sequence[ChordKeys], idle: timedelta | None, *, remove: bool) -> Strays:
    """Look for strays on some servers, page by page, and remove those that may go.

    :param idle: see :func:`decide`.
    :raises Transient: PostgreSQL or a server cannot be reached. What was removed stays removed.
    """
    result = Strays()
    for server in servers:
        seen: set[str] = set()
        for page in server.pages():
            fresh = [keys for keys in page if keys.group_id not in seen]
            seen.update(keys.group_id for keys in fresh)
            for stray in _of_page(database, server, fresh, idle):
                result.found.append(stray)
                if remove and stray.goes and idle is not None:
                    result.removed += max(0, server.remove(stray.keys.group_id, idle))
    return result


def _of_page(database: Database, server: ChordKeys, page: Sequence[Keys], idle: timedelta | None) -> Iterator[Stray]:
    # Asked after the keys were read: who sends a chord writes it down before it has keys.
    asked = {"group_ids": [keys.group_id for keys in page]}
    on_record = {row["group_id"] for row in database.fetch(SQL["on_record"], asked)} if page else set()
    for keys in page:
        goes = decide(keys, on_record, idle)
        if goes is not None:
            yield Stray(server.address, keys, goes)


def sweep_up(
    database: Database, servers: Sequence[ChordKeys], brokers: Collection[str], min_age: timedelta,
    settled: timedelta = SETTLED,
) -> int:  # fmt: skip
    """Remove the keys of chords that have been over for ``min_age``; a batch of those that may have some.

    :param brokers: the names of the broker whose chords count on these servers.
    :param settled: for how long nobody may have touched them.
    :returns: how many keys went.
    :raises Transient: PostgreSQL or a server cannot be reached. What is left is found again.
    """
    asked: Mapping[str, object] = {"min_age": max(min_age, settled), "batch": BATCH, "brokers": sorted(brokers)}
    over = [row["group_id"] for row in database.fetch(SQL["unswept"], dict(asked))]
    removed, left = 0, set()
    for server in servers:
        for keys in server.of(over) if over else ():
            # What the parts of a failed chord returned is left for people, as Celery leaves it, until it expires.
            keep = (".j",) if keys.expires is not None else ()
            gone = server.remove(keys.group_id, settled, keep)
            removed += max(0, gone)
            if gone < 0:
                left.add(keys.group_id)
    if done := [group_id for group_id in over if group_id not in left]:
        database.execute(SQL["swept"], {"group_ids": done})
    return removed
