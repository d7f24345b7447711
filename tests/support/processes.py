"""Celery workers and command lines as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from tests.support import shop

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A real worker of :mod:`tests.support.shop`, in a process group of its own."""

    def __init__(self, roster: Roster, directory: Path, environment: dict[str, str], *options: str) -> None:
        self.name = f"w{uuid4().hex[:8]}"
        self.log = directory / f"{self.name}.log"
        self._roster = roster
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tests.support.shop", "worker", "-n", f"{self.name}@%h",
                 "-l", "INFO", "--without-gossip", "--without-mingle", *(options or ("-c", "2"))],
                # A pool leaves folders behind where temporary files go.
                cwd=ROOT, env={**os.environ, "TMPDIR": str(directory), **environment},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._identity = roster.add(self.name, self.process.pid)

    def await_ready(self) -> None:
        until(lambda: " ready." in self.output() or self.process.poll() is not None, seconds=60, what="worker ready")
        if self.process.poll() is not None:
            raise AssertionError(f"the worker ended: {self.output()[-2000:]}")

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """SIGKILL the worker and its pool, as a lost machine would."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._roster.drop(self._identity)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
        self._roster.drop(self._identity)


class Shop:
    """The test application with its servers, for one test: a producer here, workers in processes of their own."""

    def __init__(self, roster: Roster, directory: Path, broker: str, dsn: str, **environment: str) -> None:
        self.roster = roster
        self.directory = directory
        self.ledger_file = directory / "ledger"
        self.dsn = dsn
        self.broker = broker
        self.environment = {
            "SHOP_BROKER": broker, "SHOP_BACKEND": f"patchpilot+{broker}", "SHOP_POSTGRES": dsn,
            "SHOP_LEDGER": str(self.ledger_file), **environment,
        }  # fmt: skip
        self._workers: list[Worker] = []

    def worker(self, *options: str, **environment: str) -> Worker:
        worker = Worker(self.roster, self.directory, {**self.environment, **environment}, *options)
        self._workers.append(worker)
        worker.await_ready()
        return worker

    def ledger(self) -> list[str]:
        return shop.read(self.ledger_file)

    def await_line(self, line: str, *, count: int = 1, seconds: float = 30) -> None:
        until(lambda: self.ledger().count(line) >= count, seconds=seconds, what=f"{line!r} x{count} in {self.ledger()}")

    def close(self) -> None:
        """End the workers that are left, without ceremony: what a test wants to see of a shutdown, it stops itself."""
        for worker in self._workers:
            worker.kill()

    def stop(self) -> None:
        """Let the workers finish what they have, and stop."""
        for worker in self._workers:
            worker.stop()
