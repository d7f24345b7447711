"""One look at a group: everything that the phases from the trigger to the grace judge by, read at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from patchpilot.elasticache.facts import AVAILABLE, Event, Group, Node, UpdateAction
from patchpilot.errors import PatchpilotError
from patchpilot.phases.desk import Desk
from patchpilot.phases.rotation import ASTRAY, Said, said_by
from patchpilot.valkey.nodes import Report

SECOND = timedelta(seconds=1)
"""AWS's clock is known to the second."""


@dataclass(frozen=True)
class Sight:
    """What there was to see. What nobody asked for is empty."""

    now: datetime
    group: Group
    actions: tuple[UpdateAction, ...] = ()
    nodes: tuple[Node, ...] = ()
    events: tuple[Event, ...] = ()
    reports: dict[str, Report | str] = field(default_factory=dict)
    """What each node says of itself; a string says why it says nothing."""

    @property
    def said(self) -> Said | None:
        """Who is the primary by the nodes' own word."""
        return said_by(self.reports)

    @property
    def behind(self) -> timedelta:
        """How far AWS's clock is behind ours, at least, and below zero how far it is ahead: it answered after we had
        asked, and before we heard. Less than a second is none."""
        answered, heard = self.group.answered, self.group.heard
        if answered is None:
            return timedelta()
        if heard is not None and answered > heard + SECOND:
            return heard - answered
        return max(self.now - answered - SECOND, timedelta())

    @property
    def primary(self) -> str | None:
        """Who is the primary: by the nodes' own word, or as AWS shows it where they give none."""
        return self.said.node if self.said else self.group.primary

    @property
    def calm(self) -> bool:
        """Whether the group and every node that was asked for are available."""
        return self.group.available and all(node.status == AVAILABLE for node in self.nodes)

    def action(self, update: str) -> UpdateAction | None:
        """The action of ``update``, or None while AWS does not list it: unknown then, neither done nor undone."""
        return next((action for action in self.actions if action.update == update), None)


def look_around(
    desk: Desk, now: datetime, *, since: datetime | None = None, actions: bool = True, nodes: bool = False,
    reports: bool = False,
) -> Sight:  # fmt: skip
    """Read what is asked for.

    :param since: read all events since some time before then: windows that overlap as far as can be.
    :raises Transient: AWS could not be asked. Nodes that do not answer are part of what there is to see.
    """
    shown = desk.cloud.update_actions(desk.group) if actions else ()
    group = desk.cloud.group(desk.group)
    return Sight(
        now=now,
        group=group,
        actions=shown,
        nodes=desk.cloud.nodes(group) if nodes else (),
        events=events(desk, group, since, now) if since else (),
        reports=ask(desk, group) if reports else {},
    )


def events(desk: Desk, group: Group, since: datetime, now: datetime) -> tuple[Event, ...]:
    """All events of the group and its nodes since some time before ``since``, up to now by whichever clock is ahead."""
    sources = {desk.group, *(member.node for member in group.members)}
    return desk.cloud.events(sources, since - ASTRAY, max(now, group.answered or now))


def ask(desk: Desk, group: Group) -> dict[str, Report | str]:
    """What each member says of itself. In a rotation one may refuse us, too: that is no reason to stop."""
    if desk.nodes is None:
        return {}
    answers: dict[str, Report | str] = {}
    for member in group.members:
        if not member.host:
            continue
        try:
            answers[member.node] = desk.nodes.member(member.host, member.port)
        except PatchpilotError as error:
            answers[member.node] = str(error)
    return answers
