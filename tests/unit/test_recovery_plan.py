"""A dry run as a plan: exactly that is done later, of exactly those messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.dsn import masked
from patchpilot.errors import Usage
from patchpilot.recovery.findings import Finding, Remedy, Window
from patchpilot.recovery.plan import LARGEST, Plan, as_data, compare, hold_to, place_of, read
from patchpilot.workers.application import Site

WINDOW = Window(timedelta(0), timedelta(hours=2))
SITE = Site("rediss://:hunter2@Valkey:6380/1", "postgresql://u:hunter2@db/orders", "p:")


def lost(*messages: str, kind: Any = "chord") -> Finding:
    return Finding(kind, "g", "header-message-lost", Remedy.REPUBLISH, "lost", messages=messages)


def planned(path: Path, *findings: Finding) -> Plan:
    path.write_text(json.dumps(masked(as_data(findings, WINDOW, SITE))))  # as it is printed
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
    digests = {as_data([lost(*ids)], WINDOW, SITE)["digest"] for ids in ("a", "b", "ab", "ba")}
    digests.add(as_data([lost("a")], Window(), SITE)["digest"])
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
        lambda data: data["findings"][0].update(reason="all is well"),
        lambda data: data["findings"][0].update(callback="another"),
        lambda data: data["findings"][0].update(total=3),
        lambda data: data["findings"][0].pop("reason"),
        lambda data: data["site"].update(broker="valkey:6380/2#p:"),
        lambda data: data["site"].update(database=None),
        lambda data: data.update(site="valkey:6380/1#p:"),
        lambda data: data.update(findings={"a": 1}),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    data = as_data([lost("a")], WINDOW, SITE)
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
        content = as_data([finding], WINDOW, SITE)
    (tmp_path / "plan").write_text(json.dumps(content))
    with pytest.raises(Usage, match="is no plan"):
        read(tmp_path / "plan")


def test_a_file_that_only_opens_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("[" * 100_000)
    with pytest.raises(Usage, match="is no plan"):
        read(tmp_path / "plan")


def test_a_plan_is_of_one_site_and_says_so_without_secrets(tmp_path: Path) -> None:
    plan = planned(tmp_path / "plan", lost("a"))
    assert plan.place == {"broker": "valkey:6380/1#p:", "database": "db:5432/orders"}
    hold_to(plan, SITE)
    hold_to(plan, replace(SITE, dsn="host=DB port=5432 dbname=orders user=another password=x"))
    for other, words in (
        (replace(SITE, endpoint="rediss://valkey:6380/2"), "the broker valkey:6380/1#p:, and this is valkey:6380/2#p:"),
        (replace(SITE, broker="named"), "the broker valkey:6380/1#p:, and this is named"),
        (replace(SITE, dsn="postgresql://db/bills"), "the database db:5432/orders, and this is db:5432/bills"),
        (replace(SITE, dsn="postgresql://db2/orders"), "and this is db2:5432/orders"),
        (replace(SITE, dsn="postgresql://db:5433/orders"), "and this is db:5433/orders"),
    ):
        with pytest.raises(Usage, match=words):
            hold_to(plan, other)


def test_what_a_dsn_leaves_out_is_as_libpq_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("PGPORT", "6543")
    assert place_of(replace(SITE, dsn="user=me"))["database"] == "elsewhere:6543/me"
    assert place_of(replace(SITE, dsn="service=prod"))["database"].endswith(" (service prod)")


def test_a_plan_of_an_older_version_says_so(tmp_path: Path) -> None:
    data = as_data([lost("a")], WINDOW, SITE)
    del data["site"]
    (tmp_path / "plan").write_text(json.dumps(data))
    with pytest.raises(Usage, match="made by an older version: make a new dry run"):
        read(tmp_path / "plan")


def test_what_is_masked_is_still_as_it_was_printed(tmp_path: Path) -> None:
    finding = replace(lost("a"), reason="cannot ask redis://:hunter2@h:1/0, password=hunter2", callback="a password: b")
    assert planned(tmp_path / "plan", finding).items
    assert "hunter2" not in (tmp_path / "plan").read_text()


def test_a_file_without_an_end_is_read_no_further_than_a_plan_is_long(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="/dev/zero is larger than 64 MB"):
        read(Path("/dev/zero"))
    content = json.dumps(as_data([lost("a")], WINDOW, SITE))
    (tmp_path / "plan").write_text(content + " " * (LARGEST - len(content)))
    assert len(read(tmp_path / "plan").items) == 1
