"""The diagnosis tables: pure, complete, and one test a row."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    for finding in diagnose(Evidence((chord(**changes),), of_header([Where.NOWHERE, Where.ABANDONED]))):
        assert finding.kind == "chord"
        assert finding.messages == ()


# -- every evidence that there can be ---------------------------------------------------------------------------------


@st.composite
def chords(draw: st.DrawFn) -> Chord:
    total = draw(st.integers(1, 5))
    returned = draw(st.integers(0, total))
    claimed = returned == total and draw(st.booleans())
    return Chord(
        group_id="g", callback="c", age=draw(st.timedeltas(min_value=timedelta(0), max_value=HOUR)), total=total,
        returned=returned, ended=draw(st.integers(0, total - returned)),
        inner_chords=draw(st.integers(0, total - returned)), messages=draw(st.integers(0, 5)), claimed=claimed,
        claim_live=claimed and draw(st.booleans()), publish_error=draw(st.none() | st.just("Error")),
        failed=draw(st.integers(0, returned)), counting=draw(st.sampled_from(["postgres", "valkey"])),
        unrecoverable=draw(st.none() | st.just("why")), shadow=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> Message:
    where = draw(st.sampled_from(Where))
    return Message(
        message_id=str(draw(st.uuids())), task_id=draw(st.sampled_from(["t", "u"])), task_name="n",
        group_id=draw(st.none() | st.just("g")), callback_of=draw(st.none() | st.just("h")), where=where, age=HOUR,
        expired=draw(st.booleans()), resends=draw(st.integers(0, 3)), sent_at=datetime(2026, 1, 1, tzinfo=UTC),
        tag="tag" if where is Where.ABANDONED else None, shadow=draw(st.booleans()), awaited=draw(st.booleans()),
        refused=draw(st.booleans()),
    )  # fmt: skip


evidence = st.builds(
    Evidence, st.lists(chords(), max_size=1).map(tuple),
    st.lists(messages(), max_size=6, unique_by=lambda it: it.message_id).map(tuple),
)  # fmt: skip

UNTOUCHABLE = (Where.UNKNOWN, Where.QUEUED, Where.HELD, Where.ENDED)


def touched(found: Evidence) -> set[str]:
    """The chords that are remedied, and the messages that are sent again or ended."""
    cured = [finding for finding in diagnose(found) if finding.curable]
    chords = {finding.id for finding in cured if finding.kind == "chord" and not finding.messages}
    return chords | {message_id for finding in cured for message_id in finding.messages}


few = st.lists(messages(), max_size=3).map(tuple)


@given(chords(), few, few, few)
def test_every_chord_has_one_diagnosis(
    it: Chord, lost: tuple[Message, ...], unknown: tuple[Message, ...], dead: tuple[Message, ...]
) -> None:
    header = Header(it, lost, unknown, dead, dead)
    rule = first(CHORDS, header)
    above = CHORDS[: CHORDS.index(rule)]
    assert rule.applies(header)
    assert not any(each.applies(header) for each in above)


@given(messages())
def test_every_message_has_one_diagnosis(it: Message) -> None:
    rule = first(MESSAGES, it)
    assert rule.applies(it)
    assert not any(each.applies(it) for each in MESSAGES[: MESSAGES.index(rule)])


@given(evidence)
def test_nothing_is_told_twice_and_a_diagnosis_is_one_of_the_tables(found: Evidence) -> None:
    findings = diagnose(found)
    resent = [key for finding in findings if finding.curable for key in finding.messages]
    assert len(resent) == len(set(resent))
    keys = [(it.kind, it.id, it.diagnosis) for it in findings]
    assert len(keys) == len(set(keys))
    names = {"chord": {rule.name for rule in CHORDS if rule.report}, "task": {it.name for it in MESSAGES if it.report}}
    names["callback"] = {f"callback-{name}" for name in names["task"]}
    assert all(it.diagnosis in names[it.kind] for it in findings)
    assert all(it.age >= timedelta(0) and it.reason for it in findings)


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


@given(evidence)
def test_every_open_chord_is_told_of_or_counted(found: Evidence) -> None:
    told = sum(finding.kind == "chord" for finding in diagnose(found))
    assert told + sum(quiet(found).chords.values()) == len(found.chords)


@given(evidence)
def test_what_is_unknown_or_in_good_hands_is_never_touched(found: Evidence) -> None:
    kept = {it.message_id for it in found.messages if it.where in UNTOUCHABLE or it.shadow}
    assert not kept & touched(found)


@given(evidence)
def test_what_has_expired_or_was_revoked_is_touched_only_to_end_it(found: Evidence) -> None:
    dead = {it.message_id for it in found.messages if it.dead}
    for finding in diagnose(found):
        if finding.curable and dead & {*finding.messages}:
            assert (finding.kind, finding.remedy) == ("chord", Remedy.REVOKE_PART)


@given(evidence)
def test_what_is_refused_is_not_sent_again(found: Evidence) -> None:
    assert not {it.message_id for it in found.messages if it.where is Where.NOWHERE and it.refused and not it.dead} & (
        touched(found)
    )


@given(evidence)
def test_a_live_claim_is_never_touched_nor_its_header(found: Evidence) -> None:
    claimed = {it.group_id for it in found.chords if it.claim_live}
    assert not claimed & touched(found)
    assert not {it.message_id for it in found.messages if it.group_id in claimed} & touched(found)


@given(evidence)
def test_a_chord_that_is_only_watched_or_whose_sending_raised_is_never_remedied(found: Evidence) -> None:
    left = {it.group_id for it in found.chords if it.shadow or it.publish_error}
    assert not left & {finding.id for finding in diagnose(found) if finding.kind == "chord" and finding.curable}
    raised = {it.group_id for it in found.chords if it.publish_error}
    assert not {it.message_id for it in found.messages if it.group_id in raised} & touched(found)


@given(evidence)
def test_a_callback_is_dispatched_only_when_every_part_is_here(found: Evidence) -> None:
    complete = {it.group_id for it in found.chords if it.returned == it.total}
    dispatched = {it.id for it in diagnose(found) if it.remedy is Remedy.DISPATCH_CALLBACK}
    assert dispatched <= complete


@given(evidence, st.data())
def test_a_sign_of_life_never_leads_to_a_remedy(found: Evidence, data: st.DataObject) -> None:
    """A message that turns up in good hands, a claim, progress a moment ago: what was left alone stays left alone."""
    seen = tuple(
        replace(it, where=data.draw(st.sampled_from([it.where, Where.HELD, Where.QUEUED]))) for it in found.messages
    )
    alive = tuple(
        replace(
            it, age=data.draw(st.sampled_from([it.age, timedelta(0)])),
            claim_live=it.claim_live or (it.claimed and data.draw(st.booleans())),
        )
        for it in found.chords
    )  # fmt: skip
    assert touched(Evidence(alive, seen)) <= touched(found)


@given(evidence, st.randoms(use_true_random=False))
def test_the_order_in_which_things_were_seen_does_not_matter(found: Evidence, random: Random) -> None:
    shuffled = list(found.messages)
    random.shuffle(shuffled)
    again = diagnose(Evidence(found.chords, tuple(shuffled)))
    assert [replace(it, messages=tuple(sorted(it.messages))) for it in again] == [
        replace(it, messages=tuple(sorted(it.messages))) for it in diagnose(found)
    ]
