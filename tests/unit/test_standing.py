"""Where a callback stands: it has run when all its tasks have ended, and not before."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from patchpilot.recovery.standing import has_errbacks, over, task_ids, under_way


def leaf(task_id: str) -> dict[str, Any]:
    return {"task": "t", "kwargs": {}, "options": {"task_id": task_id}, "subtask_type": None}


def canvas(kind: str, **inside: Any) -> dict[str, Any]:
    return {"task": f"celery.{kind}", "kwargs": inside, "options": {"task_id": "whole"}, "subtask_type": kind}


def message(task_id: str, attempt: str = "0/0") -> dict[str, Any]:
    return {"task_id": task_id, "task_name": "t", "attempt": attempt, "queue": "q"}


def start(task_id: str, *, finished: bool = False, dead: bool = False) -> dict[str, Any]:
    finished_at = "then" if finished else None
    return {"task_id": task_id, "attempt": "0/0", "worker": "w", "finished_at": finished_at, "lease_over": dead}


def result(task_id: str, state: str) -> dict[str, Any]:
    return {"task_id": task_id, "state": state}


NESTED = canvas("chain", tasks=[leaf("a"), canvas("chord", header=canvas("group", tasks=[leaf("b")]), body=leaf("c"))])


def stored(payload: bytes | None, kind: str | None = "application/json", encoding: str = "utf-8") -> dict[str, Any]:
    return {"callback_id": "x", "callback": payload, "callback_type": kind, "callback_encoding": encoding}


def test_the_tasks_of_a_callback() -> None:
    assert task_ids(stored(json.dumps(NESTED).encode())) == ("a", "b", "c")
    assert task_ids(stored(b"[")) == ("x",)
    assert task_ids(stored(None, None)) == ("x",)


def test_what_may_not_be_decoded_is_known_by_its_own_id_and_is_not_decoded() -> None:
    pickled = stored(pickle.dumps(NESTED), "application/x-python-serialize", "binary")
    assert task_ids(pickled, ["json", "pickle"]) == ("a", "b", "c")
    assert task_ids(pickled) == ("x",)
    assert task_ids({**pickled, "callback": b"..."}, ["pickle"]) == ("x",)


@pytest.mark.parametrize(
    ("messages", "starts", "results", "said"),
    [
        ([message("a")], [], [], "its callback was sent to queue q and has not begun"),
        ([message("a")], [start("a")], [result("a", "STARTED")], "its callback runs, on w"),
        ([message("a")], [], [result("a", "STARTED")], "its callback runs, as its worker said"),
        ([message("a")], [start("a", dead=True)], [],
         "its callback began and its worker died: recovery sends it again"),
        ([message("a", "1/0")], [start("a", finished=True)], [result("a", "RETRY")],
         "its callback waits for a retry, in queue q"),
    ],
)  # fmt: skip
def test_a_callback_that_is_under_way(messages: Any, starts: Any, results: Any, said: str) -> None:
    assert under_way(("a",), messages, starts, results) == said


def test_a_callback_of_several_tasks_has_run_when_all_have_ended() -> None:
    first, both = [result("a", "SUCCESS")], [result("a", "SUCCESS"), result("b", "SUCCESS")]
    assert under_way(("a", "b"), [message("b")], [], first) == (
        "1 of 2 tasks of its callback ended; its callback was sent to queue q and has not begun"
    )
    assert "1 of 2 tasks of its callback ended, and of the others" in str(over(("a", "b"), [], first))
    assert over(("a", "b"), [], both) == "its callback has run: SUCCESS"
    assert over(("a", "b"), [start("b", finished=True)], first) == "its callback has run: SUCCESS"


def test_a_task_that_waits_for_a_retry_has_not_ended() -> None:
    said = under_way(("a", "b"), [message("a", "1/0")], [start("a", finished=True)], [])
    assert said == "its callback waits for a retry, in queue q"


def test_what_was_revoked_has_not_run() -> None:
    assert over(("a",), [], [result("a", "REVOKED")]) == "its callback has not run: it had expired, or was revoked"
    assert over(("a",), [start("a")], [result("a", "REVOKED")]) == "its callback began and was revoked"
    assert over(("a",), [start("a", finished=True)], [result("a", "RETRY")]) is None
    assert over(("a",), [], []) is None


def test_an_errback_is_found_wherever_in_the_callback_it_is() -> None:
    mourned = {**leaf("a"), "options": {"task_id": "a", "link_error": [leaf("e")]}}
    named = {**leaf("a"), "kwargs": {"tasks": [mourned]}}  # its own argument, and no canvas
    for signature, said in (
        (leaf("a"), False), (mourned, True), (NESTED, False), (named, False),
        (canvas("group", tasks=[leaf("b"), mourned]), True),
        (canvas("chord", header=canvas("group", tasks=[leaf("b")]), body=mourned), True),
    ):  # fmt: skip
        assert has_errbacks(stored(json.dumps(signature).encode())) is said
    assert has_errbacks(stored(b"[")) is None
    assert has_errbacks(stored(None, None)) is None
