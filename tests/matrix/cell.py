"""One cell: a virtual environment for its Python and its Celery, and one run of the tests in it against its server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from patchpilot.lab.programs import SERVER_VARIABLE
from tests.matrix.finding import Server

ROOT = Path(__file__).resolve().parents[2]
_TAIL = 15


@dataclass(frozen=True)
class Cell:
    """What is tested together."""

    python: str
    interpreter: Path
    celery: str
    """A minor version, whose newest release is taken, or a full one."""
    server: Server

    def __str__(self) -> str:
        return f"Python {self.python}, Celery {self.celery}, {self.server.name}"


@dataclass(frozen=True)
class Outcome:
    """How the tests of one cell went."""

    versions: str = "-"
    """The Celery, kombu and redis-py that pip chose."""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""
    """The end of the log, if anything is wrong."""


class Bench:
    """Where cells run.

    :param scratch: for virtual environments, logs and reports; made if it is missing.
    :param extra: requirements besides the cell's own, like ``kombu==5.4.*``.
    :param arguments: for pytest, besides the selection of the tests.
    """

    def __init__(self, scratch: Path, extra: Sequence[str] = (), arguments: Sequence[str] = ()) -> None:
        self._scratch = scratch
        self._extra = tuple(extra)
        self._arguments = tuple(arguments)

    def run(self, cell: Cell) -> Outcome:
        """Install what the cell needs, and run its tests."""
        environment = self._scratch / f"py{cell.python}-celery{cell.celery}"
        name = f"{environment.name}-{cell.server.name.lower().replace(' ', '')}"
        log = self._scratch / f"{name}.log"
        self._scratch.mkdir(parents=True, exist_ok=True)
        if not (self._install(cell, environment, log) and (versions := _versions(environment, log))):
            return Outcome(problem=_tail(log))
        report = log.with_suffix(".xml")
        report.unlink(missing_ok=True)
        tests = ["pytest", "-q", "-m", "backend and not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
        good = _run(
            [environment / "bin/python", "-m", *tests, *self._arguments], log,
            **{SERVER_VARIABLE: str(cell.server.program)},
        )  # fmt: skip
        return read(report, versions, "" if good else _tail(log))

    def _install(self, cell: Cell, environment: Path, log: Path) -> bool:
        log.unlink(missing_ok=True)
        if not environment.exists() and not _run([cell.interpreter, "-m", "venv", environment], log):
            return False
        wanted = f"celery[redis]=={cell.celery}" + ("" if cell.celery.count(".") > 1 else ".*")
        pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        return _run([*pip, "--upgrade", wanted, "--editable", ".[test]", *self._extra], log)


def _run(command: Sequence[str | Path], log: Path, **variables: str) -> bool:
    with log.open("ab") as output:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    return done.returncode == 0


def _versions(environment: Path, log: Path) -> str:
    script = (
        "import json, importlib.metadata as m; "
        "print(json.dumps([m.version(name) for name in ('celery', 'kombu', 'redis')]))"
    )
    done = subprocess.run([environment / "bin/python", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        log.write_text(done.stderr)
        return ""
    return " / ".join(json.loads(done.stdout))


def read(report: Path, versions: str, problem: str) -> Outcome:
    """Count what pytest reported. No report, or no test that passed, is a problem as well."""
    if not report.exists():
        return Outcome(versions, problem=problem or "no report")
    [suite] = ET.parse(report).getroot().iter("testsuite")  # noqa: S314 - written by our own pytest
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    if not passed:
        problem = problem or "no test passed"
    return Outcome(versions, passed, failed, count["skipped"], float(suite.get("time", 0)), problem)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    return "\n".join([*lines, f"  the whole of it: {log}"])
