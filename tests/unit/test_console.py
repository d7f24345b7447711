"""What a terminal is given: nothing that it would act upon, and nothing that it cannot show."""

from __future__ import annotations

import io
import json
import sys

import pytest

from patchpilot.cli.console import WIDEST, emit, emit_json, emit_line, emit_page, emit_table, say

EVIL = "evil\x1b]0;pwn\x07\x1b[2J\r\nINJECTED\u202e\u2028\x85 任务 é"
SHOWN = r"evil\x1b]0;pwn\x07\x1b[2J\r\nINJECTED\u202e\u2028\x85 任务 é"


def test_what_a_terminal_would_act_upon_is_shown_as_an_escape(capsys: pytest.CaptureFixture[str]) -> None:
    emit(EVIL)
    emit_table(("CALLBACK", "N"), [(EVIL, 1), ("t", EVIL)])
    say(EVIL)
    printed = capsys.readouterr()
    first, header, *rows = printed.out.splitlines()
    assert (first, printed.err) == (SHOWN, f"{SHOWN}\n")
    assert header.index("N") == rows[0].index("1", len(SHOWN)) == rows[1].index("evil")
    assert rows == [f"{SHOWN}  1", f"t{' ' * len(SHOWN)} {SHOWN}"]


def test_a_page_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    emit_page("a\n\tb\x1b\r\n")
    assert capsys.readouterr().out == "a\n\tb\\x1b\\r\n\n"


def test_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    emit_line({"name": EVIL + "n" * 3000})
    assert json.loads(capsys.readouterr().out) == {"name": EVIL + "n" * 3000}
    emit_json({"name": [EVIL]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name": [EVIL]}
    assert len(printed.splitlines()) == 5


def test_a_table_is_no_wider_than_is_sensible_but_ids_and_the_last_column_are_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    most = "m" * WIDEST
    rows = [("i" * 300, "first" + "n" * 3000 + "last", "r" * 300), ("i", most, "r")]
    emit_table(("ID", "CALLBACK", "WHY"), rows)
    _, (number, name, why), (_, other, _) = map(str.split, capsys.readouterr().out.splitlines())
    assert (number, why, other) == ("i" * 300, "r" * 300, most)
    assert (name[:5], name[-4:], len(name) <= WIDEST) == ("first", "last", True)
    assert "...n" in name


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_cannot_be_encoded_is_shown_as_an_escape(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    emit("任 é")
    emit_table(("NAME", ""), [("任 é", "务")])
    shown = "\\u4efb \\xe9" if encoding == "ascii" else "\\u4efb é"
    assert written.getvalue().decode(encoding).splitlines()[::2] == [shown, f"{shown}   \\u52a1"]
