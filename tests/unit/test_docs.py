"""What the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["promise.md", "losses.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(named) > 20
    missing = [
        f"{file}::{test}"
        for file, test in named
        if f"def {test}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_every_row_of_the_loss_model_is_told_with_its_test_or_the_reason_why_there_is_none() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "losses.md").read_text(encoding="utf-8").splitlines()]
    numbered = [row for row in rows if row[0].removeprefix("| ").isdecimal()]
    assert [int(row[0].removeprefix("| ")) for row in numbered] == list(range(1, 27))
    assert all(len(row) == 5 and all(row) for row in numbered)
    assert [row[0] for row in numbered if "::test_" not in row[4] and "no test: " not in row[4]] == []


def test_every_scenario_of_a_loss_is_on_the_page() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    modules = sorted((ROOT / "tests" / "scenarios").glob("test_losses*.py"))
    assert len(modules) == 2
    scenarios = [name for it in modules for name in re.findall(r"^def (test_\w+)", it.read_text(), re.MULTILINE)]
    assert [name for name in scenarios if f"::{name}`" not in page] == []


def test_every_sentence_of_the_promise_names_a_test() -> None:
    text = (ROOT / "docs" / "promise.md").read_text(encoding="utf-8")
    promised = text[text.index("## Promised") : text.index("## Where an effect")]
    rows = [line for line in promised.splitlines() if line.startswith("|") and line.count("|") == 3]
    sentences = [row for row in rows if not row.startswith(("| |", "|---"))]
    assert sentences
    assert [row for row in sentences if "::test_" not in row] == []


def test_every_setting_is_documented() -> None:
    from patchpilot.backend import config

    settings = set(re.findall(r'"(patchpilot_\w+)"', Path(config.__file__).read_text(encoding="utf-8")))
    settings -= {config.MESSAGE_ID, config.CALLBACK_OF, config.FOLLOWS, config.ORIGIN, config.TO_ALL}
    table = (ROOT / "docs" / "promise.md").read_text(encoding="utf-8")
    assert [name for name in sorted(settings) if f"| `{name}` |" not in table] == []


def test_every_metric_and_every_event_is_documented() -> None:
    from patchpilot.cli import watch
    from patchpilot.cli.monitor import Metrics

    page = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(patchpilot_recovery_\w+?)(?:_total)?[`{]", page)) - {
        "patchpilot_recovery_min_age", "patchpilot_recovery_every", "patchpilot_recovery_dead_after",
    }  # fmt: skip
    assert documented == {metric.name for metric in Metrics().registry.collect()}
    events = set(re.findall(r'"event": "([\w ]+)"', Path(watch.__file__).read_text(encoding="utf-8")))
    assert events
    assert [event for event in events if f"`{event}`" not in page] == []
