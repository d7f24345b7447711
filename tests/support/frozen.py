"""A PostgreSQL of one's own that can be frozen: it is there, takes connections, and never answers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate


class Freezable:
    """The server."""

    def __init__(self, directory: Path, roster: Roster) -> None:
        self._roster = roster
        self.server = Postgres(directory, roster=roster, name=f"freezable-{uuid.uuid4().hex[:8]}")

    def database(self) -> str:
        """The DSN of a new database with our tables in it."""
        dsn = self.server.create_database(f"test_{uuid.uuid4().hex[:12]}")
        with Database(dsn) as database:
            migrate(database)
        return dsn

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, all its processes stand still. The kernel still takes what is sent to it."""
        stopped = self._processes()
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        # Should this process be killed: the server's end alone would leave those behind that stand still.
        children = [self._roster.add(f"frozen-{it.pid}", it.pid) for it in stopped[1:] if it.is_running()]
        try:
            yield
        finally:
            for child in children:
                self._roster.drop(child)
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def _processes(self) -> list[psutil.Process]:
        identity = self.server.identity
        assert identity is not None
        main = psutil.Process(identity.pid)
        main.suspend()  # first, or it could have more children meanwhile
        return [main, *main.children(recursive=True)]


@contextmanager
def freezable(directory: Path, roster: Roster) -> Iterator[Freezable]:
    """Start one, and remove it afterwards."""
    opened = Freezable(directory, roster)
    try:
        opened.server.start()
        yield opened
    finally:
        opened.server.discard()
