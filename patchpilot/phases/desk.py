"""What lies on the pilot's desk: everything the phases may use, each by the narrowest protocol that will do.

There is no clock on it. A step learns the time from its :class:`~patchpilot.engine.plan.View` and never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from patchpilot.elasticache.cloudwatch import Alarm, Metric
from patchpilot.elasticache.facts import (
    Application,
    Event,
    Group,
    Modification,
    Node,
    ServiceUpdate,
    Snapshot,
    UpdateAction,
)
from patchpilot.engine.requests import Request
from patchpilot.errors import Corrupt
from patchpilot.phases.order import Order
from patchpilot.recovery.findings import Applied, Finding, Window
from patchpilot.settings import Role, Runbook
from patchpilot.valkey.nodes import Report
from patchpilot.workers.facts import Fleet


class Cloud(Protocol):
    """The ElastiCache API: :class:`patchpilot.elasticache.ElastiCache`."""

    def service_updates(self) -> tuple[ServiceUpdate, ...]: ...

    def update_actions(self, group: str) -> tuple[UpdateAction, ...]: ...

    def group(self, group: str) -> Group: ...

    def nodes(self, group: Group) -> tuple[Node, ...]: ...

    def in_flight(self) -> tuple[UpdateAction, ...]: ...

    def parameters(self, parameter_group: str) -> Mapping[str, str]: ...

    def snapshots(self, group: str) -> tuple[Snapshot, ...]: ...

    def history(self, group: Group, until: datetime) -> tuple[Event, ...]: ...

    def events(self, sources: Collection[str], since: datetime, until: datetime) -> tuple[Event, ...]: ...

    def apply(self, update: str, group: str) -> Application: ...

    def stop(self, update: str, group: str) -> Application: ...

    def modify(self, group: str, change: Modification) -> Application: ...

    def test_failover(self, group: str, node_group: str) -> Application: ...

    def node_types(self, group: str) -> tuple[str, ...]: ...

    def engine_versions(self, engine: str) -> tuple[str, ...]: ...


class Gauge(Protocol):
    """The metric that can stop a rotation: :class:`patchpilot.elasticache.metrics.Metrics`."""

    def newest(self, now: datetime, since: datetime | None = None) -> tuple[float, ...]: ...


class Monitoring(Protocol):
    """CloudWatch: :class:`patchpilot.elasticache.cloudwatch.CloudWatch`."""

    def alarms(self, about: Collection[str]) -> tuple[Alarm, ...]: ...

    def metrics(self, nodes: Collection[str], until: datetime) -> tuple[Metric, ...]: ...


class Nodes(Protocol):
    """The nodes as they report themselves: :class:`patchpilot.valkey.nodes.Nodes`."""

    @property
    def address(self) -> tuple[str, int]: ...

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


class Workers(Protocol):
    """Who consumes from the broker: :class:`patchpilot.workers.Workers`."""

    def look(self, queues: Collection[str] = ()) -> Fleet:
        """Who is there, what each says of itself, and how full the queues are. Changes nothing."""

    def release(self, to: Mapping[str, str]) -> dict[str, str]:
        """Send a canary task and a canary chord to each. Instance -> serialiser; instance -> the token to come back."""

    def tidy(self, sent: Mapping[str, str]) -> None:
        """Remove what is left of canaries."""


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
    monitoring: Monitoring
    recovery: Recovery | None
    """None for a cluster that is no broker: there is nothing to recover."""
    workers: Workers | None
    """Likewise."""
    reports: Reports
    schema: Callable[[], str | None]
    """What is wrong with PostgreSQL's schema: :func:`patchpilot.postgres.journal.outdated`."""
    runbook: Runbook
    window: Window
    order: Order = field(default_factory=Order)
    """What the run was asked to do."""
    environment: str = "default"
    requests: Callable[[], Sequence[Request]] = tuple
    """What people have asked of this run so far, oldest first."""
    recall: Callable[[str], Mapping[str, Any] | None] = lambda _: None
    """The plan with this digest, if one was made for this cluster."""
    gauge: Gauge | None = None
    metrics: bool = True
    """Whether pre-flight reads CloudWatch's metrics; alarms it always reads."""
    waivers: Mapping[str, str] = field(default_factory=dict)
    """The checks that somebody answers for, and why."""

    def __post_init__(self) -> None:
        if self.role == "broker" and None in (self.nodes, self.recovery, self.workers):
            raise Corrupt(f"cluster {self.cluster!r} is a broker: its endpoint, recovery and workers are needed")
