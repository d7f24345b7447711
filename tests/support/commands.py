"""The command line as a user runs it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from patchpilot.lab.processes import until
from tests.support.processes import ROOT, Shop


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any patchpilot setting, and ``extra``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PATCHPILOT_")}
    return {**kept, **extra}


def configured(shop: Shop) -> Path:
    """A configuration file for commands that recover what ``shop`` has lost."""
    path = shop.directory / "patchpilot.toml"
    path.write_text(
        f'[postgres]\ndsn = "{shop.dsn}"\n'
        f'[clusters.broker]\nrole = "broker"\nreplication_group = "b"\nendpoint = "{shop.broker}"\n'
    )
    return path


def patchpilot(*arguments: str | Path, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "patchpilot", *map(str, arguments)], cwd=cwd, env=environment(**extra),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


class Running:
    """A command that runs; what it says can be awaited."""

    def __init__(self, *arguments: str | Path, cwd: Path = ROOT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "patchpilot", *map(str, arguments)], cwd=cwd, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())

    def await_word(self, word: str, *, seconds: float = 60) -> None:
        until(
            lambda: any(word in line for line in self.said) or self.process.poll() is not None,
            seconds=seconds, what=f"{word!r} was said, after {self.said}",
        )  # fmt: skip
        assert any(word in line for line in self.said), self.said

    def end(self) -> tuple[int, str]:
        """Wait for its end. The exit code and what it wrote to standard output."""
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        code = self.process.wait(timeout=120)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()  # type: ignore[union-attr]
        return code, output
