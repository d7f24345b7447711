"""Nothing is started: AWS, in a maintenance window, or a colleague does it, and this run deals with what it does."""

from __future__ import annotations

from datetime import datetime, timedelta

from patchpilot.elasticache.facts import IN_FLIGHT, UpdateAction, UpdateStatus
from patchpilot.engine.plan import Data
from patchpilot.errors import NeedsOperator, NothingToDo
from patchpilot.phases.choice import Choice, Offer
from patchpilot.phases.operations import service_update
from patchpilot.phases.operations.base import Operation, Sign, Standing, node_rows
from patchpilot.phases.operations.gameday import has_moved, known_signs, new_signs
from patchpilot.phases.order import Kind
from patchpilot.phases.sight import Sight
from patchpilot.settings import Runbook


class Observing(Operation):
    """Whatever happens next. A service update is over when AWS says so; anything else when it has long been quiet."""

    kind = Kind.OBSERVE
    begins = "wait until something begins"
    acts = False
    stoppable = True  # if it turns out to be a service update
    by_events = True
    by_actions = True

    def choose(self, offer: Offer, now: datetime) -> Choice:
        asked, actions = self.desk.order.update, offer.actions
        if asked and not any(action.update == asked for action in actions):
            listed = ", ".join(sorted(action.update for action in actions)) or "none"
            raise NeedsOperator(f"AWS lists no update {asked!r} for this group (listed: {listed}): check --update")
        action = next((a for a in actions if a.update == asked), None) or _running(actions, None)
        if asked and action and action.status == UpdateStatus.COMPLETE:
            raise NothingToDo(f"{asked} is complete: there is nothing to observe")
        busy = not offer.group.available or _running(actions, asked) is not None
        if action is None:
            return Choice(operation=self.kind, running=busy)
        updates = {update.name: update for update in offer.updates}
        return Choice(action, updates.get(action.update), self.kind, {"update": action.update}, running=busy)

    def baseline(self, aim: Data, sight: Sight) -> Data:
        return {"update": aim.get("update"), "events": known_signs(sight), "drawn": sight.now.isoformat()}

    def standing(self, baseline: Data, sight: Sight, *, tried: bool) -> Standing:
        followed = baseline.get("followed")
        action = sight.action(followed) if followed else _running(sight.actions, baseline["update"])
        if followed or action is not None:
            return self._of_update(action, sight)
        return self._of_whatever(baseline, sight)

    def _of_update(self, action: UpdateAction | None, sight: Sight) -> Standing:
        members = {member.node for member in sight.group.members}
        return service_update.standing(action, members, {"begun": True}, tried=True)

    def _of_whatever(self, baseline: Data, sight: Sight) -> Standing:
        signs = new_signs(baseline, sight)
        begun = bool(signs) or has_moved(baseline, sight) or not sight.calm
        why = f"the group is {sight.group.status}" + (f"; last: {signs[-1].message}" if signs else "")
        rows = node_rows(sight.nodes, set())
        if baseline.get("begun"):
            sign = Sign.OVER if sight.calm else Sign.RUNNING
        else:
            sign = Sign.RUNNING if begun else Sign.READY
        return Standing(sign, sight.group.status, why, rows, began=signs[0].at if signs else None)

    def confirmed_after(self, standing: Standing, runbook: Runbook) -> timedelta:
        return timedelta() if standing.update else runbook.quiet

    def proof(self, standing: Standing, *, aborted: bool) -> tuple[bool, str]:
        """Nobody knows what it was meant to reach: all that can be proven is that it has come to rest."""
        return standing.sign not in {Sign.UNKNOWN, Sign.RUNNING, Sign.BUSY}, standing.line


def _running(actions: tuple[UpdateAction, ...], asked: str | None) -> UpdateAction | None:
    found = [action for action in actions if action.status in IN_FLIGHT and asked in {None, action.update}]
    return max(found, key=lambda action: (action.status == UpdateStatus.IN_PROGRESS, action.update), default=None)
