"""What lies on the pilot's desk: everything the phases may use, each by the narrowest protocol that will do.

There is no clock on it. A step learns the time from its :class:`~patchpilot.engine.plan.View` and never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from patchpilot.elasticache.facts import Application, Event, Group, Node, ServiceUpdate, UpdateAction
from patchpilot.errors import Corrupt
from patchpilot.recovery.findings import Applied, Finding, Window
from patchpilot.settings import Role, Runbook
from patchpilot.valkey.nodes import Report


class Cloud(Protocol):
    """The ElastiCache API: :class:`patchpilot.elasticache.ElastiCache`."""

    def service_updates(self) -> tuple[ServiceUpdate, ...]: ...

    def update_actions(self, group: str) -> tuple[UpdateAction, ...]: ...

    def group(self, group: str) -> Group: ...

    def nodes(self, group: Group) -> tuple[Node, ...]: ...

    def events(self, sources: Collection[str], since: datetime, until: datetime) -> tuple[Event, ...]: ...

    def apply(self, update: str, group: str) -> Application: ...


class Nodes(Protocol):
    """The nodes as they report themselves: :class:`patchpilot.valkey.nodes.Nodes`."""

    def endpoint(self) -> Report: ...

    def member(self, host: str, port: int) -> Report: ...


class Recovery(Protocol):
    """Finding and curing what is stuck: :class:`patchpilot.recovery.Recovery`."""

    def survey(self, window: Window) -> tuple[Finding, ...]:
        """What is stuck now. Reads only."""

    def recover(self, window: Window, *, run_id: str | None = None) -> tuple[Applied, ...]:
        """Cure what can be cured, each thing once, however many recover at the same time."""

    def applied(self, run_id: str) -> tuple[Applied, ...]:
        """Every remedy applied for the run so far, oldest first."""

    def repeated_starts(self, age: timedelta) -> Sequence[Mapping[str, Any]]:
        """Callbacks that were started again within the last ``age`` because a worker died inside them."""


class Reports(Protocol):
    """The report's files: :class:`patchpilot.report.Files`."""

    def current(self) -> dict[str, str] | None:
        """The paths and the digest of the files, if they say what the journal says; else None."""

    def write(self) -> dict[str, str]:
        """Write the files; each is whole or not there. Returns what :meth:`current` will."""


@dataclass(frozen=True)
class Desk:
    """Everything that the phases of one run use."""

    cluster: str
    """The cluster's name in the configuration."""
    group: str
    """The id of its replication group."""
    role: Role
    cloud: Cloud
    nodes: Nodes | None
    """None for a cluster without an endpoint in the configuration."""
    recovery: Recovery | None
    """None for a cluster that is no broker: there is nothing to recover."""
    reports: Reports
    schema: Callable[[], str | None]
    """What is wrong with PostgreSQL's schema: :func:`patchpilot.postgres.journal.outdated`."""
    runbook: Runbook
    window: Window
    update: str | None = None
    """The service update asked for; None for the newest one that applies."""

    def __post_init__(self) -> None:
        if self.role == "broker" and (self.nodes is None or self.recovery is None):
            raise Corrupt(f"cluster {self.cluster!r} is a broker: its endpoint and recovery are needed")
