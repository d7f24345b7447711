"""What is done once in a while on one site, by a person: strays are removed, chords are adopted."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Self

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator
from patchpilot.postgres.record import Record
from patchpilot.recovery.adopt import Adoption, Verdict, judge
from patchpilot.recovery.hands import Hands, ask, hint
from patchpilot.recovery.mentions import mentioned
from patchpilot.recovery.strays import Strays, strays
from patchpilot.valkey.broker import Broker
from patchpilot.valkey.keys import ChordKeys
from patchpilot.workers.application import Site, application
from patchpilot.workers.asking import Asking
from patchpilot.workers.contact import Contact


def servers(site: Site) -> tuple[ChordKeys, ...]:
    """Where chords may have keys: on the Valkey of the result backend, and on the broker if that is another one."""
    urls = dict.fromkeys((site.results or site.endpoint, site.endpoint))
    return tuple(ChordKeys(url, site.results_prefix) for url in urls)


class Housekeeping:
    """Looks after one site.

    :param stale: a worker that gave no sign of life for this long counts as dead.
    """

    def __init__(self, site: Site, *, clock: Clock = SYSTEM, stale: timedelta | None = None) -> None:
        self._site = site
        self._clock = clock
        self._stale = site.dead_after if stale is None else stale
        self._database = Record(site.dsn, clock=clock)
        self._broker = Broker(site.endpoint, site.key_prefix, site.broker, site.sep, site.unacked)
        self._servers = servers(site)
        self._app = application(site, site.result_serializer or "json")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        self._broker.close()
        self._database.close()
        self._app.backend.client.connection_pool.disconnect()
        self._app.backend.database.close()
        self._app.close()

    def strays(self, idle: timedelta | None, *, remove: bool) -> Strays:
        """Look for keys of chords that are on no record and of which no message tells; remove what nobody has touched
        for ``idle``. Nothing, if the messages cannot be read.

        :raises Transient: PostgreSQL or Valkey cannot be reached.
        """
        return strays(self._database, self._servers, self._waiting, idle, remove=remove)

    def _waiting(self, group_ids: Collection[str]) -> set[str]:
        queues = self._broker.declared()
        self._broker.check_layout(queues)
        return mentioned(self._broker.messages(queues), group_ids)

    def adoptable(self) -> list[Verdict]:
        """Which chords could be adopted, and which could not, and why. Changes nothing.

        :raises Transient: PostgreSQL or Valkey cannot be reached.
        """
        return [judge(stock) for stock in self._adoption().look().stocks.values()]

    def adopt(self) -> list[Verdict]:
        """Adopt the chords that are under way in Celery's own Redis backend.

        :raises NeedsOperator: a worker without patchpilot is there. It would count in Valkey what is counted in
            PostgreSQL from now on, and the chord would never be complete, or twice. Or the broker's queues are not
            called as we call them.
        :raises Transient: PostgreSQL or Valkey cannot be reached. What was done stays done.
        """
        names, contact = self._broker.names(), Contact(self._clock, self._stale)
        hands = ask(Asking(self._database, self._app, self._clock, self._stale, names, contact), (), ())
        _check(hands)
        self._broker.check_layout()
        nobody = not hands.answered and not hands.silent
        adoption = self._adoption()
        return adoption.adopt(adoption.look(), unacked=nobody)

    def _adoption(self) -> Adoption:
        site = self._site
        known = site.result_serializer
        return Adoption(self._database, self._broker, self._servers[0], self._app, site.in_results, known)


def _check(hands: Hands) -> None:
    if hands.places is None or hands.places:
        raise NeedsOperator(
            "nothing is adopted while workers without patchpilot are at work: stop them, or restart them with "
            "patchpilot's backend, and adopt then"
        )
    if hands.unreached:
        raise NeedsOperator(f"nothing is adopted: {hint(hands.unreached)}")
    if hands.strangers:
        raise NeedsOperator(
            f"nothing is adopted: {hands.strangers} that listen to the broker as workers do have not answered, so they "
            "may be workers without patchpilot; stop them, or wait until they have time to answer"
        )
