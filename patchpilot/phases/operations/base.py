"""What the kinds of operation have in common.

Each kind says four things: how it is chosen, what its baseline is, how it is started, and what a look at the group
means for it. That last one is pure. None of the requests that start one has an idempotency token, so each has an effect
that can be observed, and is looked for before anything is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar

from patchpilot.elasticache.facts import AVAILABLE, Application, Node
from patchpilot.engine.plan import Data
from patchpilot.errors import Corrupt, PatchpilotError
from patchpilot.phases.choice import Choice, Offer
from patchpilot.phases.desk import Desk
from patchpilot.phases.order import Kind
from patchpilot.phases.sight import Sight
from patchpilot.settings import Runbook

Row = dict[str, Any]

GIVE_UP = "to recover and verify what is there, give it up with `patchpilot stop` and run the same command again"
"""What is left to do with an operation that nobody can bring to its end."""


class Sign(StrEnum):
    """What one look means for an operation."""

    UNKNOWN = "unknown"
    """AWS does not say."""
    READY = "ready"
    """It does not run, and could be started."""
    BUSY = "busy"
    """It does not run, and something else does."""
    RUNNING = "running"
    OVER = "over"
    """It has reached its aim on every node; or, if nobody knows its aim, all is calm again."""
    STOPPED = "stopped"
    """It was stopped before it reached its aim."""
    IMPOSSIBLE = "impossible"
    """The error says why."""


@dataclass(frozen=True)
class Standing:
    """How far an operation is, by one look."""

    sign: Sign
    status: str | None = None
    """In AWS's words; None if it says nothing."""
    why: str = ""
    """For a person, where the status alone does not tell."""
    rows: Mapping[str, Row] = field(default_factory=dict)
    """How far each node is: at least ``node`` and ``status``."""
    initiated_by: tuple[str, ...] = ()
    began: datetime | None = None
    """The earliest trace of it."""
    error: PatchpilotError | None = None
    update: str | None = None
    """The service update it turned out to be."""
    detail: Data = field(default_factory=dict)
    """What else is worth keeping of it."""

    @property
    def line(self) -> str:
        """How far it is, for a person."""
        done = sum(row["status"] == "complete" for row in self.rows.values())
        nodes = ", ".join(f"{name} {row['status']}" for name, row in self.rows.items())
        return self.why or f"{self.status}, {done}/{len(self.rows)} nodes done ({nodes})"

    @property
    def calm(self) -> bool:
        """Whether the group and its nodes are available: of an operation that is no service update."""
        return self.status == AVAILABLE and all(row["status"] in {"complete", AVAILABLE} for row in self.rows.values())


class Operation(ABC):
    """One kind of operation on the desk's group."""

    kind: ClassVar[Kind]
    begins: ClassVar[str]
    """What its second phase does, for people."""
    acts: ClassVar[bool] = True
    """Whether this run starts it."""
    stoppable: ClassVar[bool] = False
    """Whether AWS can stop it half-way."""
    by_nodes: ClassVar[bool] = True
    """Whether a look needs the nodes as cache clusters of their own."""
    by_events: ClassVar[bool] = False
    """Whether a look before it is started needs events."""
    by_actions: ClassVar[bool] = False
    """Whether a look needs the update actions."""
    settles: ClassVar[int] = 1
    """How many settling times AWS has to show an interrupted request before it counts as never made."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    @abstractmethod
    def choose(self, offer: Offer, now: datetime) -> Choice:
        """What exactly is to be done.

        :raises NothingToDo: it is done already.
        :raises NeedsOperator: it cannot be done.
        """

    def baseline(self, aim: Data, sight: Sight) -> Data:
        """What the world looks like before it is started, as far as this kind needs to know. Goes into the intent."""
        return {}

    @abstractmethod
    def standing(self, baseline: Data, sight: Sight, *, tried: bool) -> Standing:
        """What ``sight`` means. Pure.

        :param baseline: the intent of the trigger: ``aim``, ``primary``, ``members`` and what :meth:`baseline` said.
        :param tried: whether this run has made a request that AWS may have followed.
        """

    def start(self, baseline: Data) -> Application:
        """Make the one request.

        :raises Transient: it may have taken effect or not.
        :raises Throttled: it did not.
        """
        raise Corrupt(f"operation {self.kind} starts nothing")

    def confirmed_after(self, standing: Standing, runbook: Runbook) -> timedelta:
        """For how long it has to look over before it counts as over: AWS's answers may be old."""
        return timedelta() if self.by_actions else runbook.settle

    def proof(self, standing: Standing, *, aborted: bool) -> tuple[bool, str]:
        """Whether its goal is reached, at the end; or, if it was aborted, whether nothing of it is under way."""
        at_rest = standing.sign not in {Sign.UNKNOWN, Sign.RUNNING, Sign.BUSY}
        # What AWS cannot stop is given up when nothing more comes of it.
        at_rest = at_rest or (not self.stoppable and standing.sign is Sign.RUNNING and standing.calm)
        return (at_rest if aborted else standing.sign is Sign.OVER), standing.line


def node_rows(nodes: tuple[Node, ...], done: set[str]) -> dict[str, Row]:
    """How far each node is, where AWS has no update action that says so."""
    return {
        node.node: {"node": node.node, "status": "complete" if node.node in done else node.status} for node in nodes
    }
