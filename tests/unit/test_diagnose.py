"""The diagnosis tables: pure, complete, and one test a row."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from patchpilot.recovery.diagnose import CHORDS, MESSAGES, Header, Rule, diagnose, first, quiet
from patchpilot.recovery.evidence import Chord, Evidence, Message, Where
from patchpilot.recovery.findings import Remedy
from patchpilot.recovery.quiet import Hands

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


Seen = Where | Message

PART = message(Where.REVOKED, message_id="r", group_id="g", awaited=True)
"""What brings a part of a header, and was revoked."""
CHAIN = replace(PART, where=Where.NOWHERE, expired=True, awaited=False)
"""What begins a chain in a header, and has expired."""
REFUSED = replace(PART, where=Where.NOWHERE, refused=True)
"""What was sent again often enough."""

# One row of a table: the evidence that leads to it, which is not enough for any row above.
OF_CHORDS: dict[str, tuple[Remedy, dict[str, object], list[Seen]]] = {
    "being-dispatched": (Remedy.NONE, {"returned": 3, "messages": 0, "claimed": True, "claim_live": True}, []),
    "finishing": (Remedy.NONE, {"returned": 3, "messages": 0, "claimed": True, "finishing": True}, []),
    "shadow": (Remedy.NONE, {"returned": 3, "messages": 0, "shadow": True}, []),
    "shadow-at-work": (Remedy.NONE, {"messages": 0, "shadow": True}, []),
    "half-published": (Remedy.NONE, {"publish_error": "EncodeError"}, [Where.NOWHERE]),
    "unrecoverable": (Remedy.NONE, {"returned": 3, "messages": 0, "unrecoverable": "a lambda"}, []),
    "dispatch-interrupted": (Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0, "claimed": True}, []),
    "being-finished": (Remedy.NONE, {"returned": 3, "messages": 0, "age": timedelta(seconds=1)}, []),
    "error-path-lost": (Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0, "failed": 1}, []),
    "part-return-lost": (Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0, "counting": "valkey"}, []),
    "dispatch-lost": (Remedy.DISPATCH_CALLBACK, {"returned": 3, "messages": 0}, []),
    "part-return-interrupted": (Remedy.RECORD_PART, {"ended": 1, "messages": 1}, []),
    "header-expired": (Remedy.REVOKE_PART, {}, [Where.QUEUED, Where.NOWHERE, PART]),
    "header-message-lost": (Remedy.REPUBLISH, {}, [Where.QUEUED, Where.NOWHERE, CHAIN]),
    "header-refused": (Remedy.NONE, {}, [Where.UNKNOWN, CHAIN, REFUSED]),
    "chain-expired": (Remedy.NONE, {}, [Where.UNKNOWN, CHAIN]),
    "unknown": (Remedy.NONE, {}, [Where.QUEUED, Where.UNKNOWN]),
    "never-published": (Remedy.NONE, {"messages": 0}, []),
    "being-published": (Remedy.NONE, {"messages": 0, "age": timedelta(seconds=1)}, []),
    "at-work": (Remedy.NONE, {}, [Where.QUEUED, Where.HELD]),
}

OF_MESSAGES: dict[str, tuple[Remedy, Where, dict[str, object]]] = {
    "ended": (Remedy.NONE, Where.ENDED, {}),
    "in-good-hands": (Remedy.NONE, Where.HELD, {}),
    "shadow": (Remedy.NONE, Where.NOWHERE, {"shadow": True}),
    "unknown": (Remedy.NONE, Where.UNKNOWN, {}),
    "revoked": (Remedy.NONE, Where.REVOKED, {}),
    "expired": (Remedy.NONE, Where.NOWHERE, {"expired": True}),
    "abandoned": (Remedy.REQUEUE, Where.ABANDONED, {}),
    "refused": (Remedy.NONE, Where.NOWHERE, {"refused": True}),
    "message-lost": (Remedy.REPUBLISH, Where.NOWHERE, {}),
}


def of_header(seen: list[Seen]) -> tuple[Message, ...]:
    return tuple(
        it if isinstance(it, Message) else message(it, message_id=str(i), group_id="g") for i, it in enumerate(seen)
    )


def header(it: Chord, seen: list[Seen]) -> Header:
    found = of_header(seen)
    refused = tuple(each for each in found if each.where is Where.NOWHERE and each.refused and not each.dead)
    lost = tuple(
        each
        for each in found
        if each.where in (Where.NOWHERE, Where.ABANDONED) and not each.dead and each not in refused
    )
    unknown = tuple(each for each in found if each.where is Where.UNKNOWN)
    return Header(it, lost, unknown, tuple(each for each in found if each.dead), refused)


@pytest.mark.parametrize("rule", CHORDS, ids=lambda rule: rule.name)
def test_each_row_of_the_table_of_chords(rule: Rule[Header]) -> None:
    remedy, changes, seen = OF_CHORDS[rule.name]
    it = chord(**changes)
    assert rule.remedy is remedy
    assert first(CHORDS, header(it, seen)) is rule
    told = [each for each in diagnose(Evidence((it,), of_header(seen))) if each.kind == "chord"]
    expected = [("g", rule.name, remedy, "total", it.returned, 3)] if rule.report else []
    assert [
        (each.id, each.diagnosis, each.remedy, each.callback, each.returned, each.total) for each in told
    ] == expected
    assert all(each.reason and not set("{}") & set(each.reason) for each in told)


@pytest.mark.parametrize("rule", MESSAGES, ids=lambda rule: rule.name)
def test_each_row_of_the_table_of_messages(rule: Rule[Message]) -> None:
    remedy, where, changes = OF_MESSAGES[rule.name]
    assert rule.remedy is remedy
    assert first(MESSAGES, message(where, **changes)) is rule
    task = diagnose(Evidence((), (message(where, **changes),)))
    callback = diagnose(Evidence((), (message(where, callback_of="g", **changes),)))
    if not rule.report:
        assert (task, callback) == ((), ())
        return
    assert [(it.kind, it.id, it.diagnosis, it.remedy) for it in task] == [("task", "t", rule.name, remedy)]
    assert [(it.kind, it.id, it.diagnosis, it.remedy, it.callback) for it in callback] == [
        ("callback", "g", f"callback-{rule.name}", remedy, "add")
    ]
    assert "add" in task[0].reason


def test_no_row_is_without_a_test_and_no_name_is_there_twice() -> None:
    assert [rule.name for rule in CHORDS] == list(OF_CHORDS)
    assert [rule.name for rule in MESSAGES] == list(OF_MESSAGES)


@pytest.mark.parametrize(
    ("changes", "seen", "diagnosis"),
    [
        ({}, [Where.ABANDONED, Where.HELD], "header-message-lost"),
        ({}, [Where.NOWHERE, Where.UNKNOWN], "header-message-lost"),
        ({"messages": 0, "age": timedelta(minutes=1)}, [], "being-published"),
        ({"messages": 0, "age": timedelta(minutes=1, seconds=1)}, [], "never-published"),
        ({"messages": 1}, [Where.HELD], "at-work"),
        ({"messages": 0, "inner_chords": 1}, [], "at-work"),
        ({"returned": 3, "messages": 0, "age": timedelta(seconds=2)}, [], "dispatch-lost"),
        ({"returned": 3, "messages": 0, "failed": 1, "counting": "valkey"}, [], "error-path-lost"),
        ({"returned": 3, "messages": 0, "claimed": True, "failed": 1}, [], "dispatch-interrupted"),
        ({"returned": 2, "unrecoverable": "a lambda"}, [Where.NOWHERE], "header-message-lost"),
        ({"returned": 3, "messages": 0, "claimed": True, "publish_error": "E"}, [], "half-published"),
        ({"ended": 1, "messages": 1}, [Where.UNKNOWN], "part-return-interrupted"),
        ({"ended": 1, "messages": 1}, [PART], "part-return-interrupted"),
        ({}, [Where.UNKNOWN, replace(PART, where=Where.ABANDONED, expired=True)], "header-expired"),
        ({"returned": 3}, [PART], "dispatch-lost"),
        ({"publish_error": "E"}, [PART], "half-published"),
        ({"shadow": True}, [PART], "shadow-at-work"),
        ({}, [Where.NOWHERE, REFUSED], "header-message-lost"),
        ({}, [replace(REFUSED, where=Where.ABANDONED)], "header-message-lost"),
        ({}, [replace(REFUSED, where=Where.HELD)], "at-work"),
        ({}, [replace(REFUSED, expired=True)], "header-expired"),
        ({"returned": 3}, [REFUSED], "dispatch-lost"),
        ({"ended": 1, "messages": 1, "finishing": True}, [], "finishing"),
        ({"returned": 3, "messages": 0, "failed": 1, "finishing": True}, [], "finishing"),
        ({"returned": 3, "messages": 0, "counting": "valkey", "finishing": True}, [], "finishing"),
        ({"returned": 3, "messages": 0, "shadow": True, "finishing": True}, [], "finishing"),
    ],
)
def test_what_lies_between_two_rows(changes: dict[str, object], seen: list[Seen], diagnosis: str) -> None:
    assert first(CHORDS, header(chord(**changes), seen)).name == diagnosis


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
    for dead in (PART, CHAIN):
        [finding] = diagnose(Evidence((chord(),), (dead,)))
        assert finding.kind == "chord"
    [finding] = diagnose(Evidence((chord(),), (lost, PART)))
    assert (finding.diagnosis, finding.messages) == ("header-expired", ("m", "r"))


@pytest.mark.parametrize("kind", ["callback", "task"])
def test_messages_of_one_callback_or_task_that_fare_alike_are_one_finding(kind: str) -> None:
    """Those of a group body, for example: a plan goes by kind and id."""
    of = {"callback_of": "g"} if kind == "callback" else {}
    fates = (Where.NOWHERE, Where.NOWHERE, Where.ABANDONED, Where.QUEUED)
    found = tuple(
        message(where, message_id=str(i), task_name=f"task{i}", age=HOUR * (i + 1), **of)
        for i, where in enumerate(fates)
    )
    abandoned, lost = diagnose(Evidence((), found))
    assert (lost.kind, lost.messages, lost.age) == (kind, ("0", "1"), 2 * HOUR)
    assert "task0, task1" in lost.reason
    assert abandoned.messages == ("2",)


@pytest.mark.parametrize(
    "changes",
    [
        {"returned": 3, "age": timedelta(0)},
        {"returned": 3},
        {"returned": 3, "claimed": True, "claim_live": True},
        {"publish_error": "EncodeError"},
        {"returned": 3, "unrecoverable": "a lambda"},
    ],
)
def test_a_header_that_nobody_needs_is_not_sent_again(changes: dict[str, object]) -> None:
    """Its chord is complete, or left alone; what lies about of its header is no business of recovery's."""
    left = of_header([Where.NOWHERE, Where.ABANDONED, Where.UNKNOWN, PART, CHAIN, REFUSED])
    for seen in ((it,) for it in left):
        for finding in diagnose(Evidence((chord(**changes),), seen)):
            assert finding.kind == "chord"
            assert finding.messages == ()


def test_what_is_lost_beside_a_part_that_ended_is_told_by_itself() -> None:
    """Recording the part sends nothing again."""
    found = diagnose(Evidence((chord(ended=1),), of_header([Where.NOWHERE, REFUSED])))
    assert [(it.kind, it.diagnosis, it.messages) for it in found] == [
        ("chord", "part-return-interrupted", ()), ("task", "message-lost", ("0",)), ("task", "refused", ("r",)),
    ]  # fmt: skip


def test_who_has_not_answered_is_named_where_that_leaves_a_doubt_and_nowhere_else() -> None:
    seen = (
        message(Where.UNKNOWN, message_id="u", group_id="g"), message(Where.UNKNOWN, message_id="c", callback_of="h"),
        message(Where.UNKNOWN, message_id="t"), message(Where.NOWHERE, message_id="l", task_id="lost"),
    )  # fmt: skip
    plain = {(it.kind, it.id): it for it in diagnose(Evidence((chord(),), seen))}
    told = {(it.kind, it.id): it for it in diagnose(Evidence((chord(),), seen, ("w is silent", "so is v")))}
    lost = told.pop(("task", "lost"))
    assert lost == plain.pop(("task", "lost"))
    assert set(told) == {("chord", "g"), ("callback", "h"), ("task", "t")}
    assert told == {key: replace(it, reason=f"{it.reason}: w is silent; so is v") for key, it in plain.items()}


def test_messages_in_good_hands_are_counted_by_whose_they_are() -> None:
    seen = (
        *of_header([Where.QUEUED, Where.QUEUED, Where.HELD, Where.ENDED]),
        message(Where.QUEUED, message_id="c", callback_of="h"), message(Where.HELD, message_id="t"),
        message(Where.HELD, message_id="u"),
    )  # fmt: skip
    found = quiet(Evidence((chord(),), seen))
    assert (found.headers, found.callbacks, found.tasks) == (Hands(2, 1), Hands(1, 0), Hands(0, 2))
    found = quiet(Evidence((), seen))
    assert (found.headers, found.callbacks, found.tasks) == (Hands(), Hands(1, 0), Hands(2, 3))
