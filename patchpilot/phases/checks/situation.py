"""What the checks look at, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from patchpilot.elasticache.cloudwatch import Alarm, Metric
from patchpilot.elasticache.facts import Event, Group, Node, ServiceUpdate, Snapshot, UpdateAction
from patchpilot.phases.choice import Choice
from patchpilot.recovery.findings import Finding
from patchpilot.settings import Metric as Limit
from patchpilot.settings import Role
from patchpilot.valkey.nodes import Report
from patchpilot.workers.facts import Fleet


class Verdict(StrEnum):
    """What a check says."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARN = "warn"
    BLOCK = "block"
    UNKNOWN = "unknown"
    """It could not be found out. Blocks a broker: its chords hang on what nobody looked at."""


@dataclass(frozen=True)
class Check:
    """One verdict."""

    name: str
    verdict: Verdict
    evidence: str
    why: str
    """Why it matters."""
    mend: str
    """How to mend it; empty when it passes."""
    waived: str = ""
    """Why somebody went on all the same; empty if nobody did."""


@dataclass(frozen=True)
class Situation:
    """Everything that the checks look at, read at one moment. A string in place of an answer says why there is none."""

    now: datetime
    role: Role
    group: Group
    actions: tuple[UpdateAction, ...]
    choice: Choice
    updates: tuple[ServiceUpdate, ...] | str
    nodes: tuple[Node, ...] | str
    elsewhere: tuple[UpdateAction, ...] | str
    """Every update action that is under way in the region."""
    parameters: Mapping[str, str] | str
    snapshots: tuple[Snapshot, ...] | str
    history: tuple[Event, ...] | str
    """The events of the last two weeks."""
    alarms: tuple[Alarm, ...] | str
    metrics: tuple[Metric, ...] | str | None
    """None if the configuration says not to read them."""
    limit: Limit | None
    """The metric that can stop the rotation, if the configuration has one."""
    measured: tuple[float, ...] | str
    """Its newest values, newest first."""
    address: tuple[str, int] | None
    """Host and port of the primary endpoint, as the configuration has it; None if it has none."""
    endpoint: Report | str
    members: Mapping[str, Report | str]
    fleet: Fleet | str | None
    """None for a cluster that is no broker."""
    stuck: tuple[Finding, ...] | str | None
    """Likewise."""
    schema: str | None
    offered: tuple[str, ...] | str = ()
    """The versions of the engine that AWS offers, if it is to be upgraded."""


Judgement = tuple[Verdict, str]
"""A verdict and its evidence."""


@dataclass(frozen=True)
class Row:
    """One check."""

    name: str
    """Its durable name: what `--waive` takes, and what journals and reports have."""
    look: Callable[[Situation], Judgement]
    why: str
    mend: str
    waivable: bool = False
    """Whether somebody may go on in spite of *block*. Only where it is a judgement of risk: not where AWS would refuse,
    where the runbook could not follow, or where data would certainly be lost. *Unknown* may always be waived."""
    of_updates: bool = False
    """Whether there is nothing to look at if the operation is no service update."""
    of_upgrades: bool = False
    """Likewise, if it is no engine upgrade."""


def require(ok: bool, evidence: str) -> Judgement:
    """Pass or block."""
    return (Verdict.PASS if ok else Verdict.BLOCK), evidence


def prefer(ok: bool, evidence: str) -> Judgement:
    """Pass or warn."""
    return (Verdict.PASS if ok else Verdict.WARN), evidence


def unknown(why: str) -> Judgement:
    """It could not be found out."""
    return Verdict.UNKNOWN, why
