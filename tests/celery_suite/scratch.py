"""The scratch folder: Celery's tests as its sdist ships them, and an environment that runs them."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from patchpilot.errors import NeedsOperator

ROOT = Path(__file__).resolve().parents[2]

COUNTING = "SUITE_COUNTING"
"""Environment variable of the tests: where our backend counts."""

# What of the sdist is unpacked. Celery itself is not: the one that is tested is the one that pip installs.
_UNPACKED = ("t/__init__.py", "t/canvas_helpers.py", "t/skip.py", "t/integration/", "pyproject.toml", "requirements/")

# What the two modules need of all that Celery's tests require, in the versions that Celery pins.
_NEEDED = ("pytest", "pytest-rerunfailures", "pytest-subtests", "pytest-timeout", "pydantic")

# These ask which backend they run on by the beginning of its URL, and skip if it is not stock Redis.
_ASKED = re.compile(r"\b(result_backend|TEST_BACKEND)\.startswith\(")

# Some tests rely on the worker that a test before them has started. Alone, or in a second session, there is none.
# Where our backend counts is a setting, and Celery's tests have settings of their own.
_CONFTEST = f"""
import os
import pytest

@pytest.fixture(scope="session", autouse=True)
def counting(celery_session_app):
    wanted = os.environ.get("{COUNTING}")
    if wanted:
        celery_session_app.conf.patchpilot_counting = wanted
        assert celery_session_app.backend.config.counting == wanted

@pytest.fixture(scope="session", autouse=True)
def worker_for_all(counting, celery_session_worker):
    yield
"""


class Scratch:
    """A folder outside the tree for whatever is fetched and written. What was fetched serves the next run too.

    :param folder: made if it is not there; by default one in the system's temporary directory.
    :param version: of Celery.
    :raises NeedsOperator: if the folder is somebody else's or cannot be made.
    """

    def __init__(self, folder: Path | None, version: str) -> None:
        self.folder = folder or Path(tempfile.gettempdir()) / f"patchpilot-celery-suite-{os.getuid()}"
        self.version = version
        self._environment = self.folder / f"venv-{version}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise NeedsOperator(f"no scratch folder {self.folder}: {error.strerror}; use --scratch") from None
        if owner != os.getuid():
            raise NeedsOperator(f"the scratch folder {self.folder} is another user's; use --scratch")

    @property
    def python(self) -> Path:
        """The interpreter that has Celery, and what its tests and patchpilot need."""
        return self._environment / "bin" / "python"

    @property
    def stock_results(self) -> Path:
        """Where the results with stock Redis are kept from one run to the next."""
        return self.folder / f"stock-{self.version}.json"

    def run_directory(self) -> Path:
        """A new directory for one run: its copy of the tests, its logs."""
        return Path(tempfile.mkdtemp(prefix=f"run-{self.version}-", dir=self.folder))

    def unpack(self, directory: Path) -> Path:
        """Put Celery's tests below ``directory``, ready to run on any backend that builds on Redis.

        :raises NeedsOperator: if the sdist cannot be fetched or does not hold them.
        """
        top = f"celery-{self.version}/"
        wanted = tuple(top + part for part in _UNPACKED)
        with tarfile.open(self._sdist()) as archive:
            members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
            archive.extractall(directory, members, filter="data")
        suite = directory / top
        if not (suite / "t" / "integration").is_dir():
            raise NeedsOperator(f"the sdist of Celery {self.version} ships no t/integration")
        changed = sum(_let_run(file) for file in (suite / "t" / "integration").glob("*.py"))
        if not changed:
            raise NeedsOperator(f"Celery {self.version} asks for its backend in a way that is not known here")
        (suite / "conftest.py").write_text(_CONFTEST, encoding="utf-8")
        return suite

    def install(self, suite: Path, site: Path) -> None:
        """Make the environment, or bring it up to date.

        :param site: patchpilot goes here as it is now: what is edited while the tests run does not change them.
        :raises NeedsOperator: if pip cannot.
        """
        with self._alone():
            if not self.python.exists():
                _run([sys.executable, "-m", "venv", self._environment], "no virtual environment")
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            pinned = [f"celery[redis]=={self.version}", *requirements(suite / "requirements"), "pytest-reportlog"]
            _pip(self.python, "install", *project["dependencies"], *pinned)
        _pip(self.python, "install", "--no-deps", "--target", site, ROOT)

    def _sdist(self) -> Path:
        sdist = self.folder / f"celery-{self.version}.tar.gz"
        with self._alone():
            if not sdist.exists():
                wanted = ["--no-deps", "--no-binary", "celery", f"celery=={self.version}"]
                with tempfile.TemporaryDirectory(dir=self.folder) as partial:
                    _pip(sys.executable, "download", *wanted, "--dest", partial)
                    (Path(partial) / sdist.name).replace(sdist)
        return sdist

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time fetches and installs."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def requirements(folder: Path) -> list[str]:
    """The requirements of Celery's tests that are needed here, as Celery's own files pin them."""
    lines = {line for file in folder.rglob("*.txt") for line in file.read_text(encoding="utf-8").splitlines()}
    return sorted(line for line in lines if re.split(r"[^\w-]", line, maxsplit=1)[0].lower() in _NEEDED)


def let_run(code: str) -> tuple[str, int]:
    """Celery's code with each question for a Redis backend answered for ours as for stock; and how many there were."""
    return _ASKED.subn(r"\1.removeprefix('patchpilot+').startswith(", code)


def _let_run(file: Path) -> int:
    code, count = let_run(file.read_text(encoding="utf-8"))
    if count:
        file.write_text(code, encoding="utf-8")
    return count


def _pip(python: str | Path, *arguments: str | Path) -> None:
    _run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], "pip failed")


def _run(argv: Sequence[str | Path], trouble: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise NeedsOperator(f"{trouble}: {words[-1] if words else f'exit code {done.returncode}'}")
