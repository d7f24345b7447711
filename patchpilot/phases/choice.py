"""What is to be done to a group; and which service update, if it is one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from patchpilot.elasticache.facts import (
    APPLICABLE,
    AVAILABLE,
    IN_FLIGHT,
    Group,
    Node,
    ServiceUpdate,
    UpdateAction,
    UpdateStatus,
)
from patchpilot.errors import NeedsOperator, NothingToDo, Transient
from patchpilot.phases.order import Kind

NO_ACTION = UpdateAction(group="", update="", status="")
"""In place of an update action, for operations that are no service update."""


@dataclass(frozen=True)
class Offer:
    """What there is to choose from."""

    group: Group
    nodes: tuple[Node, ...]
    actions: tuple[UpdateAction, ...]
    updates: tuple[ServiceUpdate, ...]
    meant: Mapping[str, str] = field(default_factory=dict)
    """The aim of this run, if it was interrupted after it had found that safe: somebody may have reached it meanwhile,
    and then there is still a failover to deal with."""


@dataclass(frozen=True)
class Choice:
    """An operation on a group."""

    action: UpdateAction = NO_ACTION
    update: ServiceUpdate | None = None
    """None while AWS does not list it: its dates are unknown then."""
    operation: Kind = Kind.SERVICE_UPDATE
    aim: Mapping[str, str] = field(default_factory=dict)
    """What is to be reached, by operation: ``update``, ``engine``, ``engine_version``, ``node_type`` ..."""
    running: bool = False
    """Whether an operation that is no service update runs already; or one that this run was about to start is over."""

    @property
    def adopted(self) -> bool:
        """Whether it runs already: started by somebody else, or by this run before it was interrupted."""
        return self.running or self.action.status in IN_FLIGHT

    @property
    def beyond_us(self) -> str:
        """Why it is too late, or not for us, to refuse it; empty if it can be refused."""
        if self.adopted:
            return "the update already runs" if self.is_update else "it already runs"
        return "it is only observed" if self.operation is Kind.OBSERVE else ""

    @property
    def is_update(self) -> bool:
        """Whether AWS has an update action for it."""
        return bool(self.action.update)

    @property
    def status(self) -> str:
        """How far it is, in AWS's words where AWS has any."""
        return self.action.status if self.is_update else "running" if self.running else "not begun"

    @property
    def what(self) -> str:
        """In a few words, for people."""
        if self.is_update:
            return f"service update {self.action.update}"
        return " ".join([str(self.operation).replace("-", " "), *self.aim.values()])


def choose(
    actions: Iterable[UpdateAction],
    updates: Iterable[ServiceUpdate],
    now: datetime,
    asked: str | None,
    meant: str | None = None,
) -> Choice:
    """The update asked for; else one that already runs; else the newest that applies.

    :param meant: the one that this run had chosen before it was interrupted; chosen again if it is complete by now.
    :raises NothingToDo: nothing applies; the message says what became of each.
    :raises NeedsOperator: the one asked for is not for this group.
    :raises Transient: AWS does not list ``meant`` at the moment: that is unknown then, neither done nor undone.
    """
    known = {update.name: update for update in updates}
    choices = [Choice(action, known.get(action.update), aim={"update": action.update}) for action in actions]
    done = [it for it in choices if it.action.update == meant and it.action.status == UpdateStatus.COMPLETE]
    if done and asked in {None, meant}:
        return replace(done[0], running=True)
    running = [choice for choice in choices if choice.adopted and asked in {None, choice.action.update}]
    unlisted = meant is not None and not any(choice.action.update == meant for choice in choices)
    if unlisted and asked in {None, meant} and not running:
        raise Transient(
            f"AWS does not list {meant}, which this run is about, at the moment; if it is gone for good, end the run "
            "with `patchpilot stop` and `patchpilot run`"
        )
    if asked is not None:
        return _asked(choices, now, asked)
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
