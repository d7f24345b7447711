"""A variable that is not set must not turn an option into another one, or into none: every command refuses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from patchpilot.cli.app import app, run_app
from patchpilot.cli.blanks import refuse_blanks
from patchpilot.errors import Exit, Usage


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every option of every command that takes a value, after the command's words."""
    for each in command.params:
        if each.param_type_name == "option" and not each.is_flag:
            yield from ((*path, word) for word in each.opts)
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(inner, (*path, name))


ALL = sorted(set(options(typer.main.get_command(app))))


def test_there_are_commands_with_options() -> None:
    assert {("run", "--plan"), ("stop", "--reason"), ("db", "purge", "--retention"), ("recover", "-c")} <= {*ALL}


@pytest.mark.parametrize("words", ALL, ids=" ".join)
@pytest.mark.parametrize("value", ["", " \t"])
def test_an_empty_value_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], value: str
) -> None:
    given = [[*words, value]] + ([[*words[:-1], f"{words[-1]}={value}"]] if words[-1].startswith("--") else [])
    for arguments in given:
        assert run_app(arguments) == Exit.USAGE
        printed = capsys.readouterr()
        assert (printed.out, len(printed.err.splitlines())) == ("", 1)
        assert f"{words[-1]} has an empty value" in printed.err


def test_so_is_an_empty_argument() -> None:
    for arguments in (["status", ""], ["chords", "show", " "], ["report", "--write=", "x"], [""]):
        with pytest.raises(Usage, match="empty"):
            refuse_blanks(arguments)


def test_anything_else_is_the_commands_own_business() -> None:
    refuse_blanks(["run", "--plan", "x", "--waive=a", "--reason=a=", "--dry-run", "--", "-"])


def test_what_is_no_utf_8_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["chords", "show", "a\udce9"], ["recover", "--config=\udce9.toml"]):
        assert run_app(arguments) == Exit.USAGE
        printed = capsys.readouterr()
        assert (printed.out, len(printed.err.splitlines())) == ("", 1)
        assert r"\udce9" in printed.err
        assert "is no UTF-8" in printed.err
