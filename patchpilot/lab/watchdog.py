"""The watchdog: a small process that cleans up when the owner of some servers is gone, even by `kill -9`.

It holds the reading end of a pipe. A word on it is a good-bye: nothing to do. Its end, or the death of the owner, means
that the owner could not clean up, so the watchdog does it from the roster. If the watchdog itself dies, nothing is lost
but the safety net.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from patchpilot.lab.processes import Identity
from patchpilot.lab.roster import Roster

NAME = "watchdog"
_STDIN = 0
# How often to look after the owner: a forked child of the owner may hold the pipe open for longer than the owner lives.
_GLANCE_SECONDS = 1.0


class Watchdog:
    """Start a watchdog over this process.

    :param roster: what to clean up. The watchdog is on it too, so that `lab down` can end it.
    """

    def __init__(self, roster: Roster) -> None:
        owner = Identity.of(os.getpid())
        self._roster = roster
        self._process = subprocess.Popen(
            [sys.executable, "-m", "patchpilot.lab.watchdog", str(roster.path), str(owner.pid), owner.started],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._identity = roster.add(NAME, self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dismiss()

    def dismiss(self) -> None:
        """Send the watchdog home: everything was cleaned up in good order."""
        try:
            self._process.communicate(b"good-bye", timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._roster.drop(self._identity)


def watch(roster: Path, owner: Identity) -> None:
    """Wait for the owner's good-bye or its end; clean up after the latter."""
    while True:
        readable, _, _ = select.select([_STDIN], [], [], _GLANCE_SECONDS)
        if readable and os.read(_STDIN, 16):
            return
        if readable or not owner.alive:
            # The roster stays for `lab down` and `lab status`, and to say that this process is not quite gone yet.
            Roster(roster).end()
            return


if __name__ == "__main__":
    watch(Path(sys.argv[1]), Identity(int(sys.argv[2]), sys.argv[3]))
