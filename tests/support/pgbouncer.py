"""A real PgBouncer in front of a PostgreSQL server, where the machine has one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg.rows import dict_row

from patchpilot.lab.launch import Address, Process, free_port
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster

# Debian puts it where only root looks.
PROGRAM = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))

_CONFIGURATION = """\
[databases]
* = host={postgres.host} port={postgres.port} user=patchpilot
[pgbouncer]
listen_addr = {own.host}
listen_port = {own.port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 1
{account}
"""


class PgBouncer:
    """Pools transactions onto one connection for each database: a client that relies on its session starves or errs."""

    def __init__(self, directory: Path, postgres: Address, roster: Roster) -> None:
        self.address = Address(postgres.host, free_port())
        self._directory = directory
        self._configuration = directory / "pgbouncer.ini"
        # It refuses to run as root; it reads this file before it becomes somebody else.
        account = "user = nobody" if os.geteuid() == 0 else ""
        self._configuration.write_text(_CONFIGURATION.format(postgres=postgres, own=self.address, account=account))
        self._process = Process("pgbouncer", log=directory / "pgbouncer.log", roster=roster)

    def __enter__(self) -> Self:
        assert PROGRAM is not None
        self._process.start([PROGRAM, self._configuration], cwd=self._directory)
        self._process.await_ready(self._answers, seconds=30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop(signal.SIGTERM)

    def dsn_of(self, database: str) -> str:
        """The DSN of a database, through the pooler."""
        return f"postgresql://patchpilot@{self.address}/{database}"

    def count(self, what: str, database: str) -> int:
        """How many ``clients`` or ``servers`` there are of a database."""
        with psycopg.connect(self.dsn_of("pgbouncer"), autocommit=True, row_factory=dict_row) as console:
            rows = console.execute(f"SHOW {what}".encode()).fetchall()
        return sum(row["database"] == database for row in rows)

    def await_clients(self, count: int, database: str) -> None:
        """Wait until there are at least so many."""
        until(lambda: self.count("clients", database) >= count, seconds=30, what=f"{count} clients were connected")

    def _answers(self) -> bool:
        try:
            self.count("servers", "")
        except psycopg.OperationalError:
            return False
        return True
