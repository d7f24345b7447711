"""What ElastiCache's automation does to the nodes of one group, step by step: rotations, failovers and mishaps.

Replicas first, then the failover, then the old primary; statuses, event texts and their order as AWS documents them and
as people saw them. A script yields the seconds that pass before it goes on, so that it can be played in a thread on
real servers or on a fake clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Literal, Protocol

from patchpilot.lab.modifications import Change
from patchpilot.lab.scenario import CALM, BySystem, Moment, Scenario
from patchpilot.lab.world import (
    APPLICABLE,
    AVAILABLE,
    LAB_UPDATE,
    MODIFYING,
    NODE,
    UNDER_WAY,
    ActionKey,
    Milestone,
    NodeUpdate,
    ServiceUpdate,
    UpdateAction,
    World,
    lab_update,
)

Script = Iterator[float]

_CLUSTER = "cache-cluster"
_GROUP = "replication-group"

# How the seconds of one node are spent: it is down for so much of them, and the next one waits for so much more.
_DOWN = 0.4
_GAP = 0.1
_GLANCE_SECONDS = 0.1
_INSTANT = 0.001
_EVER = 3600.0


class Nodes(Protocol):
    """The nodes of one group, by name."""

    @property
    def primary(self) -> str: ...

    @property
    def replicas(self) -> list[str]: ...

    def can_fail_over(self) -> bool:
        """Whether there is a replica that could be promoted."""

    def fail_over(self) -> tuple[str, str]:
        """Promote a replica, and leave the old primary down: the old one and the new one."""

    def take_down(self, node: str) -> None: ...

    def bring_back(self, node: str, *, synchronise: bool) -> None:
        """Start a node as a replica; if it synchronises, returns when it has everything."""

    def synchronise(self, node: str) -> None:
        """Let a node synchronise that did not."""

    def await_sync(self) -> None:
        """Wait until every replica that synchronises has what the primary has."""


@dataclass(frozen=True)
class _Mishap:
    kind: Literal["failover", "by-system", "superseded"]
    due: Callable[[], datetime | None]
    play: Callable[[], Script]


class Choreography:
    """The scripts of one replication group.

    :param run: plays a script: its first part at once, the rest in the background.
    :param seconds_per_node: how long the replacement of one node takes, at least.
    """

    def __init__(
        self,
        world: World,
        nodes: Nodes,
        group: str,
        run: Callable[[Script, str], None],
        *,
        scenario: Scenario = CALM,
        seconds_per_node: float = 3.0,
    ) -> None:
        self.seconds_per_node = seconds_per_node
        self._world = world
        self._nodes = nodes
        self._group = group
        self._run = run
        self._scenario = scenario
        self._stalls = {each.node: each for each in scenario.stall}
        self._unsynced = {each.node: each for each in scenario.unsynced}
        self._lock = threading.Lock()
        self._mishaps = self._planned()

    def rotate(self, update: str) -> None:
        """Apply a service update to the nodes that do not have it yet; the action is `waiting-to-start`."""
        self._run(self._rotate((update, self._group)), f"rotation of {self._group}")

    def test_failover(self) -> None:
        """Fail over as TestFailover does; the group is `modifying`."""
        self._run(self._test_failover(), f"failover of {self._group}")

    def modify(self, target: Change) -> None:
        """Make every node what ``target`` says; the group is `modifying` already."""
        self._run(self._modify(target), f"modification of {self._group}")

    def watch(self) -> Script:
        """Play what the scenario has in store. Ends when that was everything."""
        while self._mishaps:
            self.glance()
            yield _GLANCE_SECONDS

    def glance(self) -> None:
        """Play what is due now, except what an operation under way will play itself."""
        while (mishap := self._take("by-system", "superseded")) is not None:
            self._run(mishap.play(), mishap.kind)
        further = any(mishap.kind == "failover" and self._is_due(mishap) for mishap in tuple(self._mishaps))
        if further and self._world.claim(self._group):
            self._run(self._alone(), "failover")

    # What goes as planned.

    def _test_failover(self) -> Script:
        yield 0
        self._world.reach(Milestone.APPLIED)
        self._publish(_GROUP, self._group, f"Test Failover API called for node group {NODE}")
        yield from self._fail_over()
        self._world.change_group(self._group, status=AVAILABLE)
        self._world.reach(Milestone.COMPLETE)

    def _rotate(self, key: ActionKey) -> Script:
        yield from self._pause(self.seconds_per_node * _GAP)
        if self._action(key).status in UNDER_WAY:
            self._world.change_action(key, "in-progress")
        while self._action(key).status in UNDER_WAY and (node := self._next(key)) is not None:
            yield from self._update(key, node)
            yield from self._pause(self.seconds_per_node * _GAP)
        self._finish(key)

    def _modify(self, target: Change) -> Script:
        """Replicas first, then the failover, then the old primary, as for an update."""
        self._world.reach(Milestone.APPLIED)
        for node in [*self._nodes.replicas, self._nodes.primary]:
            begun = self._world.clock.monotonic()
            yield from self._pause(self.seconds_per_node * _GAP)
            if node == self._nodes.primary:
                self._promote()
            yield from self._recover(node, begun)
            self._publish(_CLUSTER, node, "Cache cluster patched")
            self._world.change_member(self._group, node, **asdict(target))
        self._world.modify_group(self._group, pending={}, status=AVAILABLE, **asdict(target))
        self._world.reach(Milestone.COMPLETE)

    def _update(self, key: ActionKey, node: str) -> Script:
        begun = self._world.clock.monotonic()
        self._mark(key, node, "in-progress")
        if node == self._nodes.primary:
            self._promote()
        yield from self._recover(node, begun)
        self._mark(key, node, "complete")

    def _fail_over(self) -> Script:
        old = self._promote()
        yield from self._recover(old, self._world.clock.monotonic())

    def _promote(self) -> str:
        """Promote a replica; returns the old primary, which is down."""
        old, new = self._nodes.fail_over()
        self._world.change_group(self._group, primary_id=new)
        text = f"Failover from primary node {old} to replica node {new} completed"
        self._publish(_CLUSTER, new, text)
        self._publish(_GROUP, self._group, text)
        return old

    def _recover(self, node: str, begun: float) -> Script:
        """Take a replica (or an old primary) down, hold it down, and bring it back."""
        self._publish(_CLUSTER, node, f"Recovering cache nodes {NODE}")
        self._world.change_member(self._group, node, status=MODIFYING)
        self._nodes.take_down(node)
        yield from self._pause(self.seconds_per_node * _DOWN)
        yield from self._stall(node)
        self._bring_back(node)
        yield from self._pause(begun + self.seconds_per_node - self._world.clock.monotonic())
        self._nodes.await_sync()
        self._world.change_member(self._group, node, status=AVAILABLE)
        self._publish(_CLUSTER, node, f"Finished recovery for cache nodes {NODE}")

    def _finish(self, key: ActionKey) -> None:
        action = self._action(key)

        def settle(row: NodeUpdate) -> NodeUpdate:
            return row if row.status == "complete" else replace(row, status="stopped", modified=self._world.now())

        outcome = "complete" if all(row.status == "complete" for row in action.nodes) else "stopped"
        over = action.status in (*UNDER_WAY, "stopping")
        self._world.change_group(self._group, status=AVAILABLE)
        self._world.change_action(key, outcome if over else action.status, nodes=settle)

    def _next(self, key: ActionKey) -> str | None:
        """The next node to update: replicas by name, the primary of that moment last."""
        left = {row.cluster_id for row in self._action(key).nodes if row.status != "complete"}
        return next((node for node in [*self._nodes.replicas, self._nodes.primary] if node in left), None)

    def _mark(self, key: ActionKey, node: str, status: str) -> None:
        now = self._world.now()

        def mark(row: NodeUpdate) -> NodeUpdate:
            if row.cluster_id != node:
                return row
            if status == "complete":
                return replace(row, status=status, ended=now, modified=now)
            return replace(row, status=status, started=now, modified=now)

        self._world.change_action(key, self._action(key).status, nodes=mark)

    def _action(self, key: ActionKey) -> UpdateAction:
        return self._world.view().actions[key]

    def _publish(self, source_type: str, source: str, message: str) -> None:
        self._world.publish(source_type, source, message)

    # What does not.

    def _pause(self, seconds: float) -> Script:
        """Let time pass in the middle of an operation; whatever is due meanwhile happens, further failovers too."""
        end = self._world.clock.monotonic() + seconds
        while (left := end - self._world.clock.monotonic()) >= _INSTANT:
            self.glance()
            if self._take("failover") is not None:
                yield from self._fail_over()
            else:
                yield min(left, _GLANCE_SECONDS) if self._mishaps else left

    def _stall(self, node: str) -> Script:
        stall = self._stalls.pop(_number(node), None)
        while stall is not None:
            yield from self._pause(_EVER if stall.lasting is None else stall.lasting.total_seconds())
            stall = stall if stall.lasting is None else None

    def _bring_back(self, node: str) -> None:
        unsynced = self._unsynced.pop(_number(node), None)
        self._nodes.bring_back(node, synchronise=unsynced is None)
        if unsynced is not None and unsynced.lasting is not None:
            self._run(self._synchronise(node, unsynced.lasting.total_seconds()), f"synchronisation of {node}")

    def _synchronise(self, node: str, after: float) -> Script:
        yield after
        self._nodes.synchronise(node)

    def _alone(self) -> Script:
        """A failover while nothing else is under way; the group is claimed."""
        yield 0
        if self._take("failover") is not None:
            yield from self._fail_over()
        self._world.change_group(self._group, status=AVAILABLE)

    def _by_system(self, how: BySystem) -> Script:
        key = (LAB_UPDATE, self._group)
        for status, length in (("scheduling", how.scheduling), ("scheduled", how.scheduled)):
            if length and self._action(key).status in (*APPLICABLE, "scheduling"):
                self._world.change_action(key, status)
                yield length.total_seconds()
        while self._action(key).status in APPLICABLE:
            if self._world.start_action(key, by="system") is not None:
                yield from self._rotate(key)
            else:  # something else is done to the group
                yield _GLANCE_SECONDS

    def _supersede(self, by: str | None) -> Script:
        update = replace(lab_update(self._world.now()), name=by, released=self._world.now()) if by else None
        self._world.supersede((LAB_UPDATE, self._group), update)
        yield 0

    def _planned(self) -> list[_Mishap]:
        found = [_Mishap("failover", self._when(each), self._fail_over) for each in self._scenario.failover]
        system, superseded = self._scenario.by_system, self._scenario.superseded
        if system is not None:
            found.append(_Mishap("by-system", self._when(system), lambda: self._by_system(system)))
        if superseded is not None:
            found.append(_Mishap("superseded", self._when(superseded), lambda: self._supersede(superseded.by)))
        return found

    def _when(self, moment: Moment) -> Callable[[], datetime | None]:
        return lambda: moment.begins(self._world.reached(moment.since))

    def _is_due(self, mishap: _Mishap) -> bool:
        at = mishap.due()
        due = at is not None and at <= self._world.clock.now()
        return due and (mishap.kind != "failover" or self._nodes.can_fail_over())

    def _take(self, *kinds: str) -> _Mishap | None:
        """Take the first mishap of these kinds that is due."""
        with self._lock:
            found = next((mishap for mishap in self._mishaps if mishap.kind in kinds and self._is_due(mishap)), None)
            if found is not None:
                self._mishaps.remove(found)
        return found


def first_update(scenario: Scenario, now: datetime) -> ServiceUpdate:
    """The service update that a lab starts with, as the scenario has it."""
    how = scenario.update
    return replace(
        lab_update(now),
        severity=how.severity,
        recommended_by=now + how.recommended_by,
        ends=now + how.ends,
        automatic=how.automatic,
    )


def _number(node: str) -> int:
    return int(node.rpartition("-")[2])
