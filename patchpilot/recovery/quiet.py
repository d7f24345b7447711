"""What is open and no finding, in numbers: so that nobody takes for well what was not stuck, or was not looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from patchpilot.durations import ago
from patchpilot.recovery.findings import KINDS, Finding, Kind, Window


@dataclass(frozen=True)
class Outside:
    """What is outside the window, and was not looked at."""

    young: int = 0
    """It made progress since."""
    old: int = 0
    """It made none for longer."""


@dataclass(frozen=True)
class Hands:
    """Messages that are in good hands."""

    queued: int = 0
    held: int = 0
    """A worker has them."""

    def __str__(self) -> str:
        return f"{self.queued} in queues, {self.held or 'none'} with {'workers' if self.held else 'a worker'}"


@dataclass(frozen=True)
class Quiet:
    """What a pass had nothing to say about."""

    chords: Mapping[str, int] = field(default_factory=dict)
    """Open chords whose diagnosis is no finding, by that diagnosis."""
    headers: Hands = field(default_factory=Hands)
    """Messages of the headers of chords at work."""
    callbacks: Hands = field(default_factory=Hands)
    """Messages of callbacks."""
    tasks: Hands = field(default_factory=Hands)
    """Messages of tasks that are in no such header and no callbacks."""
    outside: Outside = field(default_factory=Outside)
    """Open chords."""
    messages_outside: Outside = field(default_factory=Outside)
    """Messages of tasks that have not ended, those of chords included."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can express it."""
        return {**asdict(self), "chords": dict(self.chords)}


STANDING = {
    "being-dispatched": "being finished",
    "finishing": "being finished",
    "being-finished": "being finished",
    "shadow-at-work": "only watched",
    "being-published": "only just sent",
    "at-work": "under way",
}
"""What is said of open chords that are no findings, by their diagnosis."""


def headline(quiet: Quiet, kinds: Collection[Kind] = KINDS, *, elsewhere: bool = False) -> str:
    """What to say where there is no finding.

    :param kinds: those that were asked for.
    :param elsewhere: something is open of another broker, which nobody looked at.
    """
    whole = set(kinds) == set(KINDS) and quiet.outside == quiet.messages_outside == Outside() and not elsewhere
    return "nothing is stuck" if whole else "nothing is stuck of what was looked at"


def rest(
    findings: Collection[Finding], quiet: Quiet, window: Window, kinds: Collection[Kind] = KINDS
) -> tuple[str, ...]:
    """The lines for a person that go with ``findings``: what else is open, what is not known, what nobody looked at."""
    return (*_open(quiet, kinds), *_unknown(findings), *_not_looked_at(quiet, window, kinds))


def _open(quiet: Quiet, kinds: Collection[Kind]) -> Iterator[str]:
    numbers: Counter[str] = Counter()
    for diagnosis, number in quiet.chords.items():
        numbers[STANDING[diagnosis]] += number
    for standing, number in sorted(numbers.items()) if "chord" in kinds else ():
        where = "" if standing != STANDING["at-work"] else f"; messages of their headers: {quiet.headers}"
        yield f"open: {many(number, 'chord')} {standing}{where}"
    for kind, noun, hands in (("callback", "callback", quiet.callbacks), ("task", "other task", quiet.tasks)):
        if kind in kinds and hands.queued + hands.held:
            yield f"open: {many(hands.queued + hands.held, 'message')} of {noun}s: {hands}"
    everywhere = (quiet.headers, quiet.callbacks, quiet.tasks)
    if any(hands.queued for hands in everywhere) and not any(hands.held for hands in everywhere):
        yield "open: no worker has any of what is queued; if that stays so, look whether one consumes these queues"


def _unknown(findings: Collection[Finding]) -> Iterator[str]:
    number = sum(it.unknown for it in findings)
    if number:
        yield f"not known: whether {number} of these {'is' if number == 1 else 'are'} lost or well; the reason is given"


def _not_looked_at(quiet: Quiet, window: Window, kinds: Collection[Kind]) -> Iterator[str]:
    others = [f"{kind}s" for kind in KINDS if kind not in kinds]
    if others:
        yield f"not looked at: {' and '.join(others)}, which were not asked for"
    looked = (("chord", "chord" in kinds, quiet.outside), ("message", {*kinds} != {"chord"}, quiet.messages_outside))
    for noun, asked, outside in looked:
        if asked and outside.young:
            yield f"not looked at: {many(outside.young, noun)} with progress in the last {ago(window.min_age)}"
        if asked and outside.old:
            yield f"not looked at: {many(outside.old, noun)} without progress for {ago(window.max_age)}"


def many(number: int, noun: str) -> str:
    """So many of these, as one says it."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
