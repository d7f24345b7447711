"""Diagnosis: a pure function from evidence to findings. No input but its arguments, no effect.

Each rule is one row: when it applies, what it is called, what is done about it, and why in one sentence. The first row
that applies is the diagnosis; the last row of each table always applies, so everything has exactly one. Rows that
name no remedy and are not worth a person's time (a chord at work, a message in its queue) are no findings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

from patchpilot.recovery.evidence import Chord, Evidence, Message, Where
from patchpilot.recovery.findings import Finding, Kind, Remedy

T = TypeVar("T")

PUBLISHING = timedelta(minutes=1)
"""A producer writes a chord down and then publishes its header, message by message. After this long without another
message it is no longer at it."""

FINISHING = timedelta(seconds=2)
"""A worker returns the last part and then finishes the chord, some milliseconds later. What takes longer has died."""


@dataclass(frozen=True)
class Rule(Generic[T]):
    """One row of a diagnosis table."""

    name: str
    applies: Callable[[T], bool]
    remedy: Remedy
    why: str
    """For a person; filled in with the fields of what is diagnosed."""
    report: bool = True


@dataclass(frozen=True)
class Header:
    """A chord, with those of its header's messages that are not where they should be."""

    chord: Chord
    lost: tuple[Message, ...]
    unknown: tuple[Message, ...]

    @property
    def accounted(self) -> int:
        """Parts that are here, or that something is on its way to bring."""
        return self.chord.returned + self.chord.messages + self.chord.inner_chords


CHORDS: tuple[Rule[Header], ...] = (
    Rule(
        "being-dispatched", lambda it: it.chord.claim_live, Remedy.NONE,
        "a process is dispatching the callback right now", report=False,
    ),
    Rule(
        "finishing", lambda it: it.chord.finishing, Remedy.NONE,
        "a worker still runs the task of the part that came last, and finishes the chord when it is done", report=False,
    ),
    Rule(
        "shadow", lambda it: it.chord.shadow and it.chord.returned == it.chord.total, Remedy.NONE,
        "all {total} parts are in PostgreSQL and its callback is not out; in shadow mode it is only watched",
    ),
    Rule("shadow-at-work", lambda it: it.chord.shadow, Remedy.NONE, "it is only watched", report=False),
    Rule(
        "unrecoverable", lambda it: it.chord.unrecoverable is not None and it.chord.returned == it.chord.total,
        Remedy.NONE, "all {total} parts are in PostgreSQL, but its callback could not be stored: {unrecoverable}",
    ),
    Rule(
        "dispatch-interrupted", lambda it: it.chord.claimed, Remedy.DISPATCH_CALLBACK,
        "all {total} parts are in PostgreSQL, and the process that had claimed the callback died before it was out",
    ),
    Rule(
        "being-finished", lambda it: it.chord.returned == it.chord.total and it.chord.age < FINISHING, Remedy.NONE,
        "its last part has just returned, and the worker that returned it finishes the chord", report=False,
    ),
    Rule(
        "error-path-lost", lambda it: it.chord.returned == it.chord.total and it.chord.failed > 0,
        Remedy.DISPATCH_CALLBACK, "{failed} of {total} parts failed, and nobody got to tell: its errbacks are due",
    ),
    Rule(
        "part-return-lost", lambda it: it.chord.returned == it.chord.total and it.chord.counting == "valkey",
        Remedy.DISPATCH_CALLBACK,
        "all {total} parts are in PostgreSQL, but the count in Valkey never got there: a part return was lost",
    ),
    Rule(
        "dispatch-lost", lambda it: it.chord.returned == it.chord.total, Remedy.DISPATCH_CALLBACK,
        "all {total} parts are in PostgreSQL, and the process of the last one died before it took the callback",
    ),
    Rule(
        "part-return-interrupted", lambda it: it.chord.ended > 0, Remedy.RECORD_PART,
        "{ended} of {total} header tasks ended, but died or lost PostgreSQL before returning their part",
    ),
    Rule(
        "half-published", lambda it: it.chord.publish_error is not None, Remedy.NONE,
        "publishing the header raised {publish_error} in the caller, who may have sent the chord again: left alone",
    ),
    Rule(
        "header-message-lost", lambda it: bool(it.lost), Remedy.REPUBLISH,
        "{returned} of {total} parts returned; of the rest, {lost} messages are in no queue and with no living worker",
    ),
    Rule(
        "unknown", lambda it: bool(it.unknown), Remedy.NONE,
        "{unknown} header messages are in no queue, but a worker that is alive does not answer: it may have them",
    ),
    Rule(
        "never-published", lambda it: it.accounted < it.chord.total and it.chord.age > PUBLISHING, Remedy.NONE,
        "{missing} of {total} header tasks have no message on record: their producer died, or was not using patchpilot",
    ),
    Rule("at-work", lambda _: True, Remedy.NONE, "its tasks are queued or running", report=False),
)  # fmt: skip

MESSAGES: tuple[Rule[Message], ...] = (
    Rule("ended", lambda it: it.where is Where.ENDED, Remedy.NONE, "its task has ended", report=False),
    Rule(
        "in-good-hands", lambda it: it.where in (Where.QUEUED, Where.HELD), Remedy.NONE,
        "it is queued, or a worker has it", report=False,
    ),
    Rule(
        "shadow", lambda it: it.shadow, Remedy.NONE,
        "{task_name} is in no queue and with no worker; in shadow mode it is only watched",
    ),
    Rule(
        "unknown", lambda it: it.where is Where.UNKNOWN, Remedy.NONE,
        "{task_name} is in no queue, but a worker that is alive does not answer: it may have it",
    ),
    Rule(
        "revoked", lambda it: it.where is Where.REVOKED, Remedy.NONE,
        "the message of {task_name} was lost, and somebody had revoked it: it is not sent again",
    ),
    Rule(
        "expired", lambda it: it.expired, Remedy.NONE,
        "the message of {task_name} was lost, and its expiry time has passed: it is not sent again",
    ),
    Rule(
        "abandoned", lambda it: it.where is Where.ABANDONED, Remedy.REQUEUE,
        "a worker had taken {task_name} and no longer has it: back into its queue, before the visibility timeout",
    ),
    Rule(
        "message-lost", lambda it: it.where is Where.NOWHERE, Remedy.REPUBLISH,
        "the message of {task_name} is in no queue, not unacknowledged, and with no living worker",
    ),
)  # fmt: skip


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Everything worth telling, chords first, then callbacks, then other tasks; the oldest first in each."""
    of_chord: defaultdict[str, list[Message]] = defaultdict(list)
    for message in evidence.messages:
        if message.group_id is not None:
            of_chord[message.group_id].append(message)
    chords = [_diagnose_chord(chord, of_chord[chord.group_id]) for chord in evidence.chords]
    told = {message_id for finding in chords if finding for message_id in finding.messages}
    messages = [_diagnose_message(message) for message in evidence.messages if message.message_id not in told]
    findings = [finding for finding in (*chords, *messages) if finding is not None]
    order: dict[Kind, int] = {"chord": 0, "callback": 1, "task": 2}
    return tuple(sorted(findings, key=lambda finding: (order[finding.kind], -finding.age, finding.id)))


def first(rules: Iterable[Rule[T]], subject: T) -> Rule[T]:
    """The rule that applies to ``subject``."""
    return next(rule for rule in rules if rule.applies(subject))


def _diagnose_chord(chord: Chord, messages: list[Message]) -> Finding | None:
    lost = tuple(it for it in messages if first(MESSAGES, it).remedy is not Remedy.NONE)
    header = Header(chord, lost, tuple(it for it in messages if it.where is Where.UNKNOWN))
    rule = first(CHORDS, header)
    if not rule.report:
        return None
    why = rule.why.format(
        total=chord.total, returned=chord.returned, ended=chord.ended, publish_error=chord.publish_error,
        lost=len(lost), unknown=len(header.unknown), missing=chord.total - header.accounted,
        unrecoverable=chord.unrecoverable, failed=chord.failed,
    )  # fmt: skip
    return Finding(
        kind="chord", id=chord.group_id, diagnosis=rule.name, remedy=rule.remedy, reason=why, callback=chord.callback,
        age=chord.age, returned=chord.returned, total=chord.total,
        messages=tuple(it.message_id for it in lost) if rule.remedy is Remedy.REPUBLISH else (),
    )  # fmt: skip


def _diagnose_message(message: Message) -> Finding | None:
    rule = first(MESSAGES, message)
    if not rule.report:
        return None
    is_callback = message.callback_of is not None
    name = f"callback-{rule.name}" if is_callback else rule.name
    return Finding(
        kind="callback" if is_callback else "task", id=message.callback_of or message.task_id, diagnosis=name,
        remedy=rule.remedy, reason=rule.why.format(task_name=message.task_name),
        callback=message.task_name if is_callback else None, age=message.age, messages=(message.message_id,),
    )  # fmt: skip
