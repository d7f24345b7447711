"""Starting one server process: as whom, on which port, with which log, and until when."""

from __future__ import annotations

import os
import pwd
import random
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchpilot.clock import SYSTEM, Clock
from patchpilot.errors import NeedsOperator
from patchpilot.lab.processes import Identity, until
from patchpilot.lab.roster import Roster

HOST = "127.0.0.1"
_LOG_TAIL = 2000
_FIRST_PORT = 10_240
# Where Linux starts to take the ports of outgoing connections from, unless told otherwise.
_FIRST_EPHEMERAL = 32_768


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged account of this machine, for servers that refuse to run as root."""

    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> Account:
        """The account called ``name``.

        :raises NeedsOperator: if this machine has none.
        """
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise NeedsOperator(
                f"PostgreSQL does not run as root and there is no account {name!r}: run the lab as another user"
            ) from None
        return cls(name, entry.pw_uid, entry.pw_gid)

    @property
    def popen(self) -> dict[str, Any]:
        """Arguments for `subprocess` that make a child run as this account and in no other group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def free_port() -> int:
    """A loopback port that nobody listens on.

    Not one of those that outgoing connections get: such a port could be taken while its server is down for a moment,
    and a client that knocks at its own port connects to itself.
    """
    for port in random.sample(range(_FIRST_PORT, _first_ephemeral()), 200):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise NeedsOperator(f"no free port on {HOST}")


def _first_ephemeral() -> int:
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        low = _FIRST_EPHEMERAL
    return low if low > _FIRST_PORT + 1000 else _FIRST_EPHEMERAL


class Process:
    """One server process that is written down on a roster for as long as it runs.

    :param log: its standard output and error are appended here.
    :param stop_with: the signal that ends it in good order when its owner cannot.
    """

    def __init__(
        self, name: str, *, log: Path, roster: Roster, stop_with: signal.Signals = signal.SIGTERM, clock: Clock = SYSTEM
    ) -> None:
        self.name = name
        self.log = log
        self._roster = roster
        self._stop_with = stop_with
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._recorded: Identity | None = None
        self._log_start = 0

    @property
    def identity(self) -> Identity | None:
        """The running process, or None."""
        return self._recorded if self.running else None

    @property
    def running(self) -> bool:
        """Whether the process lives; notices one that somebody killed."""
        return self._process is not None and self._process.poll() is None

    def start(self, argv: Sequence[str | Path], *, cwd: Path, account: Account | None = None) -> None:
        """Start the process.

        :param account: run as this one; needs root.
        :raises NeedsOperator: if the program cannot be run.
        """
        if self.running:
            raise NeedsOperator(f"{self.name} runs already")
        self._reap()
        as_whom = account.popen if account else {}
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    argv,
                    cwd=cwd,
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **as_whom,
                )
            except OSError as error:
                raise NeedsOperator(f"{self.name}: cannot run {argv[0]}: {error.strerror}") from error
        self._recorded = self._roster.add(self.name, self._process.pid, self._stop_with)

    def await_ready(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Wait until the server answers.

        :raises NeedsOperator: if it ends before, or takes longer than ``seconds``; with the end of its log.
        """
        try:
            until(lambda: not self.running or ready(), seconds=seconds, what=f"{self.name} answered", clock=self._clock)
        except NeedsOperator as error:
            raise NeedsOperator(f"{error}; {self.log}: {self.last_words()}") from None
        if not self.running:
            raise NeedsOperator(f"{self.name} did not start; {self.log}: {self.last_words()}")

    def stop(self, number: signal.Signals, *, patience: float = 10.0) -> None:
        """Stop the process and wait until it is gone; with SIGKILL if it still runs after ``patience`` seconds."""
        if self._process is None:
            return
        if self.running:
            self._process.send_signal(number)
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reap()

    def last_words(self) -> str:
        """The end of what this start of the process wrote to its log, on one line."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _LOG_TAIL))
            return " / ".join(log.read().decode("utf-8", "replace").split("\n")).strip(" /") or "(nothing)"

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._recorded is not None:
            self._roster.drop(self._recorded)
            self._recorded = None


def _environment() -> dict[str, str]:
    """What a server gets to see: none of the caller's PG* variables, and texts in English."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
