"""Following a rotation: which failovers there were, from events and from the roles of the nodes. Pure.

A service update emits no event of its own, and AWS bounds neither how late an event appears nor how stale an answer is.
So a failover counts as soon as either source shows it, and once when both do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from patchpilot.elasticache.facts import Event
from patchpilot.phases.notes import moment, noted

# AWS writes both, with and without the old primary, and an event of the group repeats the node's.
_FAILOVER = re.compile(
    r"Failover (?:from (?:primary|master) node (?P<old>\S+) )?to replica node (?P<new>\S+) completed", re.IGNORECASE
)

SAME = timedelta(minutes=2)
"""Reports of a failover to the same node within this time are one failover; a node that has just been demoted cannot
have been synchronised and promoted again in less."""

SKEW = timedelta(minutes=1)
"""How far AWS's clock and ours may be apart."""


@dataclass(frozen=True)
class Failover:
    """One failover."""

    at: datetime
    to: str
    old: str = ""
    told_by: str = "events"
    """``events``, or ``roles`` if AWS has told of no event: the time is when the new role was first seen then."""


@dataclass(frozen=True)
class Rotation:
    """What is known of the failovers so far."""

    failovers: tuple[Failover, ...] = ()
    primary: str | None = None
    """The last known one."""
    primary_since: datetime | None = None
    """When it was first seen."""
    previous: str | None = None
    """The one before."""

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> Rotation:
        """Read what :meth:`note` wrote."""
        return cls(
            failovers=tuple(Failover(**{**each, "at": moment(each["at"])}) for each in note["failovers"]),
            primary=note["primary"],
            primary_since=moment(note["primary_since"]) if note["primary_since"] else None,
            previous=note["previous"],
        )

    def note(self) -> dict[str, Any]:
        """As the journal stores it."""
        note: dict[str, Any] = noted(self)
        return note

    @property
    def last(self) -> Failover | None:
        """The latest failover."""
        return max(self.failovers, key=lambda failover: failover.at, default=None)

    def follow(self, primary: str | None, events: Iterable[Event], now: datetime) -> Rotation:
        """Take a further look into account.

        :param primary: who is the primary, as AWS says now; None if it does not say.
        :param events: all events since the baseline. Those seen before may be among them, or missing.
        """
        known = self.failovers
        for told in filter(None, map(failover, sorted(events))):
            known = _add(known, told)
        if primary is None or primary == self.primary or self._is_stale(primary, now):
            return replace(self, failovers=known)
        changed_after = self.primary_since - SKEW if self.primary_since else None
        told_of = any(each.to == primary and (not changed_after or each.at >= changed_after) for each in known)
        if not told_of and self.primary is not None:
            known = _add(known, Failover(now, primary, self.primary, "roles"))
        return Rotation(known, primary, now, self.primary)

    def _is_stale(self, primary: str, now: datetime) -> bool:
        """Whether this is an old answer: AWS's are eventually consistent, and one may be older than the one before."""
        return primary == self.previous and self.primary_since is not None and now < self.primary_since + SAME


def failover(event: Event) -> Failover | None:
    """The failover that ``event`` tells of, if it does."""
    found = _FAILOVER.search(event.message)
    return Failover(event.at, found["new"], found["old"] or "") if found else None


def _add(known: tuple[Failover, ...], told: Failover) -> tuple[Failover, ...]:
    """``known`` and ``told``, which may be one of them: told again, or told of after its effect was seen."""
    for number, each in enumerate(known):
        # An event may appear long after the roles showed what happened, but its own date is not later.
        late = each.told_by == "roles" and told.told_by == "events" and told.at <= each.at + SAME
        if each.to == told.to and (abs(each.at - told.at) <= SAME or late):
            return (*known[:number], _better(each, told), *known[number + 1 :])
    return tuple(sorted((*known, told), key=lambda failover: failover.at))


def _better(one: Failover, other: Failover) -> Failover:
    """Of two reports of one failover: events before roles, then the later time, for the grace begins with it."""
    if one.told_by != other.told_by:
        chosen, rest = (one, other) if one.told_by == "events" else (other, one)
    else:
        chosen, rest = (one, other) if one.at >= other.at else (other, one)
    return replace(chosen, old=chosen.old or rest.old)
