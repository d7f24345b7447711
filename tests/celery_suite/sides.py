"""One session of Celery's tests on real servers of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from patchpilot.errors import NeedsOperator
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.postgres.connection import Database
from patchpilot.postgres.migrate import migrate
from tests.celery_suite.outcomes import Result, read
from tests.celery_suite.scratch import COUNTING

MODULES = ("t/integration/test_canvas.py", "t/integration/test_tasks.py")

_HOUR = 3600.0
_TEST_SECONDS = 300
"""What Celery's own mark allows a test; here every test, or one that hangs would take the session with it."""
# Of pytest: all passed, some failed, nothing was selected. Anything else means that it did not get to the end.
_ENDED = (0, 1, 5)
_FOREIGN = ("PATCHPILOT_", "TEST_", "REDIS_", "PYTEST_", "PYTHON", "CELERY_", "VIRTUAL_ENV", "WORKER_LOGLEVEL")


@dataclass(frozen=True, slots=True)
class Side:
    """A backend under test."""

    name: str
    title: str
    prefix: str = ""
    """What comes before the address of Valkey in the URL of its result backend."""


STOCK = Side("stock", "stock Redis")
OURS = Side("ours", "patchpilot", "patchpilot+")


@dataclass(frozen=True, slots=True)
class Bench:
    """What both sides have in common.

    :param python: the interpreter that runs Celery's tests.
    :param suite: the unpacked tests.
    :param site: where patchpilot is installed.
    :param counting: where our backend counts the parts of chords: its setting `patchpilot_counting`.
    """

    python: Path
    suite: Path
    site: Path
    roster: Roster
    counting: str

    def run(self, side: Side, directory: Path, selection: Sequence[str]) -> dict[str, Result]:
        """Run a session with a Valkey of its own, broker and backend in one database.

        :param directory: for the logs; made here.
        :param selection: of tests, as arguments of pytest.
        :raises NeedsOperator: if pytest did not get to its end.
        """
        directory.mkdir()
        with self._servers(side, directory) as environment:
            code = self._pytest(directory, selection, environment)
        report = directory / "report.jsonl"
        results = read(report.read_text(encoding="utf-8").splitlines()) if report.exists() else {}
        if code not in _ENDED:
            what = "took more than an hour" if code is None else f"ended with exit code {code}"
            raise NeedsOperator(f"{side.title}: pytest {what}, after {len(results)} tests; see {directory}/pytest.log")
        return results

    @contextmanager
    def _servers(self, side: Side, directory: Path) -> Iterator[dict[str, str]]:
        """Start the servers; gives the environment that leads to them."""
        with ExitStack() as cleanup:
            valkey = ValkeyNode(f"valkey-{side.name}", directory, roster=self.roster)
            cleanup.callback(valkey.stop)
            valkey.start()
            environment = {
                "TEST_BROKER": valkey.url, "TEST_BACKEND": f"{side.prefix}{valkey.url}",
                "REDIS_HOST": valkey.address.host, "REDIS_PORT": str(valkey.address.port),
                "WORKER_LOGLEVEL": "INFO", "PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONUNBUFFERED": "1",
            }  # fmt: skip
            if side.prefix:
                postgres = Postgres(directory, roster=self.roster, name=f"postgres-{side.name}")
                cleanup.callback(postgres.discard)
                postgres.start()
                with Database(postgres.dsn) as database:
                    migrate(database)
                environment |= {"PATCHPILOT_POSTGRES": postgres.dsn, COUNTING: self.counting}
            yield environment

    def _pytest(self, directory: Path, selection: Sequence[str], environment: dict[str, str]) -> int | None:
        """Its exit code, or None if it took too long."""
        argv = [
            self.python, "-m", "pytest", "-p", "celery.contrib.pytest", "-p", "no:cacheprovider", "-v", "--tb=short",
            # A pass is a pass, also where Celery expects a failure.
            "--override-ini=xfail_strict=false",
            f"--timeout={_TEST_SECONDS}", f"--report-log={directory / 'report.jsonl'}", *selection,
        ]  # fmt: skip
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        with (directory / "pytest.log").open("wb") as log:
            process = subprocess.Popen(
                argv, cwd=self.suite, env={**kept, **environment}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        identity = self.roster.add("pytest", process.pid, signal.SIGINT)
        try:
            return process.wait(_HOUR)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # The worker's pool is in the same session, and outlives a pytest that is killed.
            _end_group(process)
            self.roster.drop(identity)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
