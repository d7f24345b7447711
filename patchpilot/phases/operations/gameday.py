"""A test failover: ``TestFailover``, to rehearse on the real group what a rotation does to it."""

from __future__ import annotations

from datetime import UTC, datetime

from patchpilot.elasticache.facts import Application, Event
from patchpilot.engine.plan import Data
from patchpilot.errors import NeedsOperator
from patchpilot.phases.choice import Choice, Offer
from patchpilot.phases.notes import moment
from patchpilot.phases.operations.base import Operation, Sign, Standing, node_rows
from patchpilot.phases.order import Kind
from patchpilot.phases.rotation import failover, is_sign
from patchpilot.phases.sight import Sight


class GameDay(Operation):
    """One failover, and nothing else. It is over when another node is the primary and all are available."""

    kind = Kind.TEST_FAILOVER
    begins = "fail over, unless that happens already"
    by_events = True
    settles = 5  # a second one would be a second failover; and nothing is urgent

    def choose(self, offer: Offer, now: datetime) -> Choice:
        group = offer.group
        if len(group.node_group_ids) != 1:
            raise NeedsOperator(f"a test failover needs exactly one shard, {group.id} has {len(group.node_group_ids)}")
        return Choice(operation=self.kind, aim={"node_group": group.node_group_ids[0]})

    def baseline(self, aim: Data, sight: Sight) -> Data:
        return {"events": known_signs(sight), "drawn": sight.now.isoformat()}

    def standing(self, baseline: Data, sight: Sight, *, tried: bool) -> Standing:
        signs = new_signs(baseline, sight)
        sign, why = self._sign(baseline, signs, sight, tried=tried)
        return Standing(
            sign, sight.group.status, why, rows=node_rows(sight.nodes, set()), began=signs[0].at if signs else None
        )

    @staticmethod
    def _sign(baseline: Data, signs: list[Event], sight: Sight, *, tried: bool) -> tuple[Sign, str]:
        told = [each for each in map(failover, signs) if each]
        now = sight.primary
        # It may have failed over once more since, and back to where it was.
        if baseline.get("failed_over") or has_moved(baseline, sight) or (told and told[-1].to == now):
            why = f"failed over, and the primary is {now}; the group is {sight.group.status}"
            return (Sign.OVER if sight.calm else Sign.RUNNING), why
        if signs or (tried and not sight.calm):
            return Sign.RUNNING, f"no failover yet; the group is {sight.group.status}"
        if not sight.calm:
            return Sign.BUSY, f"something else is under way: the group is {sight.group.status}"
        return Sign.READY, ""

    def start(self, baseline: Data) -> Application:
        return self.desk.cloud.test_failover(self.desk.group, baseline["aim"]["node_group"])


def known_signs(sight: Sight) -> list[str]:
    """The signs of rotations that were there before: they tell of nothing new."""
    return sorted(_key(event) for event in sight.events if is_sign(event))


def new_signs(baseline: Data, sight: Sight) -> list[Event]:
    """The signs of a rotation since the baseline, oldest first. One from before may appear late, and is none."""
    known = set(baseline["events"])
    signs = [event for event in sorted(sight.events) if is_sign(event) and _key(event) not in known]
    return [event for event in signs if event.at + sight.behind >= _drawn(baseline)]


def has_moved(baseline: Data, sight: Sight) -> bool:
    """Whether another node is the primary than at the baseline.

    The nodes' own word is never late. AWS may have shown an old answer then, or show one now, so neither what it showed
    then nor what a failover from before the baseline has led to is anything new.
    """
    before: str | None = baseline["primary"]
    if sight.said and baseline.get("heard"):
        return sight.said.node != before
    drawn = _drawn(baseline)
    moves = [told for told in map(failover, sight.events) if told]
    old: set[str | None] = {told.to for told in moves if told.at + sight.behind < drawn}
    if sight.said is None:
        old.add(baseline.get("aws_primary"))
    return None not in {before, sight.primary} and sight.primary not in {before, *old}


def _drawn(baseline: Data) -> datetime:
    return moment(baseline["drawn"]) if "drawn" in baseline else datetime.min.replace(tzinfo=UTC)


def _key(event: Event) -> str:
    return f"{event.at.isoformat()} {event.source} {event.message}"
