"""Diagnosis, of every evidence that there can be."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from patchpilot.recovery.diagnose import CHORDS, MESSAGES, Header, diagnose, first, quiet
from patchpilot.recovery.evidence import Chord, Evidence, Message, Where
from patchpilot.recovery.findings import Remedy

HOUR = timedelta(hours=1)

ages = st.timedeltas(min_value=timedelta(0), max_value=HOUR)
words = st.sampled_from(["a", "b"])
GROUPS = ["g", "h"]


@st.composite
def chords(draw: st.DrawFn) -> Chord:
    """Any chord that there can be: only what is complete is claimed, and a worker finishes only what it can."""
    total = draw(st.integers(1, 5))
    returned = draw(st.integers(0, total))
    ended = draw(st.integers(0, total - returned))
    claimed = returned == total and draw(st.booleans())
    return Chord(
        group_id=draw(st.sampled_from(GROUPS)), callback=draw(words), age=draw(ages), total=total, returned=returned,
        ended=ended, inner_chords=draw(st.integers(0, total - returned)), messages=draw(st.integers(0, 5)),
        claimed=claimed, claim_live=claimed and draw(st.booleans()), publish_error=draw(st.none() | st.just("Error")),
        failed=draw(st.integers(0, returned)), counting=draw(st.sampled_from(["postgres", "valkey"])),
        unrecoverable=draw(st.none() | st.just("why")), shadow=draw(st.booleans()),
        finishing=not claimed and bool(ended or returned == total) and draw(st.booleans()),
    )  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Any message that there can be: of either chord, of one that is not open, or of none."""
    where = draw(st.sampled_from(Where))
    unacked = where is Where.ABANDONED
    return Message(
        message_id=str(draw(st.uuids())), task_id=draw(words), task_name=draw(words),
        group_id=draw(st.none() | st.sampled_from([*GROUPS, "over"])),
        callback_of=draw(st.none() | st.sampled_from([*GROUPS, "over"])), where=where, age=draw(ages),
        expired=draw(st.booleans()), resends=draw(st.integers(0, 3)),
        sent_at=datetime(2026, 1, 1, tzinfo=UTC) + draw(ages), tag="tag" if unacked else None,
        shadow=draw(st.booleans()), awaited=draw(st.booleans()), taken=draw(st.floats(0, 9)) if unacked else None,
        refused=draw(st.booleans()), exchange=draw(words), routing_key=draw(words),
    )  # fmt: skip


evidence = st.builds(
    Evidence, st.lists(chords(), max_size=2, unique_by=lambda it: it.group_id).map(tuple),
    st.lists(messages(), max_size=6, unique_by=lambda it: it.message_id).map(tuple),
)  # fmt: skip


FIELDS = [(drawn, it.name) for drawn, whole in ((chords(), Chord), (messages(), Message)) for it in fields(whole)]


@pytest.mark.parametrize(("drawn", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_field_takes_more_than_one_value(drawn: st.SearchStrategy[Chord | Message], name: str) -> None:
    """Of what is always the same nothing is shown below."""
    find(
        st.tuples(drawn, drawn), lambda two: getattr(two[0], name) != getattr(two[1], name),
        settings=settings(database=None, phases=[Phase.generate]),
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
def test_what_a_worker_is_about_to_finish_is_no_finding(found: Evidence) -> None:
    finishing = {it.group_id for it in found.chords if it.finishing}
    assert not finishing & {finding.id for finding in diagnose(found) if finding.kind == "chord"}
    assert quiet(found).chords.get("finishing", 0) == len(finishing)


@given(evidence)
def test_of_two_chords_each_is_diagnosed_as_if_it_were_alone(found: Evidence) -> None:
    alone = {it for each in found.chords for it in diagnose(replace(found, chords=(each,))) if it.kind == "chord"}
    assert {it for it in diagnose(found) if it.kind == "chord"} == alone


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
            finishing=it.finishing or (not it.claimed and data.draw(st.booleans())),
        )
        for it in found.chords
    )  # fmt: skip
    assert touched(Evidence(alive, seen)) <= touched(found)


@given(evidence, st.randoms(use_true_random=False))
def test_the_order_in_which_things_were_seen_does_not_matter(found: Evidence, random: Random) -> None:
    chords, shuffled = list(found.chords), list(found.messages)
    random.shuffle(chords)
    random.shuffle(shuffled)
    again = diagnose(Evidence(tuple(chords), tuple(shuffled)))
    assert [replace(it, messages=tuple(sorted(it.messages))) for it in again] == [
        replace(it, messages=tuple(sorted(it.messages))) for it in diagnose(found)
    ]
