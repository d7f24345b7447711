"""Which service update to apply. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from patchpilot.elasticache.facts import APPLICABLE, AVAILABLE, IN_FLIGHT, ServiceUpdate, UpdateAction
from patchpilot.errors import NeedsOperator, NothingToDo


@dataclass(frozen=True)
class Choice:
    """An update for a group."""

    action: UpdateAction
    update: ServiceUpdate | None
    """None while AWS does not list it: its dates are unknown then."""

    @property
    def adopted(self) -> bool:
        """Whether it runs already: started by somebody else, or by this run before it was interrupted."""
        return self.action.status in IN_FLIGHT


def choose(
    actions: Iterable[UpdateAction], updates: Iterable[ServiceUpdate], now: datetime, asked: str | None
) -> Choice:
    """The update asked for; else one that already runs; else the newest that applies.

    :raises NothingToDo: nothing applies; the message says what became of each.
    :raises NeedsOperator: the one asked for is not for this group.
    """
    known = {update.name: update for update in updates}
    choices = [Choice(action, known.get(action.update)) for action in actions]
    if asked is not None:
        return _asked(choices, now, asked)
    running = [choice for choice in choices if choice.adopted]
    applicable = [choice for choice in choices if _applies(choice, now)]
    if not running and not applicable:
        raise NothingToDo(f"no service update applies to this group: {_summary(choices, now)}")
    return max(running or applicable, key=_released)


def _asked(choices: list[Choice], now: datetime, asked: str) -> Choice:
    found = [choice for choice in choices if choice.action.update == asked]
    if not found:
        listed = ", ".join(sorted(choice.action.update for choice in choices)) or "none"
        raise NeedsOperator(f"AWS lists no update {asked!r} for this group (listed: {listed}): check --update")
    if not found[0].adopted and not _applies(found[0], now):
        raise NothingToDo(f"the update does not apply: {_summary(found, now)}")
    return found[0]


def _applies(choice: Choice, now: datetime) -> bool:
    return choice.action.status in APPLICABLE and not _obstacle(choice, now)


def _obstacle(choice: Choice, now: datetime) -> str:
    """Why AWS would not apply it although its status would allow it."""
    update = choice.update
    status = update.status if update else choice.action.update_status
    if status not in {AVAILABLE, ""}:
        return status
    if update and update.ends and update.ends <= now:
        return f"its end date was {update.ends:%Y-%m-%d}"
    return ""


def _summary(choices: list[Choice], now: datetime) -> str:
    parts = [
        f"{choice.action.update} is {choice.action.status}" + (f" ({why})" if (why := _obstacle(choice, now)) else "")
        for choice in choices
    ]
    return "; ".join(parts) or "AWS lists none"


def _released(choice: Choice) -> tuple[float, str]:
    released = choice.update.released if choice.update else None
    return (released.timestamp() if released else 0.0, choice.action.update)
