"""What people ask of a run that is under way, and what holds of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Ask(StrEnum):
    """What can be asked of a run."""

    STOP = "stop"
    """End it: what it has begun is stopped, and what that leaves behind is dealt with."""
    PAUSE = "pause"
    """Stay at the next checkpoint, until told to resume."""
    RESUME = "resume"
    APPROVE = "approve"
    """Go on with what is waiting for an approval."""


@dataclass(frozen=True)
class Request:
    """One request; they are never taken back, only followed by others."""

    ask: Ask
    by: str
    at: datetime
    reason: str = ""
    digest: str | None = None
    """Of what is approved."""

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        what = "approved" if self.ask is Ask.APPROVE else f"{self.ask} asked for"
        return f"{what} by {self.by}{reason}"


def stop(requests: Iterable[Request]) -> Request | None:
    """The request to stop, if there is one."""
    return next((request for request in requests if request.ask is Ask.STOP), None)


def hold(requests: Iterable[Request]) -> str | None:
    """Why the run has to stay where it is; None if it may go on. A run that is to stop is not held any more.

    :param requests: oldest first.
    """
    asked = list(requests)
    last = next((request for request in reversed(asked) if request.ask in {Ask.PAUSE, Ask.RESUME}), None)
    return str(last) if last is not None and last.ask is Ask.PAUSE and stop(asked) is None else None


def approval(requests: Iterable[Request], digest: str) -> Request | None:
    """The approval of exactly what ``digest`` stands for."""
    return next((r for r in requests if r.ask is Ask.APPROVE and r.digest == digest), None)
