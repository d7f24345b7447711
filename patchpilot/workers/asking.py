"""Asking all workers of a site something, over the broker, and knowing which of them did not answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from patchpilot.backend.heartbeat import STALE
from patchpilot.backend.transport import counting_listeners
from patchpilot.clock import Backoff, Clock
from patchpilot.durations import HEARTBEAT
from patchpilot.errors import Transient
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.workers.contact import Contact
from patchpilot.workers.unreached import unreached

SQL = queries("workers")

ASK_SECONDS = 1.0
"""How long workers have to answer. They answer from their main process, also while their pool is busy."""


@dataclass
class Answers:
    """What came back."""

    by_instance: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    puzzled: set[str] = field(default_factory=set)
    """Names of workers that do not know the question: another version of patchpilot, or none."""
    silent: dict[str, str] = field(default_factory=dict)
    """Those that are alive and did not answer, or not as one that knows the question: instance -> name."""
    strangers: int = 0
    """How many more heard the question and said nothing: without patchpilot nothing else tells of them."""
    unreached: frozenset[str] = frozenset()
    """Topics of the broker on which somebody listens who was not asked."""


class Asking:
    """Asks the workers of one site.

    :param stale: a worker that gave no sign of life for this long counts as dead.
    :param brokers: the names of the site's broker. Workers of other brokers, on the same record, are none of ours.
    :param contact: before one counts as dead, PostgreSQL has to be there for as long as a sign of life may take. None:
        nothing depends on who is dead.
    """

    def __init__(
        self,
        database: Database,
        app: Celery,
        clock: Clock,
        stale: timedelta,
        brokers: Collection[str],
        contact: Contact | None = None,
    ) -> None:
        self._database = database
        self._app = app
        self._clock = clock
        self._stale = stale
        self._brokers = brokers
        self._contact = contact
        self._heard: set[str] = set()

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None, *, everybody: bool = False) -> Answers:
        """Ask every worker.

        One that does not answer is waited for until it answers or has not been heard of for so long that it counts as
        dead, a time in which PostgreSQL was away aside; one that lives on in silence is busy, or cut off from the
        broker. Workers go by instance, because two of them may have the same name; what does not know the question has
        only its name.

        :param everybody: wait as well for those of whom nothing is known but that they listen.
        :raises Transient: the broker or PostgreSQL cannot be reached.
        """
        answers = Answers()
        # Who counts as dead only much later is not waited for until then: what it may have is unknown.
        patience = Backoff(self._clock, (min(self._stale, STALE) + HEARTBEAT).total_seconds(), first=0.5)
        while True:
            heard = self._broadcast(command, dict(arguments or {}), answers)
            alive = self.alive()
            answers.silent = {key: alive[key] for key in alive.keys() - answers.by_instance}
            answers.strangers = heard.unaccounted(alive)
            settled = answers.puzzled.issuperset(answers.silent.values())
            if (settled and not (everybody and answers.strangers)) or not patience.pause():
                return replace(answers, unreached=self._unreached()) if everybody else answers

    def inquire(self, names: Collection[str], command: str) -> dict[str, list[Any]]:
        """What the workers called ``names`` answer to one of Celery's own questions, by name: two may have the same.

        :raises Transient: the broker cannot be reached.
        """
        with self._away(), self._app.connection_for_write() as connection:
            replies = self._app.control.broadcast(
                command, reply=True, timeout=ASK_SECONDS, destination=sorted(names), limit=None, connection=connection
            )
        found: dict[str, list[Any]] = {}
        for name, answer in _answers(replies):
            found.setdefault(name, []).append(answer)
        return found

    def alive(self) -> dict[str, str]:
        """The workers of our broker that give a sign of life, or had no time to: instance -> name.

        A worker that answered is on it, by whatever name; so may be one that does not say which broker it is on.
        """
        rows = self._database.fetch(SQL["workers"], {"stale": self._stale})
        ours = [row for row in rows if row["broker"] in (None, *self._brokers) or row["instance"] in self._heard]
        silent = {row["instance"]: row["seen_at"] for row in ours if row["today"] and not row["alive"]}
        owed = set() if self._contact is None else self._contact.owed(silent)
        return {row["instance"]: row["name"] for row in ours if row["alive"] or row["instance"] in owed}

    def _unreached(self) -> frozenset[str]:
        with self._away(), self._app.connection_for_write() as connection:
            return unreached(self._app, connection)

    def _broadcast(self, command: str, arguments: dict[str, Any], answers: Answers) -> _Heard:
        # A connection of its own each time: a pooled one may lead to where the primary was.
        with self._away(), counting_listeners() as listeners, self._app.connection_for_write() as connection:
            replies = self._app.control.broadcast(
                command, arguments=arguments, reply=True, timeout=ASK_SECONDS, connection=connection
            )
        heard = _Heard(sum(listeners))
        for name, answer in _answers(replies):
            heard.replies += 1
            if isinstance(answer, dict) and "instance" in answer:
                answers.by_instance[answer["instance"]] = answer
                heard.instances.add(answer["instance"])
                self._heard.add(answer["instance"])
            else:
                answers.puzzled.add(name)
                heard.names.add(name)
        return heard

    @staticmethod
    @contextmanager
    def _away() -> Iterator[None]:
        try:
            yield
        except (OperationalError, RedisError, OSError) as error:
            raise Transient(f"the workers cannot be asked, the broker is away: {error}") from error


@dataclass
class _Heard:
    """One round of asking: how many heard the question, and who answered."""

    listeners: int
    replies: int = 0
    instances: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    """Of those whose answer does not say which instance they are."""

    def unaccounted(self, alive: Mapping[str, str]) -> int:
        """How many heard it that neither answered nor are known to live."""
        silent = [key for key, name in alive.items() if key not in self.instances and name not in self.names]
        return max(0, self.listeners - self.replies - len(silent))


def _answers(replies: Any) -> Iterator[tuple[str, Any]]:
    return ((name, answer) for reply in replies or () for name, answer in reply.items())
