"""The lab's simulator without its servers: the same account, API, automation and scenarios, on a fake clock.

Nodes are made of paper, and the pilot's own adapter speaks to the API without a wire. All else is what `lab up` runs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from patchpilot.clock import FakeClock
from patchpilot.elasticache import ElastiCache
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
from patchpilot.errors import Transient
from patchpilot.lab.api import Answer, Api, Fault, Params
from patchpilot.lab.background import configuration
from patchpilot.lab.choreography import Choreography, Script, first_update
from patchpilot.lab.disturbances import DisturbedApi
from patchpilot.lab.launch import Address
from patchpilot.lab.scenario import Scenario
from patchpilot.lab.world import Group as LabGroup
from patchpilot.lab.world import Member, View
from patchpilot.lab.world import World as Account
from patchpilot.recovery.findings import Remedy
from patchpilot.settings import Settings
from patchpilot.valkey.nodes import Replica, Report
from tests.crash.world import GROUP, MEMORY_NOW, NAMES, World, stuck

PORT = 6379


class PaperNodes:
    """Nodes that know who they are and whom they follow: :class:`patchpilot.lab.choreography.Nodes`."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self.primary = NAMES[0]
        self.down: set[str] = set()
        self.apart: set[str] = set()

    @property
    def replicas(self) -> list[str]:
        return [name for name in NAMES if name != self.primary]

    @property
    def in_sync(self) -> list[str]:
        return [name for name in self.replicas if name not in self.down | self.apart]

    def can_fail_over(self) -> bool:
        return bool(self.in_sync)

    def fail_over(self) -> tuple[str, str]:
        old, self.primary = self.primary, self.in_sync[0]
        self.down.add(old)
        self._world.loses_writes()
        return old, self.primary

    def take_down(self, node: str) -> None:
        self.down.add(node)

    def bring_back(self, node: str, *, synchronise: bool) -> None:
        self.down.discard(node)
        (self.apart.discard if synchronise else self.apart.add)(node)

    def synchronise(self, node: str) -> None:
        self.apart.discard(node)

    def await_sync(self) -> None:
        """Paper is quick."""


class SimulatedWorld(World):
    """The world of a scenario; of the little world it has recovery and what is stuck."""

    def __init__(self, clock: FakeClock, scenario: Scenario) -> None:
        super().__init__(clock)
        self.scenario = scenario
        self.paper = PaperNodes(self)
        self.failovers = 0
        self.account = Account(clock=clock)
        self.choreography = Choreography(self.account, self.paper, GROUP, self._run, scenario=scenario)
        self.aws = Aws(self.account, {GROUP: self.choreography}, most_rows=scenario.page_size)
        self.api = DisturbedApi(self.aws, self.account, scenario, asked=self.choreography.glance)
        self.cloud = ElastiCache(lambda _: Wire(self))  # type: ignore[arg-type, return-value]
        members = tuple(Member(name, Address(f"{name}.test", PORT), f"zone-{n}") for n, name in enumerate(NAMES))
        self.account.add_group(LabGroup(GROUP, Address(*self.address), members, NAMES[0], clock.now()))
        self.account.add_update(first_update(scenario, clock.now()))
        self.account.start()
        self._run(self.choreography.watch(), "scenario")

    def loses_writes(self) -> None:
        """Two chords get stuck by each failover: one that can be cured and one that cannot."""
        self.failovers += 1
        names = f"chord-{self.failovers}", f"odd-{self.failovers}"
        self.stick(stuck(names[0]), stuck(names[1], Remedy.NONE, "half-published"), age=timedelta())

    def _run(self, script: Script, _name: str) -> None:
        """Play a script as the clock advances."""
        pause = next(script, None)
        if pause is not None:
            self.clock.after(pause, lambda: self._run(script, _name))

    # The cloud.

    def service_updates(self) -> tuple[ServiceUpdate, ...]:
        self._trip("service_updates")
        return self.cloud.service_updates()

    def update_actions(self, group: str) -> tuple[UpdateAction, ...]:
        self._trip("update_actions")
        return self.cloud.update_actions(group)

    def group(self, group: str) -> Group:
        self._trip("group")
        return self.cloud.group(group)

    def nodes(self, group: Group) -> tuple[Node, ...]:
        return self.cloud.nodes(group)

    def events(self, sources: Collection[str], since: datetime, until: datetime) -> tuple[Event, ...]:
        self._trip("events")
        return self.cloud.events(sources, since, until)

    def in_flight(self) -> tuple[UpdateAction, ...]:
        return self.cloud.in_flight()

    def parameters(self, parameter_group: str) -> Mapping[str, str]:
        return self.cloud.parameters(parameter_group)

    def snapshots(self, group: str) -> tuple[Snapshot, ...]:
        return self.cloud.snapshots(group)

    def history(self, group: Group, until: datetime) -> tuple[Event, ...]:
        return self.cloud.history(group, until)

    def apply(self, update: str, group: str) -> Application:
        self._trip("apply")
        answer = self.cloud.apply(update, group)
        self._trip("applied")
        return answer

    def stop(self, update: str, group: str) -> Application:
        self._trip("stop")
        answer = self.cloud.stop(update, group)
        self._trip("stopped")
        return answer

    def modify(self, group: str, change: Modification) -> Application:
        self._trip("apply")
        answer = self.cloud.modify(group, change)
        self._trip("applied")
        return answer

    def test_failover(self, group: str, node_group: str) -> Application:
        self._trip("apply")
        answer = self.cloud.test_failover(group, node_group)
        self._trip("applied")
        return answer

    def node_types(self, group: str) -> tuple[str, ...]:
        return self.cloud.node_types(group)

    def engine_versions(self, engine: str) -> tuple[str, ...]:
        return self.cloud.engine_versions(engine)

    # The nodes.

    def endpoint(self) -> Report:
        return self._report(self.paper.primary)

    def member(self, host: str, port: int) -> Report:
        self._trip(host)
        return self._report(host.removesuffix(".test"))

    def _report(self, node: str) -> Report:
        if node in self.paper.down:
            raise Transient(f"{node} does not answer")
        replid, offset = f"replid-{self.failovers}", 1000 + len(self.remedies)
        if node == self.paper.primary:
            online = tuple(Replica(f"{name}.test:{PORT}", "online", offset, 0) for name in self.paper.in_sync)
            return Report("primary", offset, replid, online, memory=MEMORY_NOW)
        up = node not in self.paper.apart
        return Report("replica", offset, replid, link_up=up, silence=0 if up else None, memory=MEMORY_NOW)


class Aws(Api):
    """The API, which remembers what it was told to start."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requests: list[Answer] = []
        """The answers to BatchApplyUpdateAction, whether they arrived or not."""

    def answer(self, operation: str, params: Params, view: View | None = None) -> Answer:
        answer = super().answer(operation, params, view)
        if operation == "BatchApplyUpdateAction":
            self.requests.append(answer)
        return answer


READS = 3
"""How often botocore asks before it gives up, as our clients are set up."""


class Wire:
    """boto3's client, as far as the pilot's adapter uses it."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world

    def __getattr__(self, method: str) -> Any:
        operation = "".join(word.capitalize() for word in method.split("_"))
        return lambda **params: self._call(operation, params)

    def get_paginator(self, method: str) -> _Paginator:
        return _Paginator(getattr(self, method))

    def close(self) -> None:
        """There is nothing to close."""

    def _call(self, operation: str, params: Params) -> Answer:
        try:
            return self._persistently(operation, params)
        except Fault as fault:
            error = {"Code": fault.code, "Message": fault.message}
            about = {"HTTPStatusCode": fault.status or 400}
            raise ClientError({"Error": error, "ResponseMetadata": about}, operation) from fault  # type: ignore[typeddict-item]

    def _persistently(self, operation: str, params: Params) -> Answer:
        """As botocore does, which asks again when a read is throttled with a code that it knows; but at once."""
        for _ in range(READS - 1 if operation.startswith("Describe") else 0):
            try:
                return self._world.api.answer(operation, params)
            except Fault as fault:
                if fault.code != "Throttling":
                    raise
        return self._world.api.answer(operation, params)


class _Paginator:
    def __init__(self, ask: Any) -> None:
        self._ask = ask

    def paginate(self, *, PaginationConfig: dict[str, int], **params: Any) -> Iterator[Answer]:  # noqa: N803
        params["MaxRecords"] = PaginationConfig["PageSize"]
        while True:
            page = self._ask(**params)
            yield page
            if "Marker" not in page:
                return
            params["Marker"] = page["Marker"]


def lab_settings(scenario: Scenario) -> Settings:
    """The settings that `lab up --scenario` writes for a pilot."""
    facts = {
        "postgres": "postgresql://lab.test/lab", "region": "eu-central-1", "elasticache": "http://aws.test",
        "replication_group": GROUP, "endpoint": "redis://broker.test:6379/0",
    }  # fmt: skip
    return Settings(**tomllib.loads(configuration(facts, Path("credentials"), scenario)))
