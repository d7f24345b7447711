"""Who holds a lease, and whether that process is certainly dead.

A pid alone proves nothing: pids are used again, and every container has a pid 1. Together with the boot id of the
kernel, the PID namespace and the moment the process began, it names one process for ever (Linux, ``proc(5)``).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_GONE = ""


@dataclass(frozen=True)
class Holder:
    """One process on one host."""

    host: str
    pid: int
    machine: str = ""
    """Boot id and PID namespace: within it a pid means one process at a time. Empty where there is no ``/proc``."""
    began: str = ""
    """When the process began, in clock ticks since boot. Empty where there is no ``/proc``."""

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _began(pid) or "")

    def is_certainly_dead(self) -> bool:
        """True only on proof: same kernel, same PID namespace, and the process is gone or its pid is another's now.

        False for a holder on another host, whatever became of it: its lease has to run out.
        """
        if not self.machine or not self.began or self.machine != _machine():
            return False
        began = _began(self.pid)
        return began is not None and began != self.began

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When process ``pid`` began; empty if it is gone or a zombie; None if that cannot be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return _GONE if _no_such_process(pid) else None
    except OSError:
        return None
    # The command, in parentheses, may itself hold blanks and parentheses. Field 3 is the state, field 22 the start.
    fields = stat.rpartition(")")[2].split()
    return _GONE if fields[0] in {"Z", "X"} else fields[19]


def _no_such_process(pid: int) -> bool:
    """Whether the kernel says so: ``/proc`` may be mounted so that it hides the processes of others (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
