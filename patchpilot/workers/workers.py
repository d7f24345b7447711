"""Looking at the workers, and letting canaries fly."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

from celery import Celery
from kombu.exceptions import OperationalError, SerializerNotInstalled
from redis.exceptions import RedisError

from patchpilot.backend.about import COMMAND
from patchpilot.backend.canary import chord_of, queue_of
from patchpilot.backend.heartbeat import STALE
from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator, Transient
from patchpilot.postgres.connection import Database
from patchpilot.postgres.queries import queries
from patchpilot.valkey.broker import Broker
from patchpilot.workers.application import Site, application
from patchpilot.workers.asking import Asking
from patchpilot.workers.canaries import EXPIRES, purge, send
from patchpilot.workers.facts import Depth, Fleet, Worker

SQL = queries("canaries")


class Workers:
    """The workers of one site.

    :param stale: a worker that gave no sign of life for this long counts as dead.
    """

    def __init__(self, site: Site, *, clock: Clock = SYSTEM, stale: timedelta = STALE) -> None:
        self._site = site
        self._clock = clock
        self._stale = stale
        self._database = Database(site.dsn, clock=clock)
        self._broker = Broker(site.endpoint, site.key_prefix, site.broker, site.sep, site.unacked)
        self._apps: dict[str, Celery] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._broker.close()
        self._database.close()
        for app in self._apps.values():
            app.backend.client.connection_pool.disconnect()
            app.backend.database.close()
            app.close()

    def look(self, queues: Collection[str] = ()) -> Fleet:
        """Who is there, what each says of itself, and how full the queues are. Changes nothing.

        :param queues: queues to look at, beside those that are consumed and those that messages were sent to.
        :raises Transient: the broker or PostgreSQL cannot be reached.
        """
        asking = Asking(self._database, self._app("json"), self._clock, self._stale, self._broker.names())
        answers = asking.ask(COMMAND)
        proofs = {row["instance"]: row["canary"] for row in self._database.fetch(SQL["proofs"])}
        alive = {**asking.alive(), **answers.silent}
        workers = [
            Worker.of(instance, name, answers.by_instance.get(instance, _puzzled(name, answers.puzzled)), proof)
            for instance, name in sorted(alive.items(), key=lambda item: (item[1], item[0]))
            for proof in (proofs.get(instance, {}),)
        ]
        names = {name for worker in workers for name in worker.queues} | set(queues)
        names |= {row["queue"] for row in self._database.fetch(SQL["queues"])}
        return Fleet(tuple(workers), tuple(Depth(name, *self._broker.depth(name)) for name in sorted(names)))

    def release(self, to: Mapping[str, str]) -> dict[str, str]:
        """Send a canary task and a canary chord to each of some workers. Instance -> the token that they carry.

        :param to: instance -> the serialiser of its application's tasks: see :attr:`Worker.serializer`.
        :raises Transient: the broker or PostgreSQL cannot be reached; some may have been sent.
        :raises NeedsOperator: a serialiser is not installed here.
        """
        sent: dict[str, str] = {}
        with _away():
            for instance, serializer in to.items():
                app = self._app(serializer)
                # A connection of its own, as for asking: a pooled one may lead to where the primary was.
                with app.connection_for_write() as connection:
                    sent[instance] = send(app, connection, instance)
                self._broker.expire(queue_of(instance).name, EXPIRES)
        return sent

    def tidy(self, sent: Mapping[str, str]) -> None:
        """Remove what is left of canaries: of those that were ``sent``, and of any that are older than they last.

        :raises Transient: the broker or PostgreSQL cannot be reached.
        """
        with _away():
            names = self._broker.names()
            purge(self._database, self._app("json"), names, [chord_of(token) for token in sent.values()])
            self._broker.discard([queue_of(instance).name for instance in sent])

    def _app(self, serializer: str) -> Celery:
        if serializer not in self._apps:
            app = application(self._site)
            # As the workers' own application has it, or they could not read it.
            app.conf.update(task_serializer=serializer, result_expires=EXPIRES)
            self._apps[serializer] = app
        return self._apps[serializer]


def _puzzled(name: str, puzzled: Collection[str]) -> dict[str, Any] | None:
    """The answer of a worker that is too old to know the question; None if it gave none at all."""
    return {} if name in puzzled else None


@contextmanager
def _away() -> Iterator[None]:
    """Raise our error in place of those that a broker makes that goes away.

    :raises Transient: it did.
    :raises NeedsOperator: what was to be sent cannot be written as the workers want it.
    """
    try:
        yield
    except SerializerNotInstalled as error:
        raise NeedsOperator(f"the workers' serialiser is missing here: install it here too ({error})") from error
    except (OperationalError, RedisError, OSError) as error:
        raise Transient(f"no canary was sent, the broker is away: {error}") from error
