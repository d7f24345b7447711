"""Diagnosis: a pure function from evidence to findings. No input but its arguments, no effect.

Each rule is one row: when it applies, what it is called, what is done about it, and why in one sentence. The first row
that applies is the diagnosis; the last row of each table always applies, so everything has exactly one. Rows that
name no remedy and are not worth a person's time (a chord at work, a message in its queue) are no findings.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Generic, TypeVar

from patchpilot.recovery.evidence import Chord, Evidence, Message, Where
from patchpilot.recovery.findings import KINDS, Finding, Kind, Remedy
from patchpilot.recovery.quiet import Hands, Quiet

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
    evidence: str
    """When it applies, in words, given that no row above it does."""
    report: bool = True


@dataclass(frozen=True)
class Header:
    """A chord, with those of its header's messages that are not where they should be."""

    chord: Chord
    lost: tuple[Message, ...]
    unknown: tuple[Message, ...]
    dead: tuple[Message, ...] = ()
    """They are lost, and are not sent again: their tasks have expired or were revoked."""
    refused: tuple[Message, ...] = ()
    """They are sent again no more: no worker begins with them."""

    @property
    def complete(self) -> bool:
        """Whether every part is here."""
        return self.chord.returned == self.chord.total

    @property
    def awaited(self) -> bool:
        """Whether something is on its way that brings parts. How many nobody knows: a chain may end in a group."""
        return self.chord.messages + self.chord.inner_chords > 0


CHORDS: tuple[Rule[Header], ...] = (
    Rule(
        "being-dispatched", lambda it: it.chord.claim_live, Remedy.NONE,
        "a process is dispatching the callback right now",
        "a process has claimed the chord, and its lease is not over", report=False,
    ),
    Rule(
        "finishing", lambda it: it.chord.finishing, Remedy.NONE,
        "a worker still runs the task of the part that came last, and finishes the chord when it is done",
        "all parts have returned; a worker still has the task of the last one, also when the lease of its claim is "
        "over", report=False,
    ),
    Rule(
        "shadow", lambda it: it.chord.shadow and it.complete, Remedy.NONE,
        "all {total} parts are in PostgreSQL and its callback is not out; in shadow mode it is only watched",
        "sent in shadow mode; all parts have returned",
    ),
    Rule(
        "shadow-at-work", lambda it: it.chord.shadow, Remedy.NONE, "it is only watched",
        "sent in shadow mode; parts are still to come", report=False,
    ),
    Rule(
        "half-published", lambda it: it.chord.publish_error is not None, Remedy.NONE,
        "publishing the header raised {publish_error} in the caller, who may have sent the chord again: left alone",
        "the call that sent it raised",
    ),
    Rule(
        "unrecoverable", lambda it: it.chord.unrecoverable is not None and it.complete,
        Remedy.NONE, "all {total} parts are in PostgreSQL, but its callback could not be stored: {unrecoverable}",
        "all parts have returned; the callback could not be stored when the chord was sent",
    ),
    Rule(
        "dispatch-interrupted", lambda it: it.chord.claimed, Remedy.DISPATCH_CALLBACK,
        "all {total} parts are in PostgreSQL, and the process that had claimed the callback died before it was out",
        "a process has claimed the chord, its lease is over, and no worker has the task of the last part",
    ),
    Rule(
        "being-finished", lambda it: it.complete and it.chord.age < FINISHING, Remedy.NONE,
        "its last part has just returned, and the worker that returned it finishes the chord",
        "all parts have returned, the last one less than 2 seconds ago", report=False,
    ),
    Rule(
        "error-path-lost", lambda it: it.complete and it.chord.failed > 0,
        Remedy.DISPATCH_CALLBACK, "{failed} of {total} parts failed, and nobody got to tell: its errbacks are due",
        "all parts have returned, some of them failed, and nobody has claimed the chord",
    ),
    Rule(
        "part-return-lost", lambda it: it.complete and it.chord.counting == "valkey",
        Remedy.DISPATCH_CALLBACK,
        "all {total} parts are in PostgreSQL, but the count in Valkey never got there: a part return was lost",
        "all parts have returned, and nobody has claimed the chord; its parts are counted in Valkey",
    ),
    Rule(
        "dispatch-lost", lambda it: it.complete, Remedy.DISPATCH_CALLBACK,
        "all {total} parts are in PostgreSQL, and the process of the last one died before it took the callback",
        "all parts have returned, and nobody has claimed the chord",
    ),
    Rule(
        "part-return-interrupted", lambda it: it.chord.ended > 0, Remedy.RECORD_PART,
        "{ended} of {total} header tasks ended, but died or lost PostgreSQL before returning their part",
        "a header task has a final result, stored more than 10 seconds ago, and its part has not returned",
    ),
    Rule(
        "header-expired", lambda it: any(message.awaited for message in it.dead), Remedy.REVOKE_PART,
        "{dead} messages of its header were lost, and have expired since or were revoked: their tasks will never run",
        "messages of its header are in no queue and with no living worker, and their tasks have expired or were "
        "revoked",
    ),
    Rule(
        "header-message-lost", lambda it: bool(it.lost), Remedy.REPUBLISH,
        "{returned} of {total} parts returned; of the rest, {lost} messages are in no queue and with no living worker",
        "messages of its header are in no queue, and no living worker has them",
    ),
    Rule(
        "header-refused", lambda it: bool(it.refused), Remedy.NONE,
        "{refused} messages of its header were sent again 5 times, and nothing came of it: workers seem to refuse them",
        "messages of its header are in no queue and with no living worker, and were sent again 5 times; no worker "
        "began with them, as far as fences tell",
    ),
    Rule(
        "chain-expired", lambda it: bool(it.dead), Remedy.NONE,
        "{dead} messages of chains in its header were lost, and have expired since or were revoked: the ends of these "
        "chains never return a part, and Celery fails no chord for that",
        "messages of chains in its header are in no queue and with no living worker, and have expired or were revoked",
    ),
    Rule(
        "unknown", lambda it: bool(it.unknown), Remedy.NONE,
        "{unknown} header messages are in no queue, and a worker may have them that does not say so",
        "messages of its header are in no queue, and not every worker that may have them says what it has",
    ),
    Rule(
        "never-published", lambda it: not it.awaited and it.chord.age > PUBLISHING, Remedy.NONE,
        "{missing} of {total} header tasks have no message on record and returned nothing: their producer died, or was "
        "not using patchpilot, or they ended without a result, as a task does that raises Ignore",
        "parts are still to come, there is neither a message nor an inner chord to bring them, and for a minute "
        "nothing has happened to it",
    ),
    Rule(
        "being-published", lambda it: not it.awaited, Remedy.NONE, "it has only just been sent",
        "parts are still to come, and there is neither a message nor an inner chord to bring them yet", report=False,
    ),
    Rule(
        "at-work", lambda _: True, Remedy.NONE, "its tasks are queued or running",
        "messages of its header are in good hands, or inner chords are open", report=False,
    ),
)  # fmt: skip

MESSAGES: tuple[Rule[Message], ...] = (
    Rule(
        "ended", lambda it: it.where is Where.ENDED, Remedy.NONE, "its task has ended",
        "its task has a final result, has returned its part, or was recorded as over", report=False,
    ),
    Rule(
        "in-good-hands", lambda it: it.where in (Where.QUEUED, Where.HELD), Remedy.NONE,
        "it is queued, or a worker has it",
        "it is in its queue, a living worker says that it has it, or it changed hands while recovery looked",
        report=False,
    ),
    Rule(
        "shadow", lambda it: it.shadow, Remedy.NONE,
        "{task_name} is in no queue and with no worker; in shadow mode it is only watched",
        "sent in shadow mode; it is in no queue, and no living worker has it",
    ),
    Rule(
        "unknown", lambda it: it.where is Where.UNKNOWN, Remedy.NONE,
        "{task_name} is in no queue, and a worker may have it that does not say so",
        "it is in no queue, and not every worker that may have it says what it has",
    ),
    Rule(
        "revoked", lambda it: it.where is Where.REVOKED, Remedy.NONE,
        "the message of {task_name} was lost, and somebody had revoked it: it is not sent again",
        "it is in no queue, no living worker has it, and a worker remembers that it was revoked",
    ),
    Rule(
        "expired", lambda it: it.expired, Remedy.NONE,
        "the message of {task_name} was lost, and its expiry time has passed: it is not sent again",
        "it is in no queue, no living worker has it, and its expiry time has passed",
    ),
    Rule(
        "abandoned", lambda it: it.where is Where.ABANDONED, Remedy.REQUEUE,
        "a worker had taken {task_name} and no longer has it: back into its queue, before the visibility timeout",
        "it is among the unacknowledged, and no living worker has it",
    ),
    Rule(
        "refused", lambda it: it.refused, Remedy.NONE,
        "the message of {task_name} was sent again 5 times, and nothing came of it: workers seem to refuse it",
        "it is in no queue, not among the unacknowledged, no living worker has it, and it was sent again 5 times; no "
        "worker began with it, as far as its fence tells",
    ),
    Rule(
        "message-lost", lambda it: it.where is Where.NOWHERE, Remedy.REPUBLISH,
        "the message of {task_name} is in no queue, not unacknowledged, and with no living worker",
        "it is in no queue, not among the unacknowledged, and no living worker has it",
    ),
)  # fmt: skip


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Everything worth telling, chords first, then callbacks, then other tasks; the oldest first in each."""
    chords = [_diagnose_chord(header) for header in headers(evidence)]
    told = {message_id for _, covered in chords for message_id in covered}
    messages = _diagnose_messages([message for message in evidence.messages if message.message_id not in told])
    findings = [*(finding for finding, _ in chords if finding is not None), *messages]
    if evidence.doubts:
        why = "; ".join(evidence.doubts)
        findings = [replace(it, reason=f"{it.reason}: {why}") if it.unknown else it for it in findings]
    order: dict[Kind, int] = {"chord": 0, "callback": 1, "task": 2}
    return tuple(
        sorted(findings, key=lambda finding: (order[finding.kind], -finding.age, finding.id, finding.diagnosis))
    )


def first(rules: Iterable[Rule[T]], subject: T) -> Rule[T]:
    """The rule that applies to ``subject``."""
    return next(rule for rule in rules if rule.applies(subject))


def quiet(evidence: Evidence) -> Quiet:
    """What is open and not worth telling one by one, in numbers."""
    rules = {header.chord.group_id: first(CHORDS, header) for header in headers(evidence)}
    at_work = {group_id for group_id, rule in rules.items() if rule.name == "at-work"}
    where = Counter((_kind_of(message, at_work), message.where) for message in evidence.messages)
    of_chords, of_callbacks, of_tasks = (Hands(where[it, Where.QUEUED], where[it, Where.HELD]) for it in KINDS)
    return Quiet(
        Counter(rule.name for rule in rules.values() if not rule.report), of_chords, of_callbacks, of_tasks,
        evidence.outside, evidence.messages_outside,
    )  # fmt: skip


def _kind_of(message: Message, at_work: Collection[str]) -> Kind:
    """Of what a message is, if nobody has to be told of it: what belongs to a chord at work is part of that."""
    if message.group_id in at_work:
        return "chord"
    return "task" if message.callback_of is None else "callback"


def headers(evidence: Evidence) -> Iterator[Header]:
    """Each chord, with what of its header is not where it should be."""
    of_chord: defaultdict[str, list[Message]] = defaultdict(list)
    for message in evidence.messages:
        if message.group_id is not None:
            of_chord[message.group_id].append(message)
    return (_header(chord, of_chord[chord.group_id]) for chord in evidence.chords)


def _header(chord: Chord, messages: list[Message]) -> Header:
    lost = tuple(it for it in messages if first(MESSAGES, it).remedy is not Remedy.NONE)
    dead = tuple(it for it in messages if first(MESSAGES, it).name in ("revoked", "expired"))
    refused = tuple(it for it in messages if first(MESSAGES, it).name == "refused")
    return Header(chord, lost, tuple(it for it in messages if it.where is Where.UNKNOWN), dead, refused)


def _diagnose_chord(header: Header) -> tuple[Finding | None, Collection[str]]:
    """What is to be told of a chord, and those of its header's messages that nobody has to judge by themselves."""
    chord, rule = header.chord, first(CHORDS, header)
    covered = _covered(header, rule)
    if not rule.report:
        return None, covered
    why = rule.why.format(
        total=chord.total, returned=chord.returned, ended=chord.ended, publish_error=chord.publish_error,
        lost=len(header.lost), unknown=len(header.unknown), missing=chord.total - chord.returned,
        unrecoverable=chord.unrecoverable, failed=chord.failed, dead=len(header.dead), refused=len(header.refused),
    )  # fmt: skip
    return Finding(
        kind="chord", id=chord.group_id, diagnosis=rule.name, remedy=rule.remedy, reason=why, callback=chord.callback,
        age=chord.age, returned=chord.returned, total=chord.total,
        messages=covered if rule.remedy in (Remedy.REPUBLISH, Remedy.REVOKE_PART) else (),
    ), covered  # fmt: skip


def _covered(header: Header, rule: Rule[Header]) -> tuple[str, ...]:
    """The messages that go with the chord. What is left of a header whose parts are all here is needed by nobody, and
    a chord that is left alone is left alone with its header."""
    moot = header.complete or header.chord.publish_error is not None
    lost = header.lost if moot or rule.remedy in (Remedy.REPUBLISH, Remedy.REVOKE_PART) else ()
    unknown = header.unknown if moot or rule.name == "unknown" else ()
    dead = header.dead if moot or rule.name in ("header-expired", "chain-expired") else ()
    refused = header.refused if moot or rule.name == "header-refused" else ()
    return tuple(it.message_id for it in (*lost, *unknown, *dead, *refused))


def _diagnose_messages(messages: Iterable[Message]) -> Iterator[Finding]:
    """What is to be told of messages: one finding for all of a task's, or of a callback's, that fare alike."""
    alike: defaultdict[tuple[Kind, str, str], list[Message]] = defaultdict(list)
    for message in messages:
        rule = first(MESSAGES, message)
        if rule.report and message.callback_of is not None:
            alike["callback", message.callback_of, rule.name].append(message)
        elif rule.report:
            alike["task", message.task_id, rule.name].append(message)
    for (kind, subject, _), group in alike.items():
        rule, oldest = first(MESSAGES, group[0]), max(group, key=lambda it: it.age)
        is_callback = kind == "callback"
        names = ", ".join(sorted({it.task_name for it in group}))
        yield Finding(
            kind=kind, id=subject, diagnosis=f"callback-{rule.name}" if is_callback else rule.name,
            remedy=rule.remedy, reason=rule.why.format(task_name=names), callback=names if is_callback else None,
            age=oldest.age, messages=tuple(it.message_id for it in group),
        )  # fmt: skip
