"""What `make docs` writes is what is in the repository, and it shows every row of the tables it is made from."""

from __future__ import annotations

from typing import Any

import pytest

from patchpilot.engine.journal import RUN_TRANSITIONS, TRANSITIONS
from patchpilot.errors import Exit
from patchpilot.phases import RUNBOOK
from patchpilot.phases.order import Kind
from patchpilot.recovery.diagnose import CHORDS, MESSAGES
from patchpilot.recovery.findings import Remedy
from tools import docs


@pytest.mark.parametrize(("path", "text"), list(docs.pages()), ids=lambda value: getattr(value, "name", ""))
def test_the_documentation_is_up_to_date(path: Any, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_transition_is_in_both_pages() -> None:
    for page in (docs.README, docs.INDEX):
        text = page.read_text(encoding="utf-8").replace("_", " ")
        for (before, kind), after in {**RUN_TRANSITIONS, **TRANSITIONS}.items():
            arrows = [line for line in text.splitlines() if f" {before} --> {after}:" in line]
            assert any(str(kind) in line for line in arrows), (page, before, kind)


def test_every_phase_operation_and_exit_code_is_in_the_index() -> None:
    text = docs.INDEX.read_text(encoding="utf-8")
    for number in range(1, len(RUNBOOK) + 1):
        assert f"](p{number}-" in text
    assert all(f"`{kind}`" in text for kind in Kind)
    assert all(f"{code.value} {code.name.lower().replace('_', ' ')}" in text for code in Exit)
    assert all((docs.INDEX.parent / page).exists() for page in ("p8-report.md", "what-if.md"))


def test_every_diagnosis_that_is_reported_has_a_line_in_the_runbook_and_no_other() -> None:
    tables = {"chord": CHORDS, "message": MESSAGES}
    reported = {docs.anchor(kind, rule.name) for kind, rules in tables.items() for rule in rules if rule.report}
    lines = docs.advice()
    assert set(lines) == reported
    assert all(lines.values())
    text = docs.ADVICE.read_text(encoding="utf-8")
    assert all(text.count(f'<a id="{at}"></a>') == 1 for at in reported)


def test_every_diagnosis_and_every_remedy_is_on_the_page_with_its_evidence() -> None:
    text = docs.DIAGNOSES.read_text(encoding="utf-8")
    for rule in (*CHORDS, *MESSAGES):
        assert f"| {rule.evidence} | `{rule.remedy}` |" in text
        assert rule.why.partition("{")[0] in text
    assert all(f"| `{remedy}` | " in text for remedy in Remedy)
    assert "{" not in text


def test_a_change_of_the_table_changes_the_diagram() -> None:
    fewer = dict(list(TRANSITIONS.items())[:-1])
    assert docs.diagram(fewer) != docs.diagram(TRANSITIONS)
    renamed = {(before, kind): after for (before, kind), after in list(TRANSITIONS.items())[::-1]}
    assert docs.diagram(renamed) != docs.diagram(TRANSITIONS)


def test_a_readme_without_a_place_for_a_diagram_is_refused() -> None:
    with pytest.raises(SystemExit, match="0 places for 'phases'"):
        docs.readme("nothing here")
