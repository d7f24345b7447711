"""A station whose backend can be cut off from its Valkey, while the broker, which is another one, goes on."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import redis

from patchpilot.lab.links import Link
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate
from tests.support.processes import Shop, Worker
from tests.support.station import Setup, Station


class Outpost:
    """The station, and what can be taken away from it.

    :param node: the backend's Valkey.
    :param link: the only way to it.
    """

    def __init__(self, station: Station, worker: Worker, node: ValkeyNode, link: Link, postgres: Postgres) -> None:
        self.station = station
        self.node = node
        self.link = link
        self.postgres = postgres
        self._worker = worker
        self._heard = 0

    def listen(self) -> None:
        """From here on :meth:`await_word` counts."""
        self._heard = len(self._worker.output())

    def await_word(self, words: str) -> None:
        """Wait until the worker has logged ``words``."""
        until(
            lambda: words in self._worker.output()[self._heard :], seconds=60,
            what=f"{words!r} was logged after {self._worker.output()[self._heard:]}",
        )  # fmt: skip


class Outposts:
    """Outposts by setup, opened when first asked for and kept open until the end. They have one PostgreSQL, which no
    other test uses."""

    def __init__(self, roster: Roster, directory: Path) -> None:
        self._roster = roster
        self._directory = directory
        self._postgres = Postgres(directory, roster=roster)
        self._open: dict[str, Outpost] = {}
        self._close = ExitStack()

    def __enter__(self) -> Self:
        self._close.callback(self._postgres.discard)
        self._postgres.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def at(self, setup: Setup) -> Outpost:
        """The outpost that is set up so."""
        if setup.name not in self._open:
            directory = self._directory / setup.name
            directory.mkdir()
            self._open[setup.name] = self._opened(setup, directory)
        return self._open[setup.name]

    def _opened(self, setup: Setup, directory: Path) -> Outpost:
        broker, node = (self._valkey(f"{setup.name}-{what}", directory) for what in ("broker", "backend"))
        link = self._close.enter_context(Link(node.address))
        database = self._close.enter_context(Database(self._postgres.create_database(f"at_{setup.name}")))
        migrate(database)
        dsn = self._postgres.dsn_of(f"at_{setup.name}")
        backend = f"patchpilot+redis://{link.address}/0?socket_timeout=1"
        shop = Shop(
            self._roster, directory, broker.url, dsn, SHOP_BACKEND=backend,
            SHOP_SETTINGS=json.dumps(dict(setup.settings)),
        )  # fmt: skip
        self._close.callback(shop.close)
        worker = shop.worker(*setup.options, "-I", "tests.support.extras")
        keys = self._close.enter_context(redis.Redis.from_url(node.url))
        return Outpost(Station(setup, shop, keys, database), worker, node, link, self._postgres)

    def _valkey(self, name: str, directory: Path) -> ValkeyNode:
        node = ValkeyNode(name, directory, roster=self._roster)
        node.start()
        self._close.callback(node.stop)
        return node
