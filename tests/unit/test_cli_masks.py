"""The last doors that a secret could leave by."""

from __future__ import annotations

import json

import pytest

from patchpilot.cli import app as cli
from patchpilot.cli.console import emit_json
from patchpilot.errors import Exit, Unsafe

SECRET = "cannot reach rediss://:hunter2@h:6379/0"


@pytest.mark.parametrize(("error", "code"), [(Unsafe(SECRET), Exit.ERROR), (ValueError(SECRET), Exit.ERROR)])
def test_errors_are_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run_app([]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "rediss://***@h:6379/0" in printed.err
    assert "hunter2" not in printed.err


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unsafe("there is no plan a\n b")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run_app([]) == Exit.ERROR
    assert capsys.readouterr().err == "patchpilot: there is no plan a b\n"


def test_data_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"why": SECRET, "dsn": "host=h password=hunter2"})
    assert json.loads(capsys.readouterr().out) == {
        "why": "cannot reach rediss://***@h:6379/0", "dsn": "host=h password=***",
    }  # fmt: skip
