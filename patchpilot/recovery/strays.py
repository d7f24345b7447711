"""Keys that chords have left behind in Valkey: whose they are, which may go, and removing those.

Of a chord that PostgreSQL says is over, they go. Of one that is open, never. Those of a chord that is on no record are
strays, if no message in the broker tells of it: left by a group within a header, by a worker that died, or in use by
the tasks of a chord that was sent without patchpilot. Valkey does not tell these apart, but for how long nobody has
touched them. The key of a group by itself is none: so a group is saved for its users, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from patchpilot.errors import NeedsOperator
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.recovery.mentions import literal
from patchpilot.valkey.keys import ChordKeys, Keys

SQL = queries("strays")

BATCH = 500
"""How many chords that are over are looked after in one pass."""

SAVED = ""
"""The suffix of a group's own key. Users save groups under it, and it goes by itself."""

SETTLED = timedelta(minutes=1)
"""A chord that begins anew under its old id touches its keys. What was touched later than this is left alone."""


@dataclass(frozen=True)
class Stray:
    """What one chord that is on no record has in Valkey."""

    server: str
    keys: Keys
    goes: bool
    """Whether it has been left alone for long enough to be removed."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the keys that go."""
        return tuple(suffix for suffix in self.keys.suffixes if suffix != SAVED)


@dataclass
class Strays:
    """What was found, and how many of the keys were removed."""

    found: list[Stray] = field(default_factory=list)
    removed: int = 0
    kept: str | None = None
    """Why all of them stay: the messages in the broker cannot be read."""

    @property
    def keys(self) -> int:
        return sum(len(stray.suffixes) for stray in self.found)


def decide(keys: Keys, on_record: Collection[str], idle: timedelta | None) -> bool | None:
    """Whether these keys may go. None if they are no strays: PostgreSQL knows the chord, or a group was saved.

    :param idle: how long nobody may have touched any of them. None: nothing may go.
    """
    if keys.group_id in on_record or keys.suffixes == (SAVED,):
        return None
    old = idle is not None and keys.idle is not None and keys.idle >= idle
    return old and literal(keys.group_id)  # of another id no message can be said not to tell


def strays(
    database: Database, servers: Sequence[ChordKeys], waiting: Callable[[Collection[str]], set[str]],
    idle: timedelta | None, *, remove: bool,
) -> Strays:  # fmt: skip
    """Look for strays on some servers, and remove those that may go.

    :param waiting: which of these chords messages in the broker tell of.
    :param idle: see :func:`decide`.
    :raises Transient: PostgreSQL or a server cannot be reached. What was removed stays removed.
    """
    found = [(server, stray) for server in servers for stray in _on(database, server, idle)]
    try:
        # Looked for after the keys were read: a task that is sent on from then on belongs to one that ran until then.
        asked = {stray.keys.group_id for _, stray in found if literal(stray.keys.group_id)}
        live = waiting(asked) if asked else set()
    except NeedsOperator as error:
        return Strays([replace(stray, goes=False) for _, stray in found], kept=str(error))
    found = [(server, stray) for server, stray in found if stray.keys.group_id not in live]
    result = Strays([stray for _, stray in found])
    for server, stray in found:
        if remove and stray.goes and idle is not None:
            result.removed += max(0, server.remove(stray.keys.group_id, idle, (SAVED,)))
    return result


def _on(database: Database, server: ChordKeys, idle: timedelta | None) -> Iterator[Stray]:
    seen: set[str] = set()
    for page in server.pages():
        fresh = [keys for keys in page if keys.group_id not in seen]
        seen.update(keys.group_id for keys in fresh)
        yield from _of_page(database, server, fresh, idle)


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
