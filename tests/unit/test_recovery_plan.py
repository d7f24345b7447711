"""A dry run as a plan: exactly that is done later, of exactly those messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.errors import Usage
from patchpilot.recovery.findings import Finding, Remedy, Window
from patchpilot.recovery.plan import Plan, as_data, compare, read

WINDOW = Window(timedelta(0), timedelta(hours=2))


def lost(*messages: str, kind: Any = "chord") -> Finding:
    return Finding(kind, "g", "header-message-lost", Remedy.REPUBLISH, "lost", messages=messages)


def planned(path: Path, *findings: Finding) -> Plan:
    path.write_text(json.dumps(as_data(findings, WINDOW)))
    return read(path)


def test_only_the_messages_of_the_plan_are_sent(tmp_path: Path) -> None:
    plan = planned(tmp_path / "plan", lost("a", "b"))
    assert plan.window == WINDOW
    assert compare(plan, [lost("b", "a")]) == ((lost("b", "a"),), ())
    [agreed], [change] = compare(plan, [lost("a", "c", "d")])
    assert agreed.messages == ("a",)
    assert change.now == "header-message-lost, of 1 of its 2 messages and of 2 others"
    [agreed], [change] = compare(plan, [lost("a", "b", "c")])
    assert agreed.messages == ("a", "b")
    nothing, [change] = compare(plan, [lost("c")])
    assert nothing == ()
    assert compare(plan, [])[1][0].now == "gone"


def test_what_needs_no_message_is_compared_without(tmp_path: Path) -> None:
    finding = Finding("chord", "g", "dispatch-lost", Remedy.DISPATCH_CALLBACK, "lost")
    assert compare(planned(tmp_path / "plan", finding), [finding]) == ((finding,), ())


def test_kinds_that_are_not_asked_for_are_not_compared(tmp_path: Path) -> None:
    plan = planned(tmp_path / "plan", lost("a"), lost("b", kind="task"))
    assert compare(plan, [lost("b", kind="task")], ("task",)) == ((lost("b", kind="task"),), ())


def test_the_digest_is_of_the_messages_and_of_the_window() -> None:
    digests = {as_data([lost(*ids)], WINDOW)["digest"] for ids in ("a", "b", "ab", "ba")}
    digests.add(as_data([lost("a")], Window())["digest"])
    assert len(digests) == 4


def of_kind(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["findings"][0].update(kind=value)


@pytest.mark.parametrize(
    "spoil",
    [
        of_kind(["chord"]), of_kind(None), of_kind("\ud800"), of_kind("task"),
        lambda data: data["findings"].append({**data["findings"][0], "id": 3}),
        lambda data: data["findings"][0].update(messages="a"),
        lambda data: data["findings"][0].update(messages=["b"]),
        lambda data: data["window"].update(min_age_seconds="0"),
        lambda data: data["window"].update(max_age_seconds=float("nan")),
        lambda data: data["window"].update(min_age_seconds=60),
        lambda data: data.pop("window"),
        lambda data: data.update(findings={"a": 1}),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    data = as_data([lost("a")], WINDOW)
    spoil(data)
    (tmp_path / "plan").write_text(json.dumps(data))
    with pytest.raises(Usage, match="--plan: "):
        read(tmp_path / "plan")


def test_an_id_that_cannot_be_printed_is_refused_though_its_digest_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding("chord", "\ud800", "dispatch-lost", Remedy.DISPATCH_CALLBACK, "lost")
    with monkeypatch.context() as patch:
        patch.setattr("patchpilot.recovery.plan._texts", list)
        content = as_data([finding], WINDOW)
    (tmp_path / "plan").write_text(json.dumps(content))
    with pytest.raises(Usage, match="is no plan"):
        read(tmp_path / "plan")


def test_a_file_that_only_opens_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("[" * 100_000)
    with pytest.raises(Usage, match="is no plan"):
        read(tmp_path / "plan")
