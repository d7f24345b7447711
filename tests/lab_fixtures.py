"""Real servers for tests.

Nothing here outlives the session, not even when it is killed with SIGKILL: a watchdog process holds the list of what
was started (see `patchpilot.lab.watchdog`).
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from patchpilot.lab.replicas import ReplicaSet
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.lab.watchdog import Watchdog


@pytest.fixture(scope="session")
def lab_roster() -> Iterator[Roster]:
    """What this session has to clean up. Give it to every server that a test starts by itself."""
    directory = Path(tempfile.mkdtemp(prefix="patchpilot-tests-"))
    roster = Roster(directory / "roster.json")
    roster.add_directory(directory)
    with Watchdog(roster):
        yield roster
    # In good order every server is off the roster by now; whatever a failed test left behind goes here.
    roster.clean()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def lab_directory(lab_roster: Roster) -> Path:
    """Where the session's servers keep their files."""
    return lab_roster.path.parent


@pytest.fixture(scope="session")
def postgres_server(lab_roster: Roster, lab_directory: Path) -> Iterator[Postgres]:
    """One PostgreSQL server for the whole session. Tests that stop it have to start one of their own instead."""
    server = Postgres(lab_directory, roster=lab_roster)
    try:
        server.start()
        yield server
    finally:
        server.discard()


@pytest.fixture
def dsn(postgres_server: Postgres) -> Iterator[str]:
    """The DSN of an empty database of the test's own."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def valkey_server(lab_roster: Roster, lab_directory: Path) -> Iterator[ValkeyNode]:
    """One Valkey node for the whole session; take :func:`valkey` to have it empty."""
    node = ValkeyNode("shared-valkey", lab_directory, roster=lab_roster)
    try:
        node.start()
        yield node
    finally:
        node.stop()


@pytest.fixture
def valkey(valkey_server: ValkeyNode) -> str:
    """The URL of an empty Valkey, database 0."""
    valkey_server.ask(lambda client: client.flushall())
    return valkey_server.url


@pytest.fixture
def replicated(lab_roster: Roster, tmp_path: Path) -> Iterator[ReplicaSet]:
    """A primary and one replica in sync, behind an endpoint. `replicated.failover()` loses writes on purpose."""
    with ReplicaSet(tmp_path, roster=lab_roster, name=f"rs-{uuid.uuid4().hex[:8]}", replicas=1) as replicas:
        yield replicas


@pytest.fixture
def elasticache() -> Iterator[Callable[..., Any]]:
    """Makes real boto3 clients for a simulator: `elasticache(cloud.url)`, or `elasticache(cloud.url, region=...)`."""
    with ExitStack() as clients:

        def connect(url: str, *, region: str = "eu-central-1") -> Any:
            client = boto3.client(
                "elasticache",
                endpoint_url=url,
                region_name=region,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
            return clients.enter_context(closing(client))

        yield connect
