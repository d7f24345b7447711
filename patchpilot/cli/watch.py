"""``patchpilot recover --watch``: recovery that goes on."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from patchpilot.cli.console import Output, emit, emit_line, say, stop_signals
from patchpilot.clock import SYSTEM
from patchpilot.dsn import mask
from patchpilot.durations import ago
from patchpilot.errors import PatchpilotError, Usage
from patchpilot.recovery import Finding, Recovery, Site, Sweep, Window
from patchpilot.recovery.findings import Kind
from patchpilot.recovery.inventory import Backlog
from patchpilot.recovery.watch import Audiences, Pass, watch

SHORTEST, LONGEST = timedelta(seconds=1), timedelta(days=1)


@dataclass(frozen=True)
class Orders:
    """What to do in each pass."""

    window: Window
    only: Collection[Kind]
    dry_run: bool
    every: timedelta
    listen: str | None
    """Where a monitor can ask, ``HOST:PORT``."""


def go_on(site: Site, orders: Orders, output: Output) -> None:
    """Recover until a signal comes.

    :raises Usage: for an interval that is too short or too long, or an address that is none.
    :raises NeedsOperator: if the very first pass finds that something is set up wrong, or the address is taken.
    """
    if orders.every < SHORTEST:
        raise Usage(f"--watch: an interval below {SHORTEST.total_seconds():.0f}s would only keep PostgreSQL busy")
    if orders.every > LONGEST:
        raise Usage(f"--watch: an interval above {ago(LONGEST)} would leave what is lost until it is too old")
    narrator = Narrator(output, dry_run=orders.dry_run)
    with (
        stop_signals("stopping after this pass") as stop,
        Recovery(site, complain=narrator.complain) as recovery,
        ExitStack() as stack,
    ):
        audience = Audiences(narrator, *_monitors(orders, stack))

        def look() -> tuple[Sweep, Backlog]:
            if orders.dry_run:
                return recovery.look(orders.window, orders.only), recovery.backlog()
            return recovery.sweep(orders.window, only=orders.only), recovery.backlog()

        watch(look, orders.every, stop, audience, afresh=recovery.disconnect)


def _monitors(orders: Orders, stack: ExitStack) -> tuple[Any, ...]:
    if orders.listen is None:
        return ()
    # Only who is asked to listen needs a Prometheus client.
    from patchpilot.cli.monitor import Health, Metrics, address, serving

    health, metrics = Health(orders.every), Metrics()
    where = stack.enter_context(serving(address(orders.listen), health, metrics))
    say(f"listening on {where}: /healthz and /metrics")
    return health, metrics


class Narrator:
    """Says what happens, each thing once: a finding that stays is not news, and neither is a server that is away."""

    def __init__(self, output: Output, *, dry_run: bool) -> None:
        self._output = output
        self._dry_run = dry_run
        self._told: set[tuple[str, str, str]] = set()
        self._complained: set[tuple[str, str, str]] = set()
        self._complaints: set[tuple[str, str, str]] = set()
        self._problem: str | None = None

    def passed(self, done: Pass) -> None:
        if self._problem is not None:
            self._problem = None
            self._tell({"event": "back"}, "back again")
        for each in done.sweep.applied:
            what = f"recovered {each.kind} {each.id} by {each.remedy} ({each.diagnosis}): {each.reason}"
            self._tell({"event": "recovered", **each.as_dict()}, what, data=True)
        found = {(it.kind, it.id, it.diagnosis): it for it in done.sweep.findings if self._dry_run or not it.curable}
        for key, finding in found.items():
            if key not in self._told:
                self._found(finding)
        self._told = set(found)
        self._complained, self._complaints = self._complaints, set()

    def failed(self, error: Exception) -> None:
        problem = mask(str(error)) if isinstance(error, PatchpilotError) else f"{type(error).__name__}: {error}"
        if self._problem is None:
            self._tell({"event": "away", "error": problem}, f"{mask(problem)}; going on")
        self._problem = problem

    def complain(self, finding: Finding, error: PatchpilotError) -> None:
        """A finding could not be remedied."""
        key = (finding.kind, finding.id, type(error).__name__)
        self._complaints.add(key)
        if key not in self._complained:
            what = f"not recovered: {finding.kind} {finding.id}: {error}"
            self._tell({"event": "not recovered", **finding.as_dict(), "error": str(error)}, what)

    def _found(self, finding: Finding) -> None:
        what = f"{'found' if finding.curable else 'left alone:'} {finding.kind} {finding.id}"
        todo = f", remedy {finding.remedy}" if finding.curable else ""
        self._tell(
            {"event": "found", **finding.as_dict()}, f"{what} ({finding.diagnosis}{todo}): {finding.reason}", data=True
        )

    def _tell(self, event: dict[str, Any], line: str, *, data: bool = False) -> None:
        """One line: of JSON; or for people, on standard output if it is what they asked for."""
        if self._output is Output.JSON:
            emit_line({"at": SYSTEM.now().isoformat(), **event})
        elif data:
            emit(f"{SYSTEM.now():%H:%M:%S}  {mask(line)}")
        else:
            say(f"{SYSTEM.now():%H:%M:%S}  {mask(line)}")
