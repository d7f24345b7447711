"""Processes by identity, and waiting for conditions.

A process id alone does not name a process: the kernel hands it out again. Everything here goes by the pair of process
id and start time, so that the lab never signals a process that it did not start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from patchpilot.clock import SYSTEM, Backoff, Clock
from patchpilot.errors import NeedsOperator

_PROC = Path("/proc")


def until(condition: Callable[[], bool], *, seconds: float, what: str, clock: Clock = SYSTEM) -> None:
    """Wait until ``condition`` holds, looking again after 5 ms at first and every 100 ms at last.

    :param what: what is awaited, for the message; reads after "waited N s in vain until".
    :raises NeedsOperator: if it does not hold within ``seconds``.
    """
    backoff = Backoff(clock, seconds, first=0.005, longest=0.1)
    while not condition():
        if not backoff.pause():
            raise NeedsOperator(f"waited {seconds:g} s in vain until {what}")


@dataclass(frozen=True, slots=True)
class Identity:
    """One process: its id and the moment it started, in whatever unit the system has for it."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The process that has the id ``pid`` now; for one that is gone already, an identity that is never alive."""
        return cls(pid, _started(pid) or "gone")

    @property
    def alive(self) -> bool:
        """Whether the process still runs. A zombie does not: where PID 1 does not reap, it may stay for ever."""
        return _started(self.pid) == self.started

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there and may be signalled."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return
            except PermissionError:
                raise NeedsOperator(
                    f"process {self.pid} belongs to another user and cannot be stopped from here"
                ) from None


def end(processes: Iterable[tuple[Identity, signal.Signals]], *, patience: float, clock: Clock = SYSTEM) -> None:
    """Stop processes, each with its own signal, and whatever still runs after ``patience`` seconds with SIGKILL."""
    mortal = list(processes)
    for identity, number in mortal:
        identity.send(number)
    try:
        _until_gone(mortal, patience, clock)
    except NeedsOperator:
        for identity, _ in mortal:
            identity.send(signal.SIGKILL)
        _until_gone(mortal, patience, clock)


def _until_gone(mortal: list[tuple[Identity, signal.Signals]], patience: float, clock: Clock) -> None:
    pids = ", ".join(str(identity.pid) for identity, _ in mortal)
    until(
        lambda: not any(identity.alive for identity, _ in mortal),
        seconds=patience,
        what=f"the processes {pids} had ended",
        clock=clock,
    )


def _started(pid: int) -> str | None:
    """When the process started, or None if there is none or only a zombie."""
    if sys.platform != "linux":
        return _started_by_ps(pid)
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): the second field is the name in parentheses, which may hold spaces; of the rest, state is the first
    # field and starttime, in clock ticks since boot, the twentieth.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _started_by_ps(pid: int) -> str | None:
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False, env={"LC_ALL": "C"}
    ).stdout.split(maxsplit=1)
    return answer[1].strip() if len(answer) == 2 and not answer[0].startswith("Z") else None
