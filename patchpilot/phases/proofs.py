"""What has to be true at the end of workers, queues and alarms, measured by what pre-flight found. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from patchpilot.elasticache.cloudwatch import Alarm, AlarmState
from patchpilot.phases.checks.situation import Situation
from patchpilot.workers.facts import Depth, Fleet, Worker

STEPS = ("task", "chord")
"""What a canary proves: that a task runs, and that a chord comes to its callback."""


@dataclass(frozen=True)
class Claim:
    """One thing that has to be true."""

    name: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Before:
    """How it was before the patch."""

    alarms_known: bool = False
    firing: frozenset[str] = frozenset()
    """Names of the alarms that fired."""
    workers: Mapping[str, str] = field(default_factory=dict)
    """Instance -> name of those that were alive."""
    excused: frozenset[str] = frozenset()
    """Instances that could not be proven then either, and somebody waived that."""
    idle: frozenset[str] = frozenset()
    """Queues that held messages and that nobody consumed."""
    consumed: frozenset[str] = frozenset()
    """Queues that somebody consumed."""

    @classmethod
    def of(cls, readiness: Mapping[str, Any]) -> Self:
        """Read what pre-flight left on record."""
        note = readiness.get("before", {})
        waived = {check["name"] for check in readiness.get("checks", ()) if check.get("waived")}
        return cls(
            alarms_known=note.get("alarms_known", False),
            firing=frozenset(note.get("firing", ())),
            workers=note.get("workers", {}),
            excused=frozenset(note.get("doubtful", ()) if "workers" in waived else ()),
            idle=frozenset(note.get("idle", ())),
            consumed=frozenset(note.get("consumed", ())),
        )


def before(at: Situation) -> dict[str, Any]:
    """What to leave on record for :meth:`Before.of`."""
    fleet = at.fleet if isinstance(at.fleet, Fleet) else Fleet()
    alarms = () if isinstance(at.alarms, str) else at.alarms
    consumed = _consumers(fleet)
    return {
        "alarms_known": not isinstance(at.alarms, str),
        "firing": [alarm.name for alarm in alarms if alarm.state == AlarmState.ALARM],
        "workers": {worker.instance: worker.name for worker in fleet.workers},
        "doubtful": [worker.instance for worker in fleet.workers if not can_prove(worker)],
        "idle": [depth.queue for depth in fleet.queues if depth.length and depth.queue not in consumed],
        "consumed": sorted(consumed),
    }


def can_prove(worker: Worker) -> bool:
    """Whether a canary can be sent to it."""
    return worker.answers and worker.canary


@dataclass(frozen=True)
class Workplace:
    """The workers at the end, and what was sent to them."""

    fleet: Fleet
    before: Before = field(default_factory=Before)
    sent: Mapping[str, str] = field(default_factory=dict)
    """Instance -> the token of the canaries sent to it."""
    first: Mapping[str, Depth] = field(default_factory=dict)
    """The first look at the queues."""

    @property
    def judged(self) -> tuple[Worker, ...]:
        """Every worker but those that are excused."""
        return tuple(worker for worker in self.fleet.workers if worker.instance not in self.before.excused)


def worker_claims(at: Workplace) -> tuple[Claim, ...]:
    """Every worker answers, every worker consumes, and no queue is left lying."""
    return _answer(at), _consume(at), _drain(at)


def _answer(at: Workplace) -> Claim:
    silent = [f"{worker.name} is alive and does not answer" for worker in at.judged if not worker.answers]
    workers = at.fleet.workers
    here = {worker.instance for worker in workers} | {worker.name for worker in workers}
    gone = [name for instance, name in at.before.workers.items() if not {instance, name} & here]
    lost = ["none of the workers from before the patch is left"] if gone and not workers else []
    told = [f"of {len(at.before.workers)} from before the patch these are gone: {', '.join(gone)}"] if gone else []
    answering = sum(worker.answers for worker in workers)
    evidence = "; ".join([f"{answering} of {len(workers)} workers answer", *silent, *lost, *told, *_excuses(at)])
    return Claim("workers-answer", not (silent or lost), evidence)


def _excuses(at: Workplace) -> Iterator[str]:
    for worker in at.fleet.workers:
        if worker.instance in at.before.excused:
            yield f"{worker.name} is not judged: it could not be asked before the patch either, which was waived"


def _consume(at: Workplace) -> Claim:
    answering = [worker for worker in at.judged if worker.answers]
    faults = [fault for worker in answering for fault in _faults(worker, at.sent.get(worker.instance))]
    proven = {step: sum(_came_back(worker, at.sent, step) for worker in answering) for step in STEPS}
    counted = ", ".join(
        f"the canary {step} came back from {proven[step]} of {len(answering)} workers" for step in STEPS
    )
    return Claim("workers-consume", not faults, "; ".join([counted, *faults]))


def _faults(worker: Worker, token: str | None) -> Iterator[str]:
    """Why it is not proven that ``worker`` consumes."""
    if not worker.canary:
        yield f"{worker.name} consumes no canary queue: its patchpilot is another version"
        return
    if not worker.queues:
        yield f"{worker.name} consumes none of the application's queues"
    missing = [step for step in STEPS if token is None or worker.proof.get(step) != token]
    if missing:
        yield f"{worker.name} did not run the canary {' and '.join(missing)} ({_load(worker)})"


def _load(worker: Worker) -> str:
    running = ", ".join(f"{name} x{number}" for name, number in sorted(worker.running.items()))
    of = f" of {worker.processes}" if worker.processes else ""
    return f"{sum(worker.running.values())}{of} processes busy{': ' if running else ''}{running}"


def is_proven(worker: Worker, sent: Mapping[str, str]) -> bool:
    """Whether all of its canaries came back."""
    return all(_came_back(worker, sent, step) for step in STEPS)


def _came_back(worker: Worker, sent: Mapping[str, str], step: str) -> bool:
    return worker.instance in sent and worker.proof.get(step) == sent[worker.instance]


def _drain(at: Workplace) -> Claim:
    """Each queue that holds messages shrinks, or a worker that is proven to consume consumes it."""
    consumers = _consumers(at.fleet)
    faults, told = [], []
    for depth in at.fleet.queues:
        first, takers = at.first.get(depth.queue), consumers.get(depth.queue, [])
        line = f"{depth.queue} {_numbers(first, depth)}"
        taken = _is_taken(first, depth) or any(is_proven(worker, at.sent) for worker in takers)
        if not takers and depth.queue in at.before.consumed:
            faults.append(f"{line}: it was consumed before the patch, and nobody does now")
        elif depth.length and not taken and depth.queue not in at.before.idle:
            who = ", ".join(worker.name for worker in takers) or "nobody"
            faults.append(f"{line}: {who} consumes it, and takes nothing")
        elif depth.length:
            told.append(line)
    quiet = f"{len(at.fleet.queues)} queue(s) looked at twice"
    return Claim("queues-drain", not faults, "; ".join([quiet, *faults, *told]))


def _numbers(first: Depth | None, now: Depth) -> str:
    return f"held {first.length} messages, then {now.length}" if first else f"holds {now.length} messages"


def _is_taken(first: Depth | None, now: Depth) -> bool:
    """Whether messages left the queue between the two looks: it shrank, or others are next in turn now."""
    return first is not None and first.length > 0 and (now.length < first.length or now.oldest != first.oldest)


def _consumers(fleet: Fleet) -> dict[str, list[Worker]]:
    """Who consumes each queue."""
    found: dict[str, list[Worker]] = {}
    for worker in fleet.workers:
        for queue in worker.queues:
            found.setdefault(queue, []).append(worker)
    return found


def alarm_claim(alarms: tuple[Alarm, ...] | str, earlier: Before) -> Claim | None:
    """No alarm fires that did not fire before the patch.

    :returns: None if the alarms could not be read before the patch either: somebody has answered for that.
    """
    if isinstance(alarms, str):
        return Claim("alarms-quiet", False, alarms) if earlier.alarms_known else None
    firing = [alarm for alarm in alarms if alarm.state == AlarmState.ALARM]
    new = [f"{alarm.name} is firing: {alarm.reason}" for alarm in firing if alarm.name not in earlier.firing]
    old = [f"{alarm.name} fired before the patch already" for alarm in firing if alarm.name in earlier.firing]
    return Claim("alarms-quiet", not new, "; ".join([f"{len(firing)} of {len(alarms)} alarms fire", *new, *old]))
