"""The password of PostgreSQL is nowhere to be read: not in a worker's log, not in what it tells of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from patchpilot.backend.config import DSN
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate
from tests.conftest import shop_on
from tests.support.processes import ROOT, Shop
from tests.support.shop import add, app

WAIT = 60
RIGHT, WRONG = "hunter2", "hunter3"

pytestmark = pytest.mark.backend


@pytest.fixture(scope="module")
def guarded(lab_roster: Roster, lab_directory: Path) -> Iterator[str]:
    """The DSN, without its password, of a database that asks for one."""
    hba = Path("/tmp") / f"patchpilot-{uuid.uuid4()}.conf"  # noqa: S108 - the server's account has to get there
    hba.write_text("host all keeper all scram-sha-256\nhost all all all trust\n", encoding="ascii")
    hba.chmod(0o644)
    server = Postgres(lab_directory, name="guarded", options={"hba_file": str(hba)}, roster=lab_roster)
    try:
        server.start()
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE keeper SUPERUSER LOGIN PASSWORD '{RIGHT}'")
        with Database(server.dsn) as database:
            migrate(database)
        yield server.dsn.replace("patchpilot@", "keeper:{}@")
    finally:
        server.discard()
        hba.unlink()


@pytest.fixture
def shop(
    lab_roster: Roster, tmp_path: Path, valkey: str, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    for name in DSN:
        monkeypatch.setitem(app.conf, name, None)
    with shop_on(lab_roster, tmp_path, valkey, guarded.format(RIGHT), monkeypatch) as opened:
        yield opened


def test_a_worker_with_the_right_password(shop: Shop) -> None:
    """At its most talkative, asked for its configuration, and by the command line's report."""
    worker = shop.worker("-c", "1", "-l", "DEBUG")
    assert add.delay(1, 1).get(timeout=WAIT) == 2
    with pytest.raises(TypeError):
        add.delay(1, None).get(timeout=WAIT)
    [conf] = app.control.inspect(timeout=WAIT, limit=1).conf(with_defaults=True).values()
    assert conf["patchpilot_postgres"] == "***"
    report = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tests.support.shop", "report"], cwd=ROOT,
        env={**os.environ, **shop.environment}, capture_output=True, text=True, check=True, timeout=WAIT,
    )  # fmt: skip
    assert "patchpilot_postgres" in report.stdout
    worker.stop()
    for shown in (worker.output(), json.dumps(conf), report.stdout, report.stderr):
        assert RIGHT not in shown
    assert "DEBUG" in worker.output()


def test_a_worker_with_a_wrong_password(shop: Shop, guarded: str) -> None:
    """It complains, with tracebacks or without."""
    result = add.delay(1, 1)
    worker = shop.worker("-c", "1", "-l", "DEBUG", SHOP_POSTGRES=guarded.format(WRONG))
    until(lambda: f"Task {result.id} is left to recovery" in worker.output(), seconds=WAIT, what="it had complained")
    until(lambda: "No sign of life was left" in worker.output(), seconds=WAIT, what="so had its heartbeat")
    assert "password authentication failed" in worker.output()
    assert WRONG not in worker.output()
    assert RIGHT not in worker.output()
