"""One run in the little world, in as many processes as it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Entry, Kind, MemoryJournal, RunRecord
from patchpilot.engine.requests import hold
from patchpilot.engine.runner import Runner
from patchpilot.errors import (
    PatchpilotError,
)
from patchpilot.phases import runbook
from patchpilot.phases.order import Kind as Do
from patchpilot.phases.order import Order
from patchpilot.phases.proposal import aim_of, digest, propose
from tests.crash.killing import Kill, KillingJournal, Side
from tests.crash.world import RUNBOOK, World, desk

MINUTE = timedelta(minutes=1)


class Flow:
    """One run in one world, in as many processes as it takes."""

    def __init__(self, directory: Path, order: Order | None = None, **rules: Any) -> None:
        self.clock = FakeClock()
        self.world = World(self.clock)
        self.journal = MemoryJournal(self.clock)
        self.directory = directory
        self.order = order or Order()
        self.rules = RUNBOOK.model_copy(update={"grace": timedelta(minutes=1), **rules})
        self.world.per_node = timedelta(minutes=2)
        self.said: list[str] = []
        self.waivers: dict[str, str] = {}

    def desk(self, journal: Any = None) -> Any:
        return desk(
            self.world, journal or self.journal, self.directory, runbook=self.rules, order=self.order,
            waivers=self.waivers,
        )  # fmt: skip

    def run(self, at: int | tuple[Kind, str] = 0, side: Side = Side.BEFORE) -> KillingJournal:
        """One process, which dies at its ``at``-th entry."""
        journal = KillingJournal(self.journal, at, side)
        Runner(
            runbook(self.desk(journal)), journal, self.clock, order=self.order.note(),
            hold=lambda: hold(self.world.requests), notify=lambda progress: self.said.append(progress.message),
        ).run()  # fmt: skip
        return journal

    def crash(self, at: int | tuple[Kind, str], side: Side = Side.AFTER) -> str:
        with pytest.raises(Kill) as death:
            self.run(at, side)
        return str(death.value)

    def refuses(self, error: type[PatchpilotError]) -> str:
        with pytest.raises(error) as refusal:
            self.run()
        return str(refusal.value)

    def plan(self) -> str:
        """Plan what the order asks for, as `patchpilot plan` does; the digest."""
        content = propose(self.desk(), self.clock.now())
        key = digest(content)
        self.world.plans[key] = json.loads(json.dumps(content))
        return key

    def hold_to(self, key: str) -> None:
        planned = self.world.plans[key]
        self.order = Order(**{**aim_of(planned), "operation": Do(planned["operation"]), "plan": key})  # type: ignore[arg-type]

    def in_(self, minutes: float, change: Callable[[], object]) -> None:
        self.world.after(minutes * MINUTE, change)  # type: ignore[arg-type]

    def entries(self, step: str, kind: Kind) -> list[Entry]:
        return [entry for entry in self.journal.entries() if entry.step == step and entry.kind is kind]

    @property
    def record(self) -> RunRecord:
        return RunRecord.of(self.journal.entries())

    @property
    def outcome(self) -> str:
        finished = self.record.finished
        return str(finished.data["outcome"]) if finished else "unfinished"

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(next(self.directory.glob("*/report.json")).read_text())
        return report


ORDERS = {
    "service-update": Order(),
    "engine-upgrade": Order(Do.ENGINE_UPGRADE, engine_version="8.1"),
    "node-type": Order(Do.NODE_TYPE, node_type="cache.r7g.xlarge"),
    "test-failover": Order(Do.TEST_FAILOVER),
    "observe": Order(Do.OBSERVE),
}


def arranged(directory: Path, kind: str) -> Flow:
    """The flow of one kind; what is to be observed is begun by AWS after a while."""
    flow = Flow(directory, ORDERS[kind])
    if kind == "observe":
        flow.world.initiator = "system"
        flow.in_(5, flow.world.start)
    return flow


def substance(flow: Flow) -> dict[str, Any]:
    report = flow.report()
    return {
        "outcome": (flow.outcome, report["outcome"]),
        "operation": {key: report["operation"][key] for key in ("kind", "what")},
        "abort": bool(report["abort"]),
        "failovers": [(row["old"], row["to"]) for row in report["failovers"]],
        "nodes": [(row["node"], row.get("status")) for row in report["nodes"]],
        "claims": [(claim["name"], claim["holds"]) for claim in report["verification"]["claims"]],
        "phases": [(phase["name"], phase["state"]) for phase in report["phases"]],
        "recovered": sorted(row["id"] for row in report["remedies"]["after"]),
    }
