"""Fixtures that more than one folder of tests uses. The servers themselves are in :mod:`tests.lab_fixtures`."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import pools

from patchpilot.backend.install import _load_backend_first
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate
from tests.support import shop as shop_module
from tests.support.processes import Shop

pytest_plugins = ["tests.lab_fixtures"]

SLOWEST_FIRST = ("scenarios", "integration", "crash", "contract", "unit")


def pytest_configure() -> None:
    """Whoever starts the tests in the background of a shell has them ignore Ctrl-C, and so would what they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """After they were shuffled: of several processes, none begins with the longest tests when the others are done."""
    root = Path(__file__).parent
    items.sort(key=lambda item: SLOWEST_FIRST.index(item.path.relative_to(root).parts[0]))


@pytest.fixture(scope="session")
def migrated_template(postgres_server: Postgres) -> str:
    """The name of a database with our tables and nothing in them."""
    database = Database(postgres_server.create_database("migrated"))
    migrate(database)
    database.close()
    return "migrated"


@pytest.fixture
def migrated(postgres_server: Postgres, migrated_template: str) -> Iterator[str]:
    """The DSN of a database of the test's own with our tables in it."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield postgres_server.create_database(name, template=migrated_template)
    postgres_server.drop_database(name)


@pytest.fixture
def counting(request: pytest.FixtureRequest) -> str:
    """Where the test application counts. Parametrise a test indirectly to choose; the environment chooses the rest."""
    return str(getattr(request, "param", os.environ.get("PATCHPILOT_TEST_COUNTING", "postgres")))


@pytest.fixture
def shop(
    lab_roster: Roster, tmp_path: Path, valkey: str, migrated: str, monkeypatch: pytest.MonkeyPatch, counting: str
) -> Iterator[Shop]:
    """The test application on an empty broker and an empty database, with this process as its producer."""
    monkeypatch.setitem(shop_module.app.conf, "patchpilot_counting", counting)
    monkeypatch.setenv("SHOP_COUNTING", counting)
    with shop_on(lab_roster, tmp_path, valkey, migrated, monkeypatch) as opened:
        yield opened


class shop_on:  # noqa: N801 - reads as a statement where it is used
    """Point the test application at ``broker`` and ``dsn`` for as long as the block lasts."""

    def __init__(self, roster: Roster, directory: Path, broker: str, dsn: str, patch: pytest.MonkeyPatch) -> None:
        self._shop = Shop(roster, directory, broker, dsn)
        self._patch = patch

    def __enter__(self) -> Shop:
        self._patch.setenv("SHOP_LEDGER", str(self._shop.ledger_file))
        app = shop_module.app
        app.set_current()  # before 5.7 Celery asks it for a chain that begins with a chord
        app.conf.update(
            broker_url=self._shop.broker, broker_write_url=self._shop.broker, broker_read_url=self._shop.broker,
            result_backend=f"patchpilot+{self._shop.broker}", patchpilot_postgres=self._shop.dsn,
        )  # fmt: skip
        return self._shop

    def __exit__(self, *_: object) -> None:
        self._shop.close()
        forget_connections(shop_module.app)


def forget_connections(app: Any) -> None:
    """Make the application open new connections, to wherever its configuration points next."""
    backend = app._local.__dict__.pop("backend", None)
    if backend is not None:
        backend.result_consumer.stop()
        backend.client.connection_pool.disconnect()
        backend.database.close()
    pools.reset()
    app._pool = None
    app.amqp._producer_pool = None
    app.amqp.__dict__.pop("send_task_message", None)
    app.__dict__.pop("producer_or_acquire", None)
    _load_backend_first(app)  # which patchpilot.install had arranged
