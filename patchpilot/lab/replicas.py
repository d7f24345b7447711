"""A primary and its replicas behind one endpoint, and the failover that loses writes.

This is the part of the lab that moves real processes. What ElastiCache says about it is in :mod:`patchpilot.lab.world`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator, PatchpilotError, Unsafe
from patchpilot.lab.links import Link
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode

_SYNC_SECONDS = 60.0


class Closing(PatchpilotError):
    """The servers go down in the middle of an operation."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How a failover goes wrong."""

    write_loss: float = 0.3
    """Seconds for which the old primary takes writes after a replica was promoted: all of them are lost. With 0 the
    endpoint is closed first and the replica catches up before it is promoted, so that nothing is lost."""
    endpoint_lag: float = 0.3
    """Seconds for which the endpoint refuses connections before it leads to the new primary."""


@dataclass(frozen=True, slots=True)
class Failover:
    """What happened, and when (UTC)."""

    old: str
    new: str
    promoted: datetime
    """The replica is told to be a primary: a moment later it gets nothing any more of what the old one accepts."""
    closed: datetime
    """The old primary is down and the endpoint refuses connections."""
    moved: datetime
    """The endpoint leads to the new primary."""


class ReplicaSet:
    """Valkey nodes called NAME-001, NAME-002 ..., the first of them the primary at first, and the endpoint before them.

    :param directory: for working files and logs; it has to exist.
    :param replicas: how many nodes besides the primary.
    """

    def __init__(
        self,
        directory: Path,
        *,
        roster: Roster,
        name: str = "lab-broker",
        replicas: int = 2,
        logs: Path | None = None,
        options: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.name = name
        self._clock = clock
        self._moving = threading.Lock()
        self._closing = threading.Event()
        names = [f"{name}-{number:03d}" for number in range(1, replicas + 2)]
        self.nodes = {
            member: ValkeyNode(
                member,
                directory,
                roster=roster,
                log=(logs or directory) / f"{member}.log",
                options=options,
                clock=clock,
            )
            for member in names
        }
        self._primary = names[0]
        self.link = Link(self.primary.address)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def primary(self) -> ValkeyNode:
        """The node that the endpoint leads to, or will once a failover is over."""
        return self.nodes[self._primary]

    @property
    def replicas(self) -> list[ValkeyNode]:
        """The other nodes, by name."""
        return [node for name, node in self.nodes.items() if name != self._primary]

    @property
    def endpoint(self) -> str:
        """The URL of the primary endpoint, database 0: always the same one, wherever it leads."""
        return f"redis://{self.link.address}/0"

    def start(self) -> None:
        """Start all nodes and the endpoint; returns once every replica is in sync."""
        self.primary.start()
        for replica in self.replicas:
            replica.start(follow=self.primary.address)
        self.await_sync()
        self.link.start()

    def close(self) -> None:
        """Break off what is waiting here, in whatever thread, with :class:`Closing`. Comes before :meth:`stop`."""
        self._closing.set()

    def pause(self, seconds: float) -> None:
        """Let ``seconds`` pass.

        :raises Closing: if the set goes down meanwhile.
        """
        if self._clock.wait(self._closing, seconds):
            raise Closing(f"{self.name} goes down")

    def stop(self) -> None:
        """Stop everything, at once: nothing here is worth keeping."""
        self.link.stop()
        for node in self.nodes.values():
            node.stop(hard=True)

    def await_sync(self, *, seconds: float = _SYNC_SECONDS) -> None:
        """Wait until every running replica has what the primary has now."""
        for replica in self.replicas:
            if replica.running:
                replica.await_sync(self.primary, seconds=seconds)

    def fail_over(self, windows: Windows) -> Failover:
        """Make a replica the primary, and leave the old primary stopped; :meth:`rejoin` brings it back.

        :raises Unsafe: if there is no replica to promote, or another failover is under way.
        """
        if not self._moving.acquire(blocking=False):
            raise Unsafe(f"{self.name}: a failover is under way already")
        try:
            return self._fail_over(windows)
        finally:
            self._moving.release()

    def rejoin(self, node: ValkeyNode) -> None:
        """Bring a stopped node back, empty, as a replica; returns once it has everything."""
        node.start(follow=self.primary.address)
        node.await_sync(self.primary, seconds=_SYNC_SECONDS)

    def failover(self, windows: Windows | None = None) -> Failover:
        """One failover from beginning to end: returns when the old primary is back as a replica in sync."""
        done = self.fail_over(windows or Windows())
        self.rejoin(self.nodes[done.old])
        self.await_sync()
        return done

    def _fail_over(self, windows: Windows) -> Failover:
        old, new = self.primary, self._successor()
        lossy = windows.write_loss > 0
        if not lossy:
            self.link.refuse()
        if old.running:
            # What was acknowledged before the failover began is not what this is about: it is kept.
            new.await_sync(old, seconds=_SYNC_SECONDS)
        promoted = self._clock.now()
        new.promote()
        if lossy:
            self.pause(windows.write_loss)
            self.link.refuse()
        old.stop(hard=True)
        closed = self._clock.now()
        self._primary = new.name
        for replica in self.replicas:
            if replica.running:
                replica.follow(new.address)
        self.pause(windows.endpoint_lag)
        self.link.retarget(new.address)
        return Failover(old.name, new.name, promoted, closed, self._clock.now())

    def _successor(self) -> ValkeyNode:
        """The replica with the most of the primary's data; among equals the first by name."""
        ready: list[tuple[int, ValkeyNode]] = []
        for node in self.replicas:
            with suppress(NeedsOperator):
                state = node.replication()
                if state.link_up or not self.primary.running:
                    ready.append((state.offset, node))
        if not ready:
            raise Unsafe(f"{self.name}: no replica that is in sync could be promoted")
        return max(ready, key=lambda candidate: candidate[0])[1]
