"""Whose hands something is in: what the workers of a site answer, those that do not have patchpilot included.

A worker with patchpilot answers by message, and tells which of some tasks run and which are revoked. One without it
knows only tasks, forgets what waits for its rate limit, and leaves no sign of what it has run: of a queue that it
consumes, nothing can be called lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from patchpilot.backend.holdings import COMMAND
from patchpilot.workers.asking import Asking

HELD = ("active", "reserved", "scheduled")
"""What of Celery's own answers names the tasks that a worker has."""


@dataclass(frozen=True)
class Hands:
    """What the workers said."""

    messages: frozenset[str] = frozenset()
    """Ids of messages that one of them has."""
    began: Mapping[str, float] = field(default_factory=dict)
    """How many seconds before it answered one of them had begun with a message."""
    tasks: frozenset[str] = frozenset()
    """Ids of tasks that one without patchpilot has."""
    active: frozenset[str] = frozenset()
    """Of the tasks asked about: they run."""
    revoked: frozenset[str] = frozenset()
    """Of the tasks asked about: somebody revoked them."""
    answered: frozenset[str] = frozenset()
    """Workers that answered, by instance."""
    silent: frozenset[str] = frozenset()
    """Names of workers that are alive and did not answer."""
    strangers: int = 0
    """How many more listen to the broker and did not answer."""
    unreached: frozenset[str] = frozenset()
    """Topics of the broker on which somebody listens who could not be asked."""
    unread: bool = False
    """A worker has been sent something that nobody can look into yet."""
    places: frozenset[str] | None = frozenset()
    """Queues and exchanges that workers without patchpilot consume; None if they do not say."""

    @property
    def complete(self) -> bool:
        """Whether everybody who may have something has said so."""
        return not (self.silent or self.strangers or self.unreached or self.unread)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Who may have something and has not said so, and what to do about it: in one sentence each, for a person."""
        silent = f"alive and without an answer: {', '.join(sorted(self.silent))}"
        strangers = (
            f"{self.strangers} more that listen to the broker as workers do have not answered: they stand still, are "
            "cut off, or have no patchpilot"
        )
        unread = "a worker has been sent something that nobody can look into before it has read it"
        others = "workers without patchpilot consume queues here, and do not tell of all that they have"
        sentences = (
            (self.silent, silent), (self.strangers, strangers), (self.unread, unread),
            (self.places is None or self.places, others), (self.unreached, hint(self.unreached)),
        )  # fmt: skip
        return tuple(sentence for applies, sentence in sentences if applies)

    def may_have(self, row: Mapping[str, Any]) -> bool:
        """Whether this message, which nobody says to have, may be with somebody all the same."""
        if not self.complete or self.places is None:
            return True
        return bool(self.places.intersection({*queues_of(row), row["exchange"] or None}))


def hint(unreached: Collection[str]) -> str:
    """What to do about workers that cannot be asked, because they listen on these topics."""
    return (
        f"workers listen on {', '.join(sorted(unreached))}, where they are not asked: set celery.control_exchange and "
        "celery.fanout_prefix as their application does; if they are of another application, which cannot be asked at "
        "the same time, give each its own database number of the broker, or both the same control_exchange"
    )


def queues_of(row: Mapping[str, Any]) -> set[str]:
    """Where a message of the outbox may be queued. Without an exchange its routing key alone says where."""
    return {row["queue"] or row["routing_key"]} | ({row["routing_key"]} if not row["exchange"] else set())


def ask(asking: Asking, message_ids: Collection[str], task_ids: Collection[str]) -> Hands:
    """Ask every worker which of these it has.

    :raises Transient: the broker or PostgreSQL cannot be reached.
    """
    question = {"message_ids": sorted(message_ids), "task_ids": sorted(task_ids)}
    answers = asking.ask(COMMAND, question, everybody=True)
    ours = answers.by_instance.values()
    tasks, revoked, places = _others(asking, answers.puzzled) if answers.puzzled else (set(), set(), frozenset())
    return Hands(
        messages=_all(ours, "held"),
        began={key: age for answer in ours for key, age in answer.get("began", {}).items()},
        tasks=frozenset(tasks),
        active=_all(ours, "active") | tasks,
        revoked=_all(ours, "revoked") | revoked,
        answered=frozenset(answers.by_instance),
        silent=frozenset(answers.silent.values()),
        strangers=answers.strangers,
        unreached=answers.unreached,
        unread=any(answer.get("unread") for answer in ours),
        places=places,
    )


def _all(answers: Iterable[Mapping[str, Any]], what: str) -> frozenset[str]:
    return frozenset(each for answer in answers for each in answer.get(what, ()))


def _others(asking: Asking, names: Collection[str]) -> tuple[set[str], set[str], frozenset[str] | None]:
    """The tasks that workers without patchpilot have, those that they know to be revoked, and what they consume."""
    tasks = {
        str(it.get("request", it)["id"])
        for question in HELD
        for answer in _flat(asking.inquire(names, question))
        for it in answer
    }
    revoked = {str(task_id) for answer in _flat(asking.inquire(names, "revoked")) for task_id in answer}
    consumed = asking.inquire(names, "active_queues")
    if set(names) - consumed.keys():
        return tasks, revoked, None
    queues = [queue for answer in _flat(consumed) for queue in answer]
    places = {name for queue in queues for name in (queue["name"], (queue.get("exchange") or {}).get("name")) if name}
    return tasks, revoked, frozenset(places)


def _flat(answers: Mapping[str, list[Any]]) -> Iterable[list[Any]]:
    """Their answers; an error, which is no list, says nothing."""
    return (each for several in answers.values() for each in several if isinstance(each, list))
