"""A small, faithful world for the runbook, in memory: a cloud that rotates nodes as time passes, nodes, recovery.

It follows what AWS documents: replicas first, then a failover, then the old primary; statuses node by node; each
failover event twice, once for the group and once for the node; answers that may be stale; no idempotency of the
request to apply.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from patchpilot.clock import FakeClock
from patchpilot.elasticache.cloudwatch import LAG, MEMORY, Alarm, AlarmState, Metric
from patchpilot.elasticache.facts import (
    IN_FLIGHT,
    Application,
    Event,
    Group,
    Member,
    Modification,
    Node,
    NodeUpdate,
    ServiceUpdate,
    Snapshot,
    Unprocessed,
    UpdateAction,
    UpdateStatus,
)
from patchpilot.engine.journal import Journal
from patchpilot.engine.requests import Ask, Request
from patchpilot.phases import Desk
from patchpilot.phases.order import Order
from patchpilot.postgres.journal import Run
from patchpilot.recovery.findings import Applied, Finding, Remedy, Window
from patchpilot.report import Files
from patchpilot.settings import Role, Runbook
from patchpilot.valkey.nodes import Memory, Replica, Report
from patchpilot.workers import Depth, Fleet, Worker

GROUP = "shop-broker"
NAMES = ("shop-broker-001", "shop-broker-002", "shop-broker-003")
UPDATE = "elasticache-20260101-001"
MEMORY_NOW = Memory(20, 100, "noeviction")
PER_NODE = timedelta(minutes=10)
PARAMETERS = {"maxmemory-policy": "noeviction", "reserved-memory-percent": "25", "close-on-replica-write": "yes"}
SETTINGS: dict[str, object] = {
    "broker_channel_error_retry": True, "broker_connection_retry": True, "broker_connection_max_retries": None,
    "task_acks_late": True, "task_reject_on_worker_lost": True, "worker_prefetch_multiplier": 1,
    "broker_transport_options.socket_timeout": 10, "broker_transport_options.health_check_interval": 5,
}  # fmt: skip
"""As a worker should be set up."""

# The grace is longer than the old primary takes, so that some of it is left when the rotation is over.
RUNBOOK = Runbook(
    grace=timedelta(minutes=20),
    poll_interval=timedelta(seconds=15),
    settle=timedelta(minutes=1),
    stall=timedelta(hours=2),
    verify_timeout=timedelta(minutes=5),
)


@dataclass
class State:
    """What AWS knows of the group at one moment."""

    status: str = "available"
    primary: str = NAMES[0]
    update: str = UpdateStatus.NOT_APPLIED
    modified: datetime | None = None
    """When ``update`` last changed."""
    nodes: dict[str, NodeUpdate] = field(
        default_factory=lambda: {name: NodeUpdate(name, UpdateStatus.NOT_APPLIED) for name in NAMES}
    )
    events: tuple[Event, ...] = ()
    versions: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NAMES, "8.0.1"))
    node_type: str = "cache.r7g.large"

    def copy(self) -> State:
        return replace(self, nodes=dict(self.nodes), versions=dict(self.versions))


class World:
    """The cloud, the nodes and what is stuck, on one fake clock.

    :param stale: seconds for which the cloud's answers lag behind what is so.
    :param per_node: how long one node takes.
    """

    def __init__(self, clock: FakeClock, *, stale: float = 0, per_node: timedelta = PER_NODE) -> None:
        self.clock = clock
        self.stale = stale
        self.per_node = per_node
        self.dice: random.Random | None = None
        """If set, each answer is as old as it falls: an answer may then be older than the one before."""
        self.now = State()
        self.applied: list[datetime] = []
        """When BatchApplyUpdateAction reached the cloud; or whatever else starts an operation."""
        self.initiator = "customer"
        self.tells_of_failovers = True
        self.behind = timedelta()
        """How far the cloud's clock, which dates events and answers, is behind ours; below zero, ahead."""
        self.dates_behind = timedelta()
        """How far its events are dated behind that clock."""
        self.fails_over = True
        self.surprises: dict[str, list[BaseException | Callable[[], object]]] = {}
        """What happens in the next call of that name: ``apply`` before and ``applied`` after it took effect."""
        self.unprocessed: Unprocessed | None = None
        self.updates = [service_update(clock)]
        self.group_changes: dict[str, object] = {}
        self.stuck: dict[str, Finding] = {}
        self.stuck_since: dict[str, datetime] = {}
        self.remedies: list[tuple[str | None, Applied]] = []
        self.requests: list[Request] = []
        """What people have asked of the run."""
        self.plans: dict[str, dict[str, object]] = {}
        self.stops: list[datetime] = []
        """When BatchStopUpdateAction reached the cloud."""
        self.gauge: tuple[tuple[datetime, float], ...] = ()
        """What the metric that can stop a rotation measured, and when; newest first."""
        self.repeated: list[tuple[datetime, dict[str, object]]] = []
        """Callbacks that were started again, and when."""
        self.alarms_now = [Alarm(f"{GROUP}-{name}", AlarmState.OK, tells=True) for name in (MEMORY, LAG)]
        self.fleet = [worker(name) for name in ("celery@one", "celery@two")]
        self.lengths: dict[str, int] = {"celery": 0}
        """How many messages are in each queue; the workers take one a second."""
        self.canaries: dict[str, str] = {}
        """The canaries that are on their way: instance -> token."""
        self.caught = 0
        """How many times canaries were tidied away."""
        self._history: list[tuple[datetime, State]] = [(clock.now(), self.now.copy())]

    # The cloud: patchpilot.phases.desk.Cloud.

    def service_updates(self) -> tuple[ServiceUpdate, ...]:
        self._trip("service_updates")
        return tuple(self.updates)

    def update_actions(self, group: str) -> tuple[UpdateAction, ...]:
        self._trip("update_actions")
        shown = self._shown()
        done = sum(node.status == UpdateStatus.COMPLETE for node in shown.nodes.values())
        return (
            UpdateAction(
                group=group,
                update=UPDATE,
                status=shown.update,
                update_status="available",
                nodes=tuple(shown.nodes.values()),
                nodes_updated=f"{done}/{len(shown.nodes)}",
                sla_met="yes" if shown.update == UpdateStatus.COMPLETE else "no",
                modified=shown.modified,
            ),
        )

    def group(self, group: str) -> Group:
        self._trip("group")
        shown = self._shown()
        members = tuple(
            Member(name, "primary" if name == shown.primary else "replica", f"{name}.test", 6379, f"zone-{number}")
            for number, name in enumerate(NAMES)
        )
        about = Group(
            group, shown.status, members, (shown.status,), ("0001",), "enabled", "enabled", cluster_enabled=False,
            engine="valkey", node_type=shown.node_type, effective_durability="disabled", snapshot_window="18:00-19:00",
            endpoint=("broker.test", 6379), answered=self.clock.now() - self.behind,
            heard=self.clock.now(),
        )  # fmt: skip
        return replace(about, **self.group_changes)  # type: ignore[arg-type]

    def nodes(self, group: Group) -> tuple[Node, ...]:
        self._trip("nodes")
        shown = self._shown()
        return tuple(
            Node(
                member.node, "available", shown.versions[member.node], (), "sun:03:00-sun:04:00", "shop", "in-sync",
                engine="valkey", node_type=shown.node_type,
            )
            for member in group.members
        )  # fmt: skip

    def in_flight(self) -> tuple[UpdateAction, ...]:
        self._trip("in_flight")
        return tuple(action for action in self.update_actions(GROUP) if action.status in IN_FLIGHT)

    def parameters(self, parameter_group: str) -> Mapping[str, str]:
        self._trip("parameters")
        return PARAMETERS

    def snapshots(self, group: str) -> tuple[Snapshot, ...]:
        self._trip("snapshots")
        return (Snapshot("automatic", "available", "automated", self.clock.now() - timedelta(hours=3)),)

    def history(self, group: Group, until: datetime) -> tuple[Event, ...]:
        self._trip("history")
        return self._shown().events

    def events(self, sources: Collection[str], since: datetime, until: datetime) -> tuple[Event, ...]:
        self._trip("events")
        return tuple(e for e in self._shown().events if since <= e.at <= until and e.source in sources)

    def apply(self, update: str, group: str) -> Application:
        assert (update, group) == (UPDATE, GROUP)
        self._trip("apply")
        self.applied.append(self.clock.now())
        if self.unprocessed:
            return Application(None, self.unprocessed)
        assert self.now.update in {UpdateStatus.NOT_APPLIED, UpdateStatus.STOPPED, UpdateStatus.SCHEDULED}
        self.start()
        self._trip("applied")
        return Application(UpdateStatus.WAITING_TO_START)

    def stop(self, update: str, group: str) -> Application:
        assert (update, group) == (UPDATE, GROUP)
        self._trip("stop")
        self.stops.append(self.clock.now())
        if self.unprocessed:
            return Application(None, self.unprocessed)
        if self.now.update not in {UpdateStatus.WAITING_TO_START, UpdateStatus.IN_PROGRESS}:
            return Application(None, Unprocessed("InvalidUpdateActionState", f"it is {self.now.update}"))
        self.change(update=UpdateStatus.STOPPING)
        self._trip("stopped")
        return Application(UpdateStatus.STOPPING)

    def modify(self, group: str, change: Modification) -> Application:
        self._trip("apply")
        self.applied.append(self.clock.now())
        assert self.now.status == "available"
        moment = timedelta(seconds=30)
        self.change(status="modifying")
        for name in [*NAMES[1:], NAMES[0]]:
            if name == NAMES[0]:
                self.after(moment, lambda: self.fail_over(NAMES[1]))
            moment += self.per_node
            self.after(moment, lambda name=name: self._give(name, change))  # type: ignore[misc]
        self.after(moment, lambda: self.change(status="available"))
        self._trip("applied")
        return Application("modifying")

    def test_failover(self, group: str, node_group: str) -> Application:
        assert (group, node_group) == (GROUP, "0001")
        self._trip("apply")
        self.applied.append(self.clock.now())
        assert self.now.status == "available"
        self.change(status="modifying")
        self.happen(GROUP, "Test Failover API called for node group 0001")
        self.after(timedelta(seconds=90), lambda: self.fail_over(NAMES[1]))
        self.after(timedelta(seconds=90) + self.per_node, lambda: self.change(status="available"))
        self._trip("applied")
        return Application("modifying")

    def node_types(self, group: str) -> tuple[str, ...]:
        return ("cache.r7g.large", "cache.r7g.xlarge")

    def engine_versions(self, engine: str) -> tuple[str, ...]:
        self._trip("engine_versions")
        return ("8.0", "8.1")

    def newest(self, now: datetime, since: datetime | None = None) -> tuple[float, ...]:
        self._trip("gauge")
        return tuple(value for at, value in self.gauge if since is None or at >= since)

    def measure(self, *values: float) -> None:
        """The gauge shows these, newest first, all of this moment."""
        self.gauge = tuple((self.clock.now(), value) for value in values)

    # CloudWatch: patchpilot.phases.desk.Monitoring.

    def alarms(self, about: Collection[str]) -> tuple[Alarm, ...]:
        self._trip("alarms")
        return tuple(self.alarms_now)

    def metrics(self, nodes: Collection[str], until: datetime) -> tuple[Metric, ...]:
        self._trip("metrics")
        return tuple(Metric(MEMORY, node, 20.0, until) for node in nodes)

    # The nodes: patchpilot.phases.desk.Nodes.

    address = ("broker.test", 6379)

    def endpoint(self) -> Report:
        self._trip("endpoint")
        offset = 1000 + len(self.remedies)
        replicas = tuple(Replica(f"{name}:6379", "online", offset, 0) for name in NAMES if name != self.now.primary)
        return Report("primary", offset, replicas=replicas, memory=MEMORY_NOW)

    def member(self, host: str, port: int) -> Report:
        self._trip(host)
        if host == f"{self.now.primary}.test":
            return self.endpoint()
        return Report("replica", 1000, link_up=True, silence=0, memory=MEMORY_NOW)

    # Recovery: patchpilot.phases.desk.Recovery.

    def survey(self, window: Window) -> tuple[Finding, ...]:
        self._trip("survey")
        ages = {name: self.clock.now() - self.stuck_since[name] for name in self.stuck}
        found = (replace(finding, age=ages[name]) for name, finding in self.stuck.items())
        return tuple(finding for finding in found if window.min_age <= finding.age <= window.max_age)

    def recover(self, window: Window, *, run_id: str | None = None) -> tuple[Applied, ...]:
        cured: list[Applied] = []
        for finding in self.survey(window):
            if not finding.curable:
                continue
            self._trip("recover")
            del self.stuck[finding.id]
            remedy = Applied(
                self.clock.now(), finding.kind, finding.id, finding.diagnosis, str(finding.remedy), finding.reason
            )
            self.remedies.append((run_id, remedy))
            cured.append(remedy)
        return tuple(cured)

    def applied_for(self, run_id: str) -> tuple[Applied, ...]:
        return tuple(remedy for run, remedy in self.remedies if run == run_id)

    def repeated_starts(self, age: timedelta) -> list[dict[str, object]]:
        return [row for at, row in self.repeated if at >= self.clock.now() - age]

    # What people do.

    def ask(self, ask: Ask, *, digest: str | None = None, reason: str = "") -> None:
        self.requests.append(Request(ask, "ann on laptop", self.clock.now(), reason, digest))

    # The workers: patchpilot.phases.desk.Workers.

    def look(self, queues: Collection[str] = ()) -> Fleet:
        self._trip("look")
        names = sorted({*self.lengths, *queues})
        depths = [Depth(name, length, str(length)) for name in names if (length := self.lengths.get(name, 0)) >= 0]
        return Fleet(tuple(self.fleet), tuple(depths))

    def release(self, to: Mapping[str, str]) -> dict[str, str]:
        self._trip("release")
        sent = {instance: f"token-{self.clock.monotonic():g}" for instance in to}
        self.canaries |= sent
        self.clock.after(2, lambda: self._come_back(sent))
        self._trip("released")
        return sent

    def tidy(self, sent: Mapping[str, str]) -> None:
        self._trip("tidy")
        self.canaries = {key: token for key, token in self.canaries.items() if sent.get(key) != token}
        self.caught += 1

    def _come_back(self, sent: Mapping[str, str]) -> None:
        """Each canary that was not tidied away, from each worker that answers and runs nothing."""
        for number, each in enumerate(self.fleet):
            token = sent.get(each.instance)
            if token and self.canaries.get(each.instance) == token and each.answers and not each.running:
                del self.canaries[each.instance]
                self.fleet[number] = replace(each, proof={"task": token, "chord": token})

    # What happens by itself.

    def start(self) -> None:
        """Begin the rotation: as AWS does when asked, or by itself."""
        self.change(update=UpdateStatus.WAITING_TO_START, status="modifying")
        moment = timedelta(seconds=30)
        self.after(moment, lambda: self._unless_stopped(lambda: self.change(update=UpdateStatus.IN_PROGRESS)))
        for name in NAMES[1:]:
            moment = self._patch(name, moment)
        if self.fails_over:
            self.after(moment, lambda: self._unless_stopped(lambda: self.fail_over(NAMES[1])))
        moment = self._patch(NAMES[0], moment + timedelta(seconds=1))
        self.after(moment, lambda: self._finish(UpdateStatus.COMPLETE))

    def fail_over(self, new: str) -> None:
        """Promote a replica, and get two chords stuck by it: one that can be cured and one that cannot."""
        old = self.now.primary
        self.change(primary=new)
        if self.tells_of_failovers:
            for source in (GROUP, new):
                self.happen(source, f"Failover from primary node {old} to replica node {new} completed")
        number = len(self.stuck) + len(self.remedies)
        self.stick(stuck(f"chord-{number}"), stuck(f"odd-{number}", Remedy.NONE, "half-published"), age=timedelta())

    def stick(self, *findings: Finding, age: timedelta = timedelta(hours=1)) -> None:
        self.stuck |= {finding.id: finding for finding in findings}
        self.stuck_since |= {finding.id: self.clock.now() - age for finding in findings}

    def happen(self, source: str, message: str) -> None:
        self.change(
            events=(*self.now.events, Event(self.clock.now() - self.behind - self.dates_behind, source, message))
        )

    def change(self, **what: object) -> None:
        for name, value in what.items():
            assert hasattr(self.now, name)
            setattr(self.now, name, value)
        if "update" in what:
            self.now.modified = self.clock.now()
        self._history.append((self.clock.now(), self.now.copy()))

    def after(self, time: timedelta, change: Callable[[], None]) -> None:
        self.clock.after(time.total_seconds(), change)

    def _give(self, name: str, change: Modification) -> None:
        if change.engine_version:
            self.change(versions={**self.now.versions, name: change.engine_version})
        if change.node_type and name == NAMES[0]:
            self.change(node_type=change.node_type)

    def _unless_stopped(self, go_on: Callable[[], object]) -> None:
        """What is in progress is finished; after that nothing more is begun, and the action ends as stopped."""
        if self.now.update in {UpdateStatus.STOPPING, UpdateStatus.STOPPED}:
            self._finish(UpdateStatus.STOPPED)
        else:
            go_on()

    def _finish(self, status: str) -> None:
        if self.now.update == UpdateStatus.STOPPED:
            return
        if status == UpdateStatus.STOPPED:
            left = {name: row for name, row in self.now.nodes.items() if row.status != UpdateStatus.COMPLETE}
            rows = {name: replace(row, status=UpdateStatus.STOPPED) for name, row in left.items()}
            self.change(nodes={**self.now.nodes, **rows})
        self.change(update=status, status="available")

    def _patch(self, name: str, begins: timedelta) -> timedelta:
        def begin() -> None:
            self._unless_stopped(start)

        def start() -> None:
            row = NodeUpdate(
                name, UpdateStatus.IN_PROGRESS, started=self.clock.now(), initiated_by=self.initiator,
                initiated=self.applied[0] if self.applied else self.clock.now(),
            )  # fmt: skip
            self.change(nodes={**self.now.nodes, name: row})
            self.happen(name, "Recovering cache nodes 0001")

        def end() -> None:
            if self.now.nodes[name].status != UpdateStatus.IN_PROGRESS:
                return
            row = replace(self.now.nodes[name], status=UpdateStatus.COMPLETE, ended=self.clock.now())
            self.change(nodes={**self.now.nodes, name: row})
            self.happen(name, "Finished recovery for cache nodes 0001")

        self.after(begins, begin)
        self.after(begins + self.per_node, end)
        return begins + self.per_node

    def _shown(self) -> State:
        """What the cloud shows now: the newest state that is old enough."""
        age = self.dice.uniform(0, self.stale) if self.dice else self.stale
        visible = self.clock.now() - timedelta(seconds=age)
        return next((state for at, state in reversed(self._history) if at <= visible), self._history[0][1])

    def _trip(self, name: str) -> None:
        if not self.surprises.get(name):
            return
        surprise = self.surprises[name].pop(0)
        if isinstance(surprise, BaseException):
            raise surprise
        surprise()


class Recovery:
    """The world's recovery under the names of :class:`patchpilot.phases.desk.Recovery`."""

    def __init__(self, world: World) -> None:
        self.survey, self.recover, self.applied = world.survey, world.recover, world.applied_for
        self.repeated_starts = world.repeated_starts


def desk(
    world: World, journal: Journal, directory: Path, *, role: Role = "broker", runbook: Runbook = RUNBOOK,
    window: Window | None = None, update: str | None = None, schema: str | None = None, order: Order | None = None,
    waivers: Mapping[str, str] | None = None,
) -> Desk:  # fmt: skip
    """The pilot's desk in this world."""
    broker = role == "broker"
    run = Run(journal.run_id, "test", "broker", datetime.min.replace(tzinfo=UTC))
    return Desk(
        cluster="broker",
        group=GROUP,
        role=role,
        cloud=world,
        monitoring=world,
        workers=world if broker else None,
        nodes=world if broker else None,
        recovery=Recovery(world) if broker else None,
        reports=Files(journal, run, directory),
        schema=lambda: schema,
        runbook=runbook,
        window=window or Window(),
        order=order or Order(update=update),
        requests=lambda: tuple(world.requests),
        recall=world.plans.get,
        gauge=world if runbook.abort_metric else None,
        waivers=waivers or {},
    )


def worker(name: str, **change: Any) -> Worker:
    """A worker in good health."""
    good = Worker(
        f"instance of {name}", name, answers=True, queues=("celery",), canary=True, processes=2,
        broker=("broker.test", 6379), settings=SETTINGS,
    )  # fmt: skip
    return replace(good, **change)


def service_update(clock: FakeClock) -> ServiceUpdate:
    now = clock.now()
    return ServiceUpdate(
        UPDATE, "available", "important", "security-update", "valkey", "A security update", "10 minutes per node",
        released=now - timedelta(days=3), recommended_by=now + timedelta(days=27), ends=now + timedelta(days=90),
        automatic=False,
    )  # fmt: skip


def stuck(name: str, remedy: Remedy = Remedy.DISPATCH_CALLBACK, diagnosis: str = "callback-lost") -> Finding:
    reason = "every part has returned and the callback is nowhere"
    return Finding("chord", name, diagnosis, remedy, reason, "shop.total")
