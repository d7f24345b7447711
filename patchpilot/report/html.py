"""The report as one HTML file: no script, nothing from elsewhere, light or dark as the reader has it, fit to print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from patchpilot.report.pages import Cell, Code, Page, Section, Strong, length, page

Json = dict[str, Any]

_TONES = {
    "done": "good", "nothing-to-do": "calm", "aborted": "warn", "unfinished": "warn", "blocked": "warn",
    "stopped": "bad", "verification-failed": "bad",
}  # fmt: skip
"""The colour of each outcome; the words say the same."""

_GOOD = frozenset({"holds", "pass", "complete", "done"})
_WARN = frozenset({"warn", "unknown", "begun"})
_BAD = frozenset({"block", "does not hold"})

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html(report: Json) -> str:
    """The report as HTML."""
    it = page(report)
    style = files("patchpilot.report").joinpath("report.css").read_text(encoding="utf-8")
    parts = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name=viewport content="width=device-width"><meta name="color-scheme" content="light dark">',
        f"<title>{_text(it.title)}</title><style>{style}</style></head><body><main>",
        _header(it, _TONES[report["outcome"]]),
        _tiles(report),
        _bar(report),
        *map(_section, (Section("This run", rows=it.facts), *it.sections)),
        f"<footer>Made from the journal of run {_text(report['run_id'])}, and from nothing else.</footer>",
        "</main></body></html>",
    )
    return "\n".join(filter(None, parts)) + "\n"


def _header(it: Page, tone: str) -> str:
    why = f"<p class=why>{_text(it.why)}</p>" if it.why else ""
    verdict = f"<p class=verdict><strong>{_text(it.verdict)}</strong> {_text(it.more)}</p>"
    return f"<header class={tone}><p class=kind>patchpilot report</p><h1>{_text(it.title)}</h1>{verdict}{why}</header>"


def _tiles(report: Json) -> str:
    """The numbers that somebody asks for first."""
    claims = report["verification"]["claims"]
    skipped = report["findings"]["skipped"]
    nodes = report["nodes"]
    tiles = [
        ("Took", length(report["seconds"]) or "-"),
        ("Nodes done", f"{sum(node.get('status') == 'complete' for node in nodes)} of {len(nodes)}" if nodes else "-"),
        ("Failovers", len(report["failovers"])),
        ("Found stuck", "-" if skipped else len(report["findings"]["items"])),
        ("Recovered", "-" if skipped else len(report["remedies"]["after"])),
        ("Claims that hold", f"{sum(claim['holds'] for claim in claims)} of {len(claims)}" if claims else "-"),
    ]
    cells = "".join(f"<li><b>{_text(value)}</b><span>{_text(name)}</span></li>" for name, value in tiles)
    return f"<ul class=tiles>{cells}</ul>"


def _bar(report: Json) -> str:
    """How long each phase took, beside the others."""
    took = [phase for phase in report["phases"] if phase["seconds"]]
    if not took:
        return ""
    parts = "".join(
        f'<li class="p-{phase["name"]}" style="flex-grow:{max(phase["seconds"], 0):.0f}">'
        f"<span>{_text(phase['name'])}</span><small>{_text(length(phase['seconds']))}</small></li>"
        for phase in took
    )
    return f"<section><h2>Where the time went</h2><ol class=bar>{parts}</ol></section>"


def _section(section: Section) -> str:
    text = f"<p>{_text(section.text)}</p>" if section.text else ""
    return f"<section><h2>{_text(section.title)}</h2>{text}{_table(section.head, section.rows)}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    if not rows:
        return ""
    titles = "".join(f"<th scope=col>{_text(title)}</th>" for title in head)
    opened = f"<table><thead><tr>{titles}</tr></thead>" if any(head) else "<table class=facts>"
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div class=wide>{opened}<tbody>{body}</tbody></table></div>"


def _cell(value: Cell) -> str:
    words = " ".join(map(_words, value)) if isinstance(value, tuple) else _words(value)
    first = value[0] if isinstance(value, tuple) else value
    plain = str(first.text if isinstance(first, Strong) else first).rstrip(",")
    tone = next((name for name, group in (("good", _GOOD), ("warn", _WARN), ("bad", _BAD)) if plain in group), "")
    return f"<td><span class={tone}>{words}</span></td>" if tone else f"<td>{words}</td>"


def _words(value: Any) -> str:
    match value:
        case None | "":
            return "<i>-</i>"
        case Code(text):
            return f"<code>{_words(text)}</code>"
        case Strong(text):
            return f"<strong>{_words(text)}</strong>"
    return _text(value)


def _text(value: Any) -> str:
    return escape(str(value))
