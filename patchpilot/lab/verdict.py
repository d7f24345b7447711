"""The verdict: what became of each chord, from the ledger alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from patchpilot.lab.ledger import Chord

HEADER, PART, CALLBACK = "header message lost", "part return lost", "callback lost"

LATER = "not stuck yet when counted"
IN_FLIGHT_SECONDS = 4.0
"""A chord that was sent less than this before the moment of counting is still on its way, not stuck."""


@dataclass(frozen=True)
class Stuck:
    """The chords that were stuck at one moment, and what each had lost."""

    kinds: Mapping[str, str]
    """Chord name -> kind."""


@dataclass(frozen=True)
class Verdict:
    """One side of the comparison."""

    sent: int
    stuck: int
    recovered: int
    lost: int
    duplicated: int
    """Callbacks that ran more than once."""
    wrong: int
    """Callbacks that got other results than the header returned."""
    raised: int
    """Chords whose sending raised in the producer: not counted as sent."""
    repeated_parts: int
    """Header tasks that ran more than once: Celery delivers at least once."""
    stuck_by_kind: dict[str, int] = field(default_factory=dict)
    lost_by_kind: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated or self.wrong)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can express it."""
        return asdict(self)


def stuck(
    chords: Mapping[str, Chord], moment: float, counting: set[str], waiting: set[tuple[str, int | None]]
) -> Stuck:
    """Which chords were stuck at ``moment``: their callback had not run, and nothing in the broker would have run it.

    A chord has lost a header message if the part of some employee had not run and no message asked for it, whatever
    else of it waited. If nothing is lost and something waits, it is late, not stuck.

    :param waiting: what was queued or in a worker's hands: chord and employee, or chord and None for the callback.
    :param counting: the group ids whose size key was still in Valkey: their count had not completed. A chord whose
        header tasks all ran is one that lost a part return if its count is incomplete, and its callback if not.
    """
    kinds = {}
    for name, chord in chords.items():
        if chord.sent_at is None or chord.sent_at > moment - IN_FLIGHT_SECONDS:
            continue
        if chord.done_by(moment):
            continue
        if any((name, employee) not in waiting for employee in chord.open_at(moment)):
            kinds[name] = HEADER
        elif not any((name, each) in waiting for each in (None, *chord.employees)):
            # A part that ran and is not acknowledged yet may still return, or will run again.
            kinds[name] = PART if chord.group_id in counting else CALLBACK
    return Stuck(kinds)


def verdict(chords: Mapping[str, Chord], before: Stuck) -> Verdict:
    """What became of everything that was sent.

    :param before: what was stuck before recovery.
    """
    sent = {name: chord for name, chord in chords.items() if chord.sent_at is not None}
    lost = [name for name, chord in sent.items() if not chord.callbacks]
    return Verdict(
        sent=len(sent),
        stuck=len(before.kinds),
        recovered=sum(1 for name in before.kinds if sent[name].callbacks),
        lost=len(lost),
        duplicated=sum(len(chord.callbacks) > 1 for chord in sent.values()),
        wrong=sum(bool(chord.wrong) for chord in sent.values()),
        raised=sum(bool(chord.raised) for chord in chords.values()),
        repeated_parts=sum(count - 1 for chord in sent.values() for count in chord.parts.values()),
        stuck_by_kind=_counted(before.kinds.values()),
        lost_by_kind=_counted(before.kinds.get(name, LATER) for name in lost),
    )


def _counted(kinds: Any) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))
