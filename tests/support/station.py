"""One worker, one broker and one database for many cases, because starting a worker is what takes long."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from patchpilot.errors import NeedsOperator
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.postgres.connection import Database
from tests.conftest import forget_connections
from tests.support.processes import Shop
from tests.support.shop import app

LEFT_OVER = {
    "messages in the outbox": "SELECT task_name, task_id FROM patchpilot.outbox",
    "open chords": "SELECT group_id FROM patchpilot.chord WHERE state IN ('open', 'claimed')",
}

# Chords that are over stay on record. Celery reports a hard time limit twice, and the second part may return when the
# test is over; of a chord on no record the backend believes that Celery's own opened it, and counts as that does.
CLEAR = ("DELETE FROM patchpilot.outbox", "DELETE FROM patchpilot.chord WHERE state IN ('open', 'claimed')")


@dataclass(frozen=True)
class Setup:
    """How a station's application is configured."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Celery settings, of the worker and of the producer."""
    options: tuple[str, ...] = ("-c", "3")
    """Of the worker."""

    def __str__(self) -> str:
        return self.name


PLAIN = Setup("plain")


def on(*setups: Setup) -> pytest.MarkDecorator:
    """Run the test on stations with these setups."""
    return pytest.mark.parametrize("station", setups, indirect=True, ids=str)


class Station:
    """The test application on servers of its own, all but PostgreSQL, with a worker."""

    def __init__(self, setup: Setup, shop: Shop, broker: redis.Redis, database: Database) -> None:
        self.shop = shop
        self.broker = broker
        self.database = database
        self._setup = setup
        self._seen = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Make the application in this process the station's producer. Nothing may be left when that is over."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHOP_LEDGER", str(self.shop.ledger_file))
            addresses = dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url"), self.shop.broker)
            backend = {"result_backend": self.shop.environment["SHOP_BACKEND"], "patchpilot_postgres": self.shop.dsn}
            for key, value in {**addresses, **backend, **self._setup.settings}.items():
                patch.setitem(app.conf, key, value)
            for task in app.tasks.values():  # read once from the configuration, long ago
                patch.setattr(task, "serializer", app.conf.task_serializer)
                patch.setattr(task, "_exec_options", None)
            forget_connections(app)
            app.set_current()  # before 5.7 Celery asks it for a chain that begins with a chord
            self.begin()
            try:
                yield
                self.await_silence()
            finally:
                self._clear()
                forget_connections(app)

    def begin(self) -> None:
        """Forget what the cases before wrote into the ledger."""
        self._seen = len(self.shop.ledger())

    def ledger(self) -> list[str]:
        """What was written since :meth:`begin`."""
        return self.shop.ledger()[self._seen :]

    def left_over(self) -> dict[str, Any]:
        """What should not be there when nothing runs."""
        found = {what: self.database.fetch(sql) for what, sql in LEFT_OVER.items()}  # type: ignore[arg-type]
        # What the parts of a failed chord returned stays, as with Celery's own backend.
        found["keys of chords"] = [key for key in self.broker.keys("*celery-taskset-meta-*") if not key.endswith(b".j")]
        return {what: rows for what, rows in found.items() if rows}

    def await_silence(self) -> None:
        """Wait until nothing runs any more and nothing is left."""
        try:
            until(lambda: not self.left_over(), seconds=30, what="nothing was left over")
        except NeedsOperator as error:
            raise AssertionError(f"{error}: {self.left_over()}") from error

    def _clear(self) -> None:
        """One case that fails must not fail all that follow."""
        for key in self.broker.keys("*celery-taskset-meta-*"):
            self.broker.delete(key)
        for sql in CLEAR:
            self.database.execute(sql)  # type: ignore[arg-type]


class Stations:
    """Stations by setup, opened when first asked for and kept open until the end."""

    def __init__(self, roster: Roster, directory: Path, postgres: Postgres, template: str) -> None:
        self._roster = roster
        self._directory = directory
        self._postgres = postgres
        self._template = template
        self._open: dict[str, Station] = {}
        self._close = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def at(self, setup: Setup) -> Station:
        """The station that is set up so."""
        if setup.name not in self._open:
            self._open[setup.name] = self._opened(setup)
        return self._open[setup.name]

    def _opened(self, setup: Setup) -> Station:
        directory = self._directory / setup.name
        directory.mkdir()
        node = ValkeyNode(f"station-{setup.name}", directory, roster=self._roster)
        node.start()
        self._close.callback(node.stop)
        name = f"station_{setup.name.replace('-', '_')}"
        dsn = self._postgres.create_database(name, template=self._template)
        self._close.callback(self._postgres.drop_database, name)
        settings = json.dumps(dict(setup.settings))
        # A worker that takes pickle refuses to run as root unless it is told to.
        shop = Shop(self._roster, directory, node.url, dsn, SHOP_SETTINGS=settings, C_FORCE_ROOT="1")
        self._close.callback(shop.close)
        shop.worker(*setup.options, "-I", "tests.support.extras")
        broker = self._close.enter_context(redis.Redis.from_url(node.url))
        return Station(setup, shop, broker, self._close.enter_context(Database(dsn)))
