"""The diagnosis tables: pure, complete, and one test a row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchpilot.recovery.diagnose import CHORDS, MESSAGES, Header, diagnose, first
from patchpilot.recovery.evidence import Chord, Evidence, Message, Where
from patchpilot.recovery.findings import Remedy

HOUR = timedelta(hours=1)


def chord(**changes: object) -> Chord:
    values: dict[str, object] = {
        "group_id": "g", "callback": "total", "age": HOUR, "total": 3, "returned": 1, "ended": 0, "inner_chords": 0,
        "messages": 2, "claimed": False, "claim_live": False, "publish_error": None,
    }  # fmt: skip
    return Chord(**{**values, **changes})  # type: ignore[arg-type]


def message(where: Where, **changes: object) -> Message:
    values: dict[str, object] = {
        "message_id": "m", "task_id": "t", "task_name": "add", "group_id": None, "callback_of": None, "where": where,
        "age": HOUR, "expired": False, "resends": 0, "sent_at": datetime(2026, 1, 1, tzinfo=UTC),
    }  # fmt: skip
    return Message(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("diagnosis", "remedy", "changes", "wheres"),
    [
        ("dispatch-interrupted", Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0, "claimed": True}, []),
        ("part-return-lost", Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0, "counting": "valkey"}, []),
        ("dispatch-lost", Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0}, []),
        ("error-path-lost", Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0, "failed": 1}, []),
        ("shadow", Remedy.NONE, {"returned": 3, "messages": 0, "shadow": True}, []),
        ("unrecoverable", Remedy.NONE, {"returned": 3, "messages": 0, "unrecoverable": "a lambda"}, []),
        ("part-return-interrupted", Remedy.RECORD_PART, {"ended": 1, "messages": 1}, []),
        ("half-published", Remedy.NONE, {"publish_error": "EncodeError"}, [Where.NOWHERE]),
        ("header-message-lost", Remedy.REPUBLISH, {}, [Where.QUEUED, Where.NOWHERE]),
        ("header-message-lost", Remedy.REPUBLISH, {}, [Where.ABANDONED, Where.HELD]),
        ("unknown", Remedy.NONE, {}, [Where.QUEUED, Where.UNKNOWN]),
        ("never-published", Remedy.NONE, {"messages": 1}, [Where.QUEUED]),
    ],
)
def test_each_chord_that_is_stuck(
    diagnosis: str, remedy: Remedy, changes: dict[str, object], wheres: list[Where]
) -> None:
    messages = tuple(message(where, message_id=str(i), group_id="g") for i, where in enumerate(wheres))
    findings = diagnose(Evidence((chord(**changes),), messages))
    assert [(it.kind, it.id, it.diagnosis, it.remedy) for it in findings if it.kind == "chord"] == [
        ("chord", "g", diagnosis, remedy)
    ]
    assert "{" not in findings[0].reason


@pytest.mark.parametrize(
    ("changes", "wheres"),
    [
        ({}, [Where.QUEUED, Where.HELD]),
        ({"returned": 3, "messages": 0, "claimed": True, "claim_live": True}, []),
        ({"messages": 0, "age": timedelta(seconds=5)}, []),
        ({"messages": 1, "inner_chords": 1}, [Where.HELD]),
        ({"messages": 0, "shadow": True}, []),
        ({"returned": 3, "messages": 0, "age": timedelta(seconds=1)}, []),
    ],
)
def test_each_chord_that_is_not(changes: dict[str, object], wheres: list[Where]) -> None:
    messages = tuple(message(where, message_id=str(i), group_id="g") for i, where in enumerate(wheres))
    assert diagnose(Evidence((chord(**changes),), messages)) == ()


@pytest.mark.parametrize(
    ("where", "expired", "diagnosis", "remedy"),
    [
        (Where.NOWHERE, False, "message-lost", Remedy.REPUBLISH),
        (Where.ABANDONED, False, "abandoned", Remedy.REQUEUE),
        (Where.NOWHERE, True, "expired", Remedy.NONE),
        (Where.UNKNOWN, False, "unknown", Remedy.NONE),
    ],
)
def test_each_message_that_is_worth_telling(where: Where, expired: bool, diagnosis: str, remedy: Remedy) -> None:
    [task] = diagnose(Evidence((), (message(where, expired=expired),)))
    assert (task.kind, task.id, task.diagnosis, task.remedy) == ("task", "t", diagnosis, remedy)
    [callback] = diagnose(Evidence((), (message(where, expired=expired, callback_of="g"),)))
    assert (callback.kind, callback.id, callback.diagnosis) == ("callback", "g", f"callback-{diagnosis}")
    assert callback.callback == "add"


def test_a_message_that_is_only_watched_is_never_sent_again() -> None:
    for where in Where:
        for finding in diagnose(Evidence((), (message(where, shadow=True),))):
            assert (finding.diagnosis, finding.remedy) == ("shadow", Remedy.NONE)
    assert diagnose(Evidence((), (message(Where.NOWHERE, shadow=True),))) != ()


def test_a_message_is_told_with_its_chord_or_by_itself_but_not_twice() -> None:
    lost = message(Where.NOWHERE, group_id="g")
    [finding] = diagnose(Evidence((chord(),), (lost,)))
    assert finding.messages == ("m",)
    [finding] = diagnose(Evidence((), (lost,)))
    assert finding.kind == "task"


chords = st.builds(
    Chord, group_id=st.just("g"), callback=st.just("c"), age=st.timedeltas(min_value=timedelta(0), max_value=HOUR),
    total=st.integers(1, 5), returned=st.integers(0, 5), ended=st.integers(0, 5), inner_chords=st.integers(0, 5),
    messages=st.integers(0, 5), claimed=st.booleans(), claim_live=st.booleans(),
    publish_error=st.none() | st.just("Error"), shadow=st.booleans(), unrecoverable=st.none() | st.just("why"),
    counting=st.sampled_from(["postgres", "valkey"]),
)  # fmt: skip
messages = st.builds(
    Message, message_id=st.uuids().map(str), task_id=st.just("t"), task_name=st.just("n"),
    group_id=st.none() | st.just("g"), callback_of=st.none() | st.just("h"), where=st.sampled_from(Where),
    age=st.just(HOUR), expired=st.booleans(), resends=st.integers(0, 3),
    sent_at=st.just(datetime(2026, 1, 1, tzinfo=UTC)), tag=st.none() | st.just("tag"),
)  # fmt: skip


@given(chords, st.lists(messages, max_size=6))
def test_every_evidence_has_one_diagnosis_and_what_is_unknown_is_never_touched(it: Chord, found: list[Message]) -> None:
    for each in found:
        assert first(MESSAGES, each).name
    assert first(CHORDS, Header(it, (), ())).name
    findings = diagnose(Evidence((it,), tuple(found)))
    untouchable = {
        each.message_id for each in found if each.where in (Where.UNKNOWN, Where.QUEUED, Where.HELD, Where.ENDED)
    }
    resent = [key for finding in findings if finding.curable for key in finding.messages]
    assert len(resent) == len(set(resent))
    assert not untouchable & set(resent)
