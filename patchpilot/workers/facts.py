"""What is known of the workers at one moment, as frozen facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Proof = Mapping[str, str]
"""Which canaries came back last: step (``task``, ``chord``) -> the token that it carried."""


@dataclass(frozen=True)
class Worker:
    """One worker that is alive: it gives a sign of life in PostgreSQL."""

    instance: str
    """Of this start of it; a restarted worker is another one."""
    name: str
    """As Celery calls it, ``celery@host``. Two workers may have the same one."""
    answers: bool
    """To remote control, over the broker. What follows is its answer."""
    knows: bool = True
    """Whether its version of patchpilot knows the question: nothing below is known if not."""
    queues: tuple[str, ...] = ()
    """What it consumes."""
    canary: bool = False
    """Whether it consumes its canary queue too."""
    processes: int | None = None
    running: Mapping[str, int] = field(default_factory=dict)
    """Task name -> how many of it run now."""
    broker: tuple[str, int] | None = None
    """Host and port it is connected to."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What of its configuration matters for a failover."""
    proof: Proof = field(default_factory=dict)

    @property
    def serializer(self) -> str:
        """Of its application's tasks."""
        return str(self.settings.get("task_serializer") or "json")

    @classmethod
    def of(cls, instance: str, name: str, answer: Mapping[str, Any] | None, proof: Proof) -> Worker:
        """What PostgreSQL says of a worker, and what it answered itself; None if it did not."""
        if answer is None:
            return cls(instance, name, answers=False, proof=proof)
        if "queues" not in answer:
            return cls(instance, name, answers=True, knows=False, proof=proof)
        host, port = answer["broker"]
        return cls(
            instance, name, answers=True, queues=tuple(answer["queues"]), canary=bool(answer["canary"]),
            processes=answer["processes"], running=dict(answer["running"]),
            broker=(str(host), int(port)) if host else None, settings=dict(answer["settings"]), proof=proof,
        )  # fmt: skip


@dataclass(frozen=True)
class Depth:
    """One queue at one moment."""

    queue: str
    length: int
    oldest: str = ""
    """A digest of the messages that are next in turn: another one means that some were taken."""


@dataclass(frozen=True)
class Fleet:
    """All workers that are alive, and the queues that they consume or that messages were sent to."""

    workers: tuple[Worker, ...] = ()
    queues: tuple[Depth, ...] = ()
