"""Following a rotation: which failovers there were, from events, from AWS's roles and from the nodes themselves. Pure.

A service update emits no event of its own, and AWS bounds neither how late an event appears nor how stale an answer is.
So a failover counts as soon as any source shows it, and once when several do. The nodes' own word is never late; where
they give it, AWS's roles are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from patchpilot.elasticache.facts import Event
from patchpilot.phases.notes import moment, noted
from patchpilot.valkey.nodes import Report

# AWS writes both, with and without the old primary, and an event of the group repeats the node's.
_FAILOVER = re.compile(
    r"Failover (?:from (?:primary|master) node (?P<old>\S+) )?to replica node (?P<new>\S+) completed", re.IGNORECASE
)
_SIGNATURE = re.compile(
    r"Recovering cache nodes|Started recovery|Finished recovery|Failover (?:from|to) |Test Failover API called"
    r"|Cache node \S+ (?:shutdown|restarted)|Cache cluster patched",
    re.IGNORECASE,
)

SAME = timedelta(minutes=2)
"""Reports of a failover to the same node within this time are one failover; a node that has just been demoted cannot
have been synchronised and promoted again in less."""

SKEW = timedelta(minutes=1)
"""How far AWS's clock and ours are usually apart, at most."""

NO_TIME = timedelta()

ASTRAY = timedelta(minutes=5)
"""How far they can be: AWS refuses requests that are signed by a clock further off."""


@dataclass(frozen=True)
class Failover:
    """One failover."""

    at: datetime
    to: str
    old: str = ""
    told_by: str = "events"
    """``events``; or ``roles`` if AWS has told of no event: the time is when the new role was first seen then, by the
    nodes' own word or in AWS's description of the group."""
    dated: datetime | None = None
    """The date of the event, if that is not right by our clock."""
    after: datetime | None = None
    """When the nodes last said that the old primary was the primary, if that is known."""


@dataclass(frozen=True)
class Said:
    """The node that calls itself the primary, and the id of its replication history."""

    node: str
    replid: str = ""


def said_by(reports: Mapping[str, Report | str]) -> Said | None:
    """Who is the primary by the nodes' own word; None if none of them says so, or several do."""
    primaries = [
        Said(node, said.replid) for node, said in reports.items() if isinstance(said, Report) and said.role == "primary"
    ]
    return primaries[0] if len(primaries) == 1 else None


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
    aws: str | None = None
    """Who it is as AWS last said, which may lag behind; None while AWS has said nothing but ``primary``."""
    replid: str = ""
    """The replication history of the primary, by its own word."""
    heard: bool = False
    """Whether the nodes have said who it is: what AWS shows may be older than the rotation."""
    began: datetime | None = None
    """When the rotation began: what happened before is no part of it, however late it is told or shown."""
    still: datetime | None = field(default=None, compare=False)
    """When the nodes last said that ``primary`` is the primary. Not on record: it would change with every look."""
    shown: datetime | None = field(default=None, compare=False)
    """When AWS last showed it. Likewise."""

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> Rotation:
        """Read what :meth:`note` wrote."""
        return cls(
            failovers=tuple(_failover(each) for each in note["failovers"]),
            primary=note["primary"],
            primary_since=moment(note["primary_since"]) if note["primary_since"] else None,
            previous=note["previous"],
            aws=note.get("aws"),
            replid=note.get("replid", ""),
            heard=note.get("heard", False),
            began=moment(note["began"]) if note.get("began") else None,
        )

    @classmethod
    def begin(cls, primary: str | None, since: datetime, *, aws: str | None = None, heard: bool = False) -> Rotation:
        """Nothing has happened yet.

        :param primary: who is the primary.
        :param aws: who it is as AWS says, which may lag behind.
        :param heard: whether ``primary`` is by the nodes' own word.
        """
        return cls(primary=primary, primary_since=since, aws=aws, heard=heard, began=since)

    def note(self) -> dict[str, Any]:
        """As the journal stores it."""
        note: dict[str, Any] = noted(self)
        del note["still"], note["shown"]
        return note

    @property
    def last(self) -> Failover | None:
        """The latest failover."""
        return max(self.failovers, key=lambda failover: failover.at, default=None)

    def follow(
        self, primary: str | None, events: Iterable[Event], now: datetime, said: Said | None = None,
        behind: timedelta = NO_TIME,
    ) -> Rotation:  # fmt: skip
        """Take a further look into account.

        :param primary: who is the primary, as AWS says now; None if it does not say.
        :param events: all events since the baseline. Those seen before may be among them, or missing.
        :param said: who is the primary, by the nodes' own word.
        :param behind: how far AWS's clock, which dates the events, is behind ours; below zero if it is ahead.
        """
        known, before = self.failovers, set()
        for told in filter(None, map(failover, sorted(events))):
            if self.began is None or told.at + behind >= self.began:
                known = _add(known, self._possible(told, now, behind))
            else:
                before.add(told.to)
        if said is not None:
            seen = replace(self, failovers=known, aws=primary or self.aws)
            if not self.heard and not known and said.node in before:
                seen = replace(seen, primary=said.node)
            return replace(seen._hear(said, now), heard=True)
        if primary is None or primary == (self.aws or self.primary) or self._is_stale(primary, now):
            return replace(self, failovers=known, shown=now if primary == self.primary else self.shown)
        heard = replace(self, failovers=known, aws=primary)
        if primary in before and not known:  # AWS shows only now what was so before the rotation
            return heard if self.heard else replace(heard, primary=primary)
        return heard if primary == self.primary else heard._moved(primary, now)

    def _hear(self, said: Said, now: datetime) -> Rotation:
        if said.node != self.primary:
            return replace(self._moved(said.node, now), replid=said.replid, still=now)
        known = self.failovers
        if self.replid and said.replid and said.replid != self.replid:
            # The same node with another history: it was restarted, and its replicas and clients begin anew.
            known = _add(known, Failover(now, said.node, said.node, "roles"))
        return replace(self, failovers=known, replid=said.replid or self.replid, still=now)

    def _moved(self, primary: str, now: datetime) -> Rotation:
        """There is another primary; a failover, unless an event has told of it already."""
        changed_after = self.primary_since - SKEW if self.primary_since else None
        told_of = any(each.to == primary and (not changed_after or each.at >= changed_after) for each in self.failovers)
        known = self.failovers
        if not told_of and self.primary is not None:
            known = _add(known, Failover(now, primary, self.primary, "roles", after=self.still))
        elif self.shown is not None:
            known = tuple(_redated(each, self.shown, now) if each.to == primary else each for each in known)
        return replace(self, failovers=known, primary=primary, primary_since=now, previous=self.primary, replid="")

    def _is_stale(self, primary: str, now: datetime) -> bool:
        """Whether this is an old answer: AWS's are eventually consistent, and one may be older than the one before."""
        return primary == self.previous and self.primary_since is not None and now < self.primary_since + SAME

    def _possible(self, told: Failover, now: datetime, behind: timedelta) -> Failover:
        """``told``, dated by our clock: AWS's may be behind, and a grace that counted from its date would be too short.

        It counts from now if the nodes said later than its date that it had not happened yet. Once it is known it keeps
        its date: how far the clocks are apart is measured a little differently each time.
        """
        ours = replace(told, at=min(told.at + behind, now), dated=told.at) if behind else told
        for each in self.failovers:
            if _same(each, ours):
                return replace(each, old=each.old or told.old) if _date(each) >= told.at and _by_event(each) else ours
        last = self.last
        if last and not _by_event(last) and last.to == told.to and abs(last.at - ours.at) <= ASTRAY:
            return replace(last, told_by="events", dated=told.at, old=told.old or last.old)
        earlier = self.previous is not None and self.primary_since is not None and told.at < self.primary_since
        if not earlier and told.to != self.primary and self.still and told.at < self.still <= told.at + ASTRAY:
            return replace(told, at=now, dated=told.at)
        return ours


def failover(event: Event) -> Failover | None:
    """The failover that ``event`` tells of, if it does."""
    found = _FAILOVER.search(event.message)
    return Failover(event.at, found["new"], found["old"] or "") if found else None


def is_sign(event: Event) -> bool:
    """Whether ``event`` is one of those that a rotation leaves, whatever began it."""
    return _SIGNATURE.search(event.message) is not None


def _failover(note: Mapping[str, Any]) -> Failover:
    dates = {name: moment(note[name]) for name in ("at", "dated", "after") if note.get(name)}
    return Failover(**{**note, **dates})


def _add(known: tuple[Failover, ...], told: Failover) -> tuple[Failover, ...]:
    """``known`` and ``told``, which may be one of them: told again, or told of after its effect was seen."""
    for number, each in enumerate(known):
        if _same(each, told):
            return (*known[:number], _better(each, told), *known[number + 1 :])
    return tuple(sorted((*known, told), key=lambda failover: failover.at))


def _same(known: Failover, told: Failover) -> bool:
    """Whether both are reports of one failover."""
    if _by_event(known) and _by_event(told):
        return known.to == told.to and abs(_date(known) - _date(told)) <= SAME
    # An event may appear long after the roles showed what happened, but its own date is not later.
    late = _by_event(told) and told.at <= known.at + SAME
    return known.to == told.to and (abs(known.at - told.at) <= SAME or late)


def _by_event(failover: Failover) -> bool:
    return failover.told_by == "events"


def _redated(known: Failover, shown: datetime, now: datetime) -> Failover:
    """``known``, counted from now if AWS showed the old primary well after its date: that may be of another clock."""
    wrong = _by_event(known) and known.at + SKEW < shown <= known.at + ASTRAY
    return replace(known, at=now, dated=_date(known)) if wrong else known


def _date(failover: Failover) -> datetime:
    return failover.dated or failover.at


def _better(one: Failover, other: Failover) -> Failover:
    """Of two reports of one failover: events before roles, then the later time, for the grace begins with it.

    The date of an event may be wrong, by whatever clock: if the nodes said later that it had not happened yet; and if
    nobody could ask them, it may be where the roles showed it well after that.
    """
    if one.told_by != other.told_by:
        chosen, rest = (one, other) if one.told_by == "events" else (other, one)
        impossible_until = rest.after or rest.at - SKEW
        if chosen.at < impossible_until <= chosen.at + ASTRAY:
            return replace(rest, told_by="events", dated=_date(chosen), old=chosen.old or rest.old)
    else:
        chosen, rest = (one, other) if one.at >= other.at else (other, one)
    return replace(chosen, old=chosen.old or rest.old)
