"""The report as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchpilot.report.pages import Cell, Code, Section, Strong, page


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    it = page(report)
    head = [f"# {it.title}", "", f"**{it.verdict}** {it.more}", *(["", f"> {_line(it.why)}"] if it.why else [])]
    parts = [[*head, "", *_table(("", ""), it.facts)], *map(_section, it.sections)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _section(section: Section) -> list[str]:
    text = ["", section.text] if section.text else []
    return [f"## {section.title}", *text, *(["", *_table(section.head, section.rows)] if section.rows else [])]


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    body = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body]


def _cell(value: Cell) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return "-" if value in (None, "") else _words(value)


def _words(value: Any) -> str:
    match value:
        case Code(text):
            return f"`{_words(text)}`"
        case Strong(text):
            return f"**{_words(text)}**"
    return _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())
