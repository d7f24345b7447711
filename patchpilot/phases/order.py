"""What a run is asked to do. Pure; on record with the run, so that whoever takes it up does the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self

from patchpilot.errors import Corrupt, Usage

BEFORE_TRIGGER = "trigger"
"""The one place where a run can be told to wait for an approval."""


ENGINES = ("redis", "valkey")
_VERSION = re.compile(r"\d+(?:\.\d+)*(?:\.x)?")
"""AWS has written ``6.x`` too."""


class Kind(StrEnum):
    """The kinds of operation. They rotate nodes and fail over in the same way, so they share all phases."""

    SERVICE_UPDATE = "service-update"
    ENGINE_UPGRADE = "engine-upgrade"
    """Another engine version, or from Redis to Valkey."""
    NODE_TYPE = "node-type"
    TEST_FAILOVER = "test-failover"
    """Game day: one failover, and nothing else."""
    OBSERVE = "observe"
    """AWS or a colleague does it: everything but the trigger."""


_NEEDS = {Kind.ENGINE_UPGRADE: "engine_version", Kind.NODE_TYPE: "node_type"}
_ONLY = {
    "update": {Kind.SERVICE_UPDATE, Kind.OBSERVE},
    "engine": {Kind.ENGINE_UPGRADE},
    "engine_version": {Kind.ENGINE_UPGRADE},
    "parameter_group": {Kind.ENGINE_UPGRADE},
    "node_type": {Kind.NODE_TYPE},
}


@dataclass(frozen=True)
class Order:
    """What to do, and what it takes to begin.

    :raises Usage: what is asked for does not fit together.
    """

    operation: Kind = Kind.SERVICE_UPDATE
    update: str | None = None
    """The service update; None for the newest one that applies."""
    engine: str | None = None
    """None for the one that the group has."""
    engine_version: str | None = None
    parameter_group: str | None = None
    """None for the one that the group has."""
    node_type: str | None = None
    plan: str | None = None
    """The digest of the plan that the run is held to."""
    approve_before: str | None = None

    def __post_init__(self) -> None:
        missing = _NEEDS.get(self.operation)
        if missing and not getattr(self, missing):
            raise Usage(f"operation {self.operation} needs {_option(missing)}")
        if self.engine_version and not _VERSION.fullmatch(self.engine_version):
            raise Usage(f"--engine-version: {self.engine_version!r} is no version; write it like 8.1")
        if self.engine not in {None, *ENGINES}:
            raise Usage(f"--engine: {self.engine!r} is none of {', '.join(ENGINES)}")
        for name, kinds in _ONLY.items():
            if getattr(self, name) and self.operation not in kinds:
                raise Usage(f"{_option(name)} goes with --operation {' or '.join(sorted(kinds))}")
        if self.operation is Kind.OBSERVE and (self.plan or self.approve_before):
            raise Usage("operation observe triggers nothing: there is nothing to plan or to approve")
        if self.approve_before not in {None, BEFORE_TRIGGER}:
            raise Usage(f"--approve-before: {self.approve_before!r} is not a place to wait; write {BEFORE_TRIGGER}")

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> Self:
        """Read what :meth:`note` wrote; a run without one was asked for the newest service update.

        :raises Corrupt: another version wrote it.
        """
        try:
            return cls(**{**note, "operation": Kind(note.get("operation", Kind.SERVICE_UPDATE))})
        except (TypeError, ValueError, Usage) as error:
            raise Corrupt(f"this version does not understand what the run was asked to do: {error}") from None

    def note(self) -> dict[str, str]:
        """As the journal stores it."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None}

    @property
    def title(self) -> str:
        """What is asked for, in a few words."""
        match self.operation:
            case Kind.SERVICE_UPDATE:
                return f"service update {self.update or '(the newest that applies)'}"
            case Kind.ENGINE_UPGRADE:
                return f"engine upgrade to {' '.join(filter(None, (self.engine, self.engine_version)))}"
            case Kind.NODE_TYPE:
                return f"node type {self.node_type}"
            case Kind.TEST_FAILOVER:
                return "test failover"
            case Kind.OBSERVE:
                return f"observation of {self.update}" if self.update else "observation of whatever happens"


def settle(asked: Mapping[str, str | None], on_record: Mapping[str, Any] | None, *, begun: bool) -> Order:
    """The order that holds.

    Once a run has begun, that is the one on record, and nothing may be asked for that would change it. Until then the
    command line says what to do; but a plan stays good while nothing else is asked for, and nobody gets past an
    approval by leaving the option out.

    :param asked: the options of the command line by field name; None where one was not given.
    :param on_record: the order of the run that is taken up; None for a new run.
    :param begun: whether that run may have changed the cluster: it cannot become another one then.
    :raises Usage: the options do not fit together, or contradict a run that has begun.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if on_record is None:
        return _read(given)
    known = Order.of(on_record)
    if not begun:
        return _not_begun(given, known)
    different = {name: value for name, value in given.items() if getattr(known, name) != value}
    if different:
        options = ", ".join(f"{_option(name)} {value}" for name, value in different.items())
        raise Usage(
            f"the unfinished run of this cluster ({known.title}) has begun: {options} would change it. "
            "Run the same command without these options to go on with it"
        )
    return known


def _not_begun(given: dict[str, str], known: Order) -> Order:
    if not given:
        return known if known.plan or known.approve_before else Order()
    if known.plan and "plan" not in given:
        return _still_held(given, known)
    asked = _read(given)
    return (
        asked
        if asked.operation is Kind.OBSERVE
        else replace(asked, approve_before=asked.approve_before or known.approve_before)
    )


def _still_held(given: dict[str, str], known: Order) -> Order:
    """A run that is held to a plan stays so: nobody gets past the plan by leaving it out."""
    others = {name: value for name, value in given.items() if name != "approve_before"}
    different = [f"{_option(name)} {value}" for name, value in others.items() if getattr(known, name) != value]
    if different:
        raise Usage(
            f"the unfinished run of this cluster is held to plan {known.plan}, and {', '.join(different)} is not part "
            "of it: give another plan with --plan, or end that run first with `patchpilot stop` and `patchpilot run`"
        )
    return replace(known, approve_before=given.get("approve_before") or known.approve_before)


def _read(given: Mapping[str, str]) -> Order:
    try:
        kind = Kind(given.get("operation", Kind.SERVICE_UPDATE))
    except ValueError:
        raise Usage(f"--operation: {given['operation']!r} is none of {', '.join(Kind)}") from None
    return Order(**{**given, "operation": kind})  # type: ignore[arg-type]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
