"""What recovery says: findings, and what it did about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, Self, get_args

Kind = Literal["chord", "callback", "task"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Remedy(StrEnum):
    """What recovery does about a finding."""

    DISPATCH_CALLBACK = "dispatch-callback"
    """Claim the chord, join the results from PostgreSQL, publish the callback with its own task id."""
    REPUBLISH = "republish"
    """Push the journalled message again, as it was, with its own task id."""
    REQUEUE = "requeue"
    """Put a message that a dead worker had taken back into its queue."""
    RECORD_PART = "record-part"
    """A part ended but its return was interrupted: record it from the result of the task."""
    REVOKE_PART = "revoke-part"
    """A header task whose message is lost will not run any more: end it as revoked, as a worker that met it would."""
    NONE = "none"
    """Nothing: the reason says why, and what a person can do."""


@dataclass(frozen=True)
class Finding:
    """One thing that is stuck, why, and what recovery would do about it."""

    kind: Kind
    id: str
    """The chord's group id, or the task's id."""
    diagnosis: str
    remedy: Remedy
    reason: str
    """One sentence for a person."""
    callback: str | None = None
    age: timedelta = timedelta()
    """Since the last progress that was seen."""
    returned: int | None = None
    total: int | None = None
    messages: tuple[str, ...] = ()
    """The outbox ids of the messages concerned."""

    @property
    def curable(self) -> bool:
        return self.remedy is not Remedy.NONE

    @property
    def unknown(self) -> bool:
        """Whether it is no more than suspected: somebody who may have it does not say."""
        return self.diagnosis in ("unknown", "callback-unknown")

    def as_dict(self) -> dict[str, Any]:
        """As JSON can express it; the age in seconds."""
        data = {**asdict(self), "age_seconds": round(self.age.total_seconds(), 1), "remedy": str(self.remedy)}
        del data["age"], data["messages"]
        return data


@dataclass(frozen=True)
class Window:
    """Which chords and messages to look at, by the time since their last progress."""

    min_age: timedelta = timedelta(minutes=5)
    max_age: timedelta = timedelta(hours=24)


@dataclass(frozen=True)
class Applied:
    """One remedy that was applied, as recorded in PostgreSQL."""

    at: datetime
    kind: Kind
    id: str
    diagnosis: str
    remedy: str
    reason: str
    callback: str | None = None

    @classmethod
    def of(cls, finding: Finding, at: datetime) -> Self:
        """The remedy of ``finding``, applied at ``at``."""
        return cls(
            at=at, kind=finding.kind, id=finding.id, diagnosis=finding.diagnosis, remedy=str(finding.remedy),
            reason=finding.reason, callback=finding.callback,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """As JSON can express it."""
        return {**asdict(self), "at": self.at.isoformat()}
