"""PgBouncer in transaction mode between everybody and PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate, migrations
from tests.conftest import shop_on
from tests.support.pgbouncer import PROGRAM, PgBouncer
from tests.support.workload import work_and_recovery

pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(
        PROGRAM is None, reason="PgBouncer is not on this machine (Debian and Ubuntu: apt install pgbouncer)"
    ),
]


def test_everything_works_through_a_pool_of_one_connection(
    lab_roster: Roster,
    tmp_path: Path,
    valkey: str,
    postgres_server: Postgres,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A producer, a worker with two children and a recovery take turns on it, one transaction each."""
    name = dsn.rpartition("/")[2]
    with PgBouncer(tmp_path, postgres_server.address, lab_roster) as pooler:
        with Database(pooler.dsn_of(name)) as database:
            assert migrate(database) == migrations()
        with shop_on(lab_roster, tmp_path, valkey, pooler.dsn_of(name), monkeypatch) as shop:
            work_and_recovery(shop)
            pooler.await_clients(3, name)
            assert pooler.count("servers", name) == 1
