"""A lab inside this process: PostgreSQL, a replicated Valkey behind an endpoint, and the ElastiCache API on top.

For a lab that runs in the background, as `patchpilot lab up` starts it, see :mod:`patchpilot.lab.background`.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import Unsafe, Usage
from patchpilot.lab import monitoring
from patchpilot.lab.choreography import first_update
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.replicas import Failover, ReplicaSet, Windows
from patchpilot.lab.roster import Roster
from patchpilot.lab.rotation import Rotation
from patchpilot.lab.scenario import CALM, Scenario
from patchpilot.lab.servers import Postgres
from patchpilot.lab.world import Group, Member, Snapshot, World

GROUP = "lab-broker"
REGION = "eu-central-1"
_ZONES = "abc"


class Lab:
    """Everything that a run of the pilot needs, on free loopback ports.

    :param directory: for data and logs; made if it is missing.
    :param roster: where the processes are written down; `directory/roster.json` by default.
    :param scenario: what goes wrong.
    :param postgres: whether to start PostgreSQL too.
    :raises Usage: if the scenario is about a node that this lab has not.
    """

    def __init__(
        self,
        directory: Path,
        *,
        replicas: int = 2,
        write_loss_ms: int = 300,
        endpoint_lag_ms: int = 300,
        seconds_per_node: float = 3.0,
        scenario: Scenario = CALM,
        postgres: bool = True,
        roster: Roster | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        logs, data = directory / "logs", directory / "data"
        for needed in (directory, logs, data):
            needed.mkdir(parents=True, exist_ok=True)
        if scenario.highest_node > replicas + 1:
            raise Usage(f"the scenario is about node {scenario.highest_node}, and the lab has only {replicas + 1}")
        self.directory = directory
        self.scenario = scenario
        self.roster = roster or Roster(directory / "roster.json")
        self.calls = directory / "calls.jsonl"
        self.postgres = Postgres(data, roster=self.roster, log=logs / "postgres.log", clock=clock) if postgres else None
        self.replicas = ReplicaSet(data, roster=self.roster, name=GROUP, replicas=replicas, logs=logs, clock=clock)
        self.world = World(region=REGION, clock=clock)
        self.rotation = Rotation(
            self.world,
            self.replicas,
            windows=Windows(write_loss_ms / 1000, endpoint_lag_ms / 1000),
            seconds_per_node=seconds_per_node,
            scenario=scenario,
            clock=clock,
        )
        self.cloud = Cloud(
            self.world,
            {GROUP: self.rotation},
            calls=self.calls,
            scenario=scenario,
            asked=self.rotation.choreography.glance,
        )
        self._running = ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The URL of the primary endpoint, database 0."""
        return self.replicas.endpoint

    @property
    def dsn(self) -> str:
        """The DSN of PostgreSQL.

        :raises Unsafe: if this lab has none.
        """
        if self.postgres is None:
            raise Unsafe("this lab was started without PostgreSQL")
        return self.postgres.dsn

    def start(self) -> None:
        """Start everything; returns once all of it answers and the replicas are in sync."""
        with ExitStack() as starting:
            self.calls.write_text("", encoding="utf-8")
            if self.postgres is not None:
                starting.callback(self.postgres.discard)
                self.postgres.start()
            starting.callback(self.replicas.stop)
            self.replicas.start()
            self._populate()
            starting.callback(self.cloud.stop)
            self.cloud.start()
            nodes = list(self.replicas.nodes)
            monitoring.watch(self.cloud.url, REGION, self.world.account, GROUP, nodes, self.world.clock)
            starting.callback(self.rotation.close)
            self.rotation.watch()
            self._running = starting.pop_all()

    def stop(self) -> None:
        """Stop everything, in the middle of a rotation too."""
        self._running.close()

    def failover(self) -> Failover:
        """One failover with the lab's windows, as TestFailover does it, from beginning to end.

        :raises Unsafe: if the group is in the middle of something, or the failover got stuck.
        """
        before = len(self.rotation.failovers)
        if not self.world.claim(GROUP):
            raise Unsafe(f"{GROUP} is in the middle of something else")
        self.rotation.test_failover()
        if not self.rotation.join() or len(self.rotation.failovers) == before:
            raise Unsafe(f"{GROUP}: the failover got stuck")
        return self.rotation.failovers[-1]

    def _populate(self) -> None:
        info: dict[str, Any] = self.replicas.primary.ask(lambda client: client.info("server"))
        members = tuple(
            Member(name, node.address, f"{REGION}{_ZONES[position % len(_ZONES)]}")
            for position, (name, node) in enumerate(self.replicas.nodes.items())
        )
        now = self.world.now()
        self.world.add_group(
            Group(
                group_id=GROUP,
                endpoint=self.replicas.link.address,
                members=members,
                primary_id=self.replicas.primary.name,
                created=now,
                engine_version=".".join(str(info["valkey_version"]).split(".")[:2]),
                # Whenever a lab starts: neither window is near, and there is a snapshot of not long ago.
                maintenance_window=_hour(now + timedelta(hours=84), "%a:%H:%M"),
                snapshot_window=_hour(now + timedelta(hours=12), "%H:%M"),
                snapshots=(Snapshot(f"automatic.{GROUP}", now - timedelta(hours=1)),),
            )
        )
        self.world.add_update(first_update(self.scenario, now))


def _hour(begin: datetime, form: str) -> str:
    """The hour from ``begin`` on, as AWS writes a window."""
    return "-".join(f"{moment:{form}}".lower() for moment in (begin, begin + timedelta(hours=1)))
