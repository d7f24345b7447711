"""ElastiCache's automation at work on real processes: :mod:`patchpilot.lab.choreography`, played in threads."""

from __future__ import annotations

import threading
from contextlib import suppress

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator, PatchpilotError
from patchpilot.lab.choreography import Choreography, Script
from patchpilot.lab.launch import HOST, Address, free_port
from patchpilot.lab.modifications import Change
from patchpilot.lab.replicas import Closing, Failover, ReplicaSet, Windows
from patchpilot.lab.scenario import CALM, Scenario
from patchpilot.lab.world import World
from patchpilot.telemetry import get_logger

_STOP_SECONDS = 30.0
# A login that no node knows: a replica that tries it is turned away by whichever primary it follows.
_LOCKED_OUT = ("masteruser", "nobody", "masterauth", "nothing")
_LET_IN = ("masteruser", "", "masterauth", "")


class Rotation:
    """The automation of one replication group, in background threads.

    :param seconds_per_node: how long the replacement of one node takes, at least; to resynchronise may take longer.
    """

    def __init__(
        self,
        world: World,
        replicas: ReplicaSet,
        *,
        windows: Windows | None = None,
        seconds_per_node: float = 3.0,
        scenario: Scenario = CALM,
        clock: Clock = SYSTEM,
    ) -> None:
        self._replicas = replicas
        self._nodes = _RealNodes(replicas, windows or Windows())
        self._clock = clock
        self._threads: list[threading.Thread] = []
        self._watcher: threading.Thread | None = None
        self.choreography = Choreography(
            world, self._nodes, replicas.name, self._run, scenario=scenario, seconds_per_node=seconds_per_node
        )

    @property
    def failovers(self) -> list[Failover]:
        """Every failover so far, in order."""
        return self._nodes.failovers

    @property
    def seconds_per_node(self) -> float:
        """How long the replacement of one node takes, at least."""
        return self.choreography.seconds_per_node

    @seconds_per_node.setter
    def seconds_per_node(self, seconds: float) -> None:
        self.choreography.seconds_per_node = seconds

    def rotate(self, update: str) -> None:
        """Apply a service update to the nodes that do not have it yet; returns at once."""
        self.choreography.rotate(update)

    def test_failover(self) -> None:
        """Fail over as TestFailover does; returns at once."""
        self.choreography.test_failover()

    def watch(self) -> None:
        """Play what the scenario has in store, when its time has come; returns at once."""
        # Not among the operations: nobody waits for what is still to come.
        self._watcher = self._start(self.choreography.watch(), "scenario")

    def modify(self, target: Change) -> None:
        """Make every node what ``target`` says; the group is `modifying` already. Returns at once."""
        self.choreography.modify(target)

    def join(self, *, seconds: float = 120.0) -> bool:
        """Wait for the operations under way, if any. False if they are not over within ``seconds``."""
        ends = self._clock.monotonic() + seconds
        for thread in tuple(self._threads):
            thread.join(max(ends - self._clock.monotonic(), 0))
        return not any(thread.is_alive() for thread in tuple(self._threads))

    def close(self) -> None:
        """Break the operations under way off, wherever they are."""
        self._replicas.close()
        if self._watcher is not None:
            self._watcher.join(_STOP_SECONDS)
        self.join(seconds=_STOP_SECONDS)

    def _run(self, script: Script, name: str) -> None:
        self._threads.append(self._start(script, name))

    def _start(self, script: Script, name: str) -> threading.Thread:
        first = next(script, None)

        def run() -> None:
            try:
                self._replicas.pause(first or 0)
                for seconds in script:
                    self._replicas.pause(seconds)
            except Closing:
                pass
            except PatchpilotError as error:
                # The statuses stay as they are: to a client this is a rotation that stalls, as a real one might.
                get_logger().error("lab.operation_failed", operation=name, error=str(error))

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread


class _RealNodes:
    """Real servers, as :class:`patchpilot.lab.choreography.Nodes`."""

    def __init__(self, replicas: ReplicaSet, windows: Windows) -> None:
        self.failovers: list[Failover] = []
        self._set = replicas
        self._windows = windows
        self._apart: set[str] = set()

    @property
    def primary(self) -> str:
        return self._set.primary.name

    @property
    def replicas(self) -> list[str]:
        return [node.name for node in self._set.replicas]

    def can_fail_over(self) -> bool:
        for node in self._set.replicas:
            with suppress(NeedsOperator):
                if node.running and node.replication().link_up:
                    return True
        return False

    def fail_over(self) -> tuple[str, str]:
        done = self._set.fail_over(self._windows)
        self.failovers.append(done)
        return done.old, done.new

    def take_down(self, node: str) -> None:
        self._set.nodes[node].stop(hard=True)

    def bring_back(self, node: str, *, synchronise: bool) -> None:
        server = self._set.nodes[node]
        if synchronise:
            self._apart.discard(node)
            self._set.rejoin(server)
            return
        self._apart.add(node)
        # At first it follows an address where nobody listens: it must not synchronise before it is locked out.
        server.start(follow=Address(HOST, free_port()))
        server.ask(lambda client: client.config_set(*_LOCKED_OUT))
        server.follow(self._set.primary.address)

    def synchronise(self, node: str) -> None:
        self._apart.discard(node)
        server = self._set.nodes[node]
        if server.running:
            server.ask(lambda client: client.config_set(*_LET_IN))

    def await_sync(self) -> None:
        for server in self._set.replicas:
            if server.running and server.name not in self._apart:
                server.await_sync(self._set.primary, seconds=60.0)
