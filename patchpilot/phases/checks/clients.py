"""Checks of what lives on the broker: workers, their settings, chords, and our own tables. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from patchpilot.phases.checks.data import node_at
from patchpilot.phases.checks.situation import Judgement, Row, Situation, Verdict, prefer, require, unknown
from patchpilot.phases.cures import counts
from patchpilot.workers.facts import Fleet, Worker

NO_BROKER = "no broker: there are no workers, and no chords"


@dataclass(frozen=True)
class Setting:
    """One setting of a worker that matters for a failover."""

    name: str
    good: Callable[[Any], bool]
    wanted: str
    """For a person: what is good, and what happens otherwise."""


SETTINGS: tuple[Setting, ...] = (
    Setting("broker_channel_error_retry", bool, "True, or the worker exits when its node is demoted"),
    Setting("broker_connection_retry", bool, "True, or the worker exits when the connection is lost"),
    Setting("broker_connection_max_retries", lambda value: value is None or value == 0 or value >= 100,
            "None or at least 100, or the worker gives up during the failover"),
    Setting("task_acks_late", bool, "True, or a task dies with the worker that runs it"),
    Setting("task_reject_on_worker_lost", bool, "True, or a task dies with the process that runs it"),
    Setting("worker_prefetch_multiplier", lambda value: value == 1, "1: fewer messages in a worker's hands"),
    Setting("broker_transport_options.socket_timeout", lambda value: bool(value) and value <= 30,
            "up to 30 s, or a half-open connection hangs for minutes"),
    Setting("broker_transport_options.health_check_interval", lambda value: bool(value) and value <= 10,
            "up to 10 s, or a lost connection is noticed late"),
)  # fmt: skip
"""What of a worker's answer is judged: see ``patchpilot.backend.about``."""


def _workers(at: Situation) -> Judgement:
    if not isinstance(at.fleet, Fleet):
        return (Verdict.PASS, NO_BROKER) if at.fleet is None else unknown(at.fleet)
    workers = at.fleet.workers
    if not workers:
        return Verdict.WARN, "no worker gives a sign of life: nothing will prove at the end that tasks run"
    if doubts := list(_doubts(workers)):
        return unknown("; ".join(doubts))
    listed = ", ".join(f"{worker.name} ({', '.join(worker.queues) or 'no queue'})" for worker in workers)
    return prefer(all(worker.queues for worker in workers), f"{len(workers)} worker(s) answer: {listed}")


def _doubts(workers: tuple[Worker, ...]) -> Iterator[str]:
    for worker in workers:
        if not worker.answers:
            yield f"{worker.name} is alive and does not answer: what it holds is unknown"
        elif not (worker.knows and worker.canary):
            yield f"{worker.name} runs a patchpilot that knows no canary: nothing can prove that it consumes"


def _clients(at: Situation) -> Judgement:
    if not isinstance(at.fleet, Fleet):
        return (Verdict.PASS, NO_BROKER) if at.fleet is None else unknown(at.fleet)
    asked = [worker for worker in at.fleet.workers if worker.settings]
    nodes = [(worker.name, node_at(at, worker.broker)) for worker in asked if worker.broker != at.address]
    astray = [f"{name} is connected to node {node} itself" for name, node in nodes if node]
    if astray:
        return Verdict.BLOCK, f"{'; '.join(astray)}: after the failover that is a replica"
    faults = [
        f"{worker.name}: {setting.name} is {worker.settings.get(setting.name)!r} (good: {setting.wanted})"
        for worker in asked
        for setting in SETTINGS
        if not setting.good(worker.settings.get(setting.name))
    ]
    return prefer(not faults, "; ".join(faults) or f"{len(asked)} worker(s) are set up for a failover")


def _chords(at: Situation) -> Judgement:
    if at.stuck is None:
        return Verdict.PASS, NO_BROKER
    if isinstance(at.stuck, str):
        return unknown(at.stuck)
    listed = ", ".join(f"{number} {name}" for name, number in counts(at.stuck).items())
    curable = sum(finding.curable for finding in at.stuck)
    rest = f"{curable} will be recovered first, {len(at.stuck) - curable} only a person can judge"
    return prefer(not at.stuck, f"{listed}: {rest}" if at.stuck else "nothing is stuck")


def _schema(at: Situation) -> Judgement:
    return require(at.schema is None, at.schema or "the schema is the one this version needs")


ROWS: tuple[Row, ...] = (
    Row("workers", _workers, "what a silent worker holds cannot be recovered, and it cannot be proven well at the end",
        "wait until it answers, or restart it; upgrade patchpilot in the workers before the pilot"),
    Row("clients", _clients, "a worker that is not set up for a failover may exit, hang or lose what it holds",
        "use the primary endpoint as broker_url, and the settings that the README recommends"),
    Row("chords", _chords, "what is stuck before the patch is not the patch's doing, and is recovered before it",
        "patchpilot recover --dry-run says why each is stuck"),
    Row("schema", _schema, "recovery reads and writes these tables", "patchpilot db migrate"),
)  # fmt: skip
