"""Which parts of a chord a signature brings, as Celery's own canvases apply their options when they run."""

from __future__ import annotations

from typing import Any

import pytest

from patchpilot.recovery.stock import _of_signature

END = {"task": "end", "options": {"task_id": "e"}}
PART = {"chord": END, "group_id": "g", "group_index": 1}


def task(task_id: str | None = None, **options: Any) -> dict[str, Any]:
    return {"task": "t", "options": {"task_id": task_id, **options}, "kwargs": {}, "subtask_type": None}


def canvas(kind: str, kwargs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"task": f"celery.{kind}", "options": options, "kwargs": kwargs, "subtask_type": kind}


@pytest.mark.parametrize(
    ("signature", "parts"),
    [
        (task("a"), []),
        (task("a", **PART), [("g", "a")]),
        (task("a", **(PART | {"chord": None})), []),
        (canvas("chain", {"tasks": [task("a"), task("b")]}, **PART), [("g", "b")]),
        (canvas("chain", {"tasks": [task("a"), task()]}, task_id="c", **PART), [("g", "c")]),
        (canvas("chain", {"tasks": [task("a"), task("b", **PART)]}), [("g", "b")]),
        (canvas("chain", {"tasks": [task("a"), task()]}, **PART), []),
        (canvas("group", {"tasks": [task("a", **PART), task("b", **PART)]}, task_id="c", **PART),
         [("g", "a"), ("g", "b")]),
        (canvas("chord", {"header": [task("a")], "body": task("b", **PART)}, task_id="c"), [("g", "b")]),
        (canvas("chord", {"header": [task("a")], "body": task("b")}, task_id="c", **PART), [("g", "b")]),
        (task("a", chord=END | {"options": {"task_id": "e", **PART, "group_id": "around"}}, group_id="g"),
         [("g", "a"), ("around", "e")]),
    ],
)  # fmt: skip
def test_parts_of_a_signature(signature: dict[str, Any], parts: list[tuple[str, str]]) -> None:
    assert [(part.group_id, part.task_id) for part in _of_signature(signature)] == parts
