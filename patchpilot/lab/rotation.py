"""What ElastiCache's automation does to the nodes of one group, done to real processes: rotations and failovers.

Replicas first, then the failover, then the old primary; statuses, event texts and their order as AWS documents them and
as people saw them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import PatchpilotError
from patchpilot.lab.replicas import Closing, Failover, ReplicaSet, Windows
from patchpilot.lab.servers import ValkeyNode
from patchpilot.lab.world import AVAILABLE, MODIFYING, NODE, ActionKey, NodeUpdate, UpdateAction, World
from patchpilot.telemetry import get_logger

_CLUSTER = "cache-cluster"
_GROUP = "replication-group"

# How the seconds of one node are spent: it is down for so much of them, and the next one waits for so much more.
_DOWN = 0.4
_GAP = 0.1
_STOP_SECONDS = 30.0


class Rotation:
    """The automation of one replication group: at most one operation at a time, in a background thread.

    :param seconds_per_node: how long the replacement of one node takes, at least; to resynchronise may take longer.
    """

    def __init__(
        self,
        world: World,
        replicas: ReplicaSet,
        *,
        windows: Windows | None = None,
        seconds_per_node: float = 3.0,
        clock: Clock = SYSTEM,
    ) -> None:
        self.windows = windows or Windows()
        self.seconds_per_node = seconds_per_node
        self.failovers: list[Failover] = []
        """Every failover so far, in order."""
        self._world = world
        self._replicas = replicas
        self._group = replicas.name
        self._clock = clock
        self._thread: threading.Thread | None = None

    def rotate(self, update: str) -> None:
        """Apply a service update to the nodes that do not have it yet; returns at once."""
        self._run(lambda: self._rotate((update, self._group)), f"rotation of {self._group}")

    def test_failover(self) -> None:
        """Fail over as TestFailover does; returns at once."""
        self._run(self._test_failover, f"failover of {self._group}")

    def join(self, *, seconds: float = 120.0) -> bool:
        """Wait for the operation under way, if any. False if it is not over within ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Break the operation under way off, wherever it is."""
        self._replicas.close()
        self.join(seconds=_STOP_SECONDS)

    def _run(self, operation: Callable[[], None], name: str) -> None:
        def run() -> None:
            try:
                operation()
            except Closing:
                pass
            except PatchpilotError as error:
                # The statuses stay as they are: to a client this is a rotation that stalls, as a real one might.
                get_logger().error("lab.operation_failed", operation=name, error=str(error))

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def _test_failover(self) -> None:
        self._publish(_GROUP, self._group, f"Test Failover API called for node group {NODE}")
        old = self._fail_over()
        self._recover(old, begun=self._clock.monotonic())
        self._world.change_group(self._group, status=AVAILABLE)

    def _rotate(self, key: ActionKey) -> None:
        self._replicas.pause(self.seconds_per_node * _GAP)
        if not self._stopping(key):
            self._world.change_action(key, "in-progress")
        while not self._stopping(key) and (node := self._next(key)) is not None:
            self._update(key, node)
            self._replicas.pause(self.seconds_per_node * _GAP)
        self._finish(key)

    def _update(self, key: ActionKey, node: ValkeyNode) -> None:
        begun = self._clock.monotonic()
        self._mark(key, node, "in-progress")
        if node is self._replicas.primary:
            self._fail_over()
        self._recover(node, begun=begun)
        self._mark(key, node, "complete")

    def _fail_over(self) -> ValkeyNode:
        """Promote a replica; returns the old primary, which is down."""
        done = self._replicas.fail_over(self.windows)
        self.failovers.append(done)
        self._world.change_group(self._group, primary_id=done.new)
        text = f"Failover from primary node {done.old} to replica node {done.new} completed"
        self._publish(_CLUSTER, done.new, text)
        self._publish(_GROUP, self._group, text)
        return self._replicas.nodes[done.old]

    def _recover(self, node: ValkeyNode, *, begun: float) -> None:
        """Take a replica (or an old primary) down, hold it down, and bring it back in sync."""
        self._publish(_CLUSTER, node.name, f"Recovering cache nodes {NODE}")
        self._world.change_member(self._group, node.name, status=MODIFYING)
        node.stop(hard=True)
        self._replicas.pause(self.seconds_per_node * _DOWN)
        self._replicas.rejoin(node)
        self._replicas.pause(begun + self.seconds_per_node - self._clock.monotonic())
        self._replicas.await_sync()
        self._world.change_member(self._group, node.name, status=AVAILABLE)
        self._publish(_CLUSTER, node.name, f"Finished recovery for cache nodes {NODE}")

    def _finish(self, key: ActionKey) -> None:
        def settle(row: NodeUpdate) -> NodeUpdate:
            return row if row.status == "complete" else replace(row, status="stopped", modified=self._world.now())

        complete = all(row.status == "complete" for row in self._action(key).nodes)
        self._world.change_group(self._group, status=AVAILABLE)
        self._world.change_action(key, "complete" if complete else "stopped", nodes=settle)

    def _next(self, key: ActionKey) -> ValkeyNode | None:
        """The next node to update: replicas by name, the primary of that moment last."""
        left = {row.cluster_id for row in self._action(key).nodes if row.status != "complete"}
        for node in [*self._replicas.replicas, self._replicas.primary]:
            if node.name in left:
                return node
        return None

    def _mark(self, key: ActionKey, node: ValkeyNode, status: str) -> None:
        now = self._world.now()

        def mark(row: NodeUpdate) -> NodeUpdate:
            if row.cluster_id != node.name:
                return row
            if status == "complete":
                return replace(row, status=status, ended=now, modified=now)
            return replace(row, status=status, started=now, modified=now)

        self._world.change_action(key, self._action(key).status, nodes=mark)

    def _stopping(self, key: ActionKey) -> bool:
        return self._action(key).status == "stopping"

    def _action(self, key: ActionKey) -> UpdateAction:
        return self._world.view().actions[key]

    def _publish(self, source_type: str, source: str, message: str) -> None:
        self._world.publish(source_type, source, message)
