"""Canvases, and what each of them gives: as Celery 5.7 on its own Redis backend does.

Two orders that depend on random task ids in Celery are fixed here: what was added to a chord under way comes last, and
the results of groups that a generator yielded come one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from celery import VERSION, chain, chord, group

from tests.support.extras import (
    becomes,
    becomes_chord,
    becomes_group,
    becomes_links,
    constant,
    fail,
    grows_by_failing,
    grows_twice,
    mourner,
    opaque,
    starts_a_chord,
    wail,
)  # fmt: skip
from tests.support.shop import add, grows, note, quiet, stubborn, total


@dataclass(frozen=True)
class Failure:
    """What a failed canvas raises: the kind, or one of several ``a|b``, and words of its message."""

    kind: str
    words: str = ""

    def __eq__(self, other: object) -> bool:
        return type(other).__name__ in self.kind.split("|") and self.words in str(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Case:
    """A canvas, its outcome and how often each task runs for it."""

    canvas: Callable[[], Any]
    outcome: Any
    runs: dict[str, int]
    also: tuple[str, ...] = ()
    """Other lines of the ledger that there have to be: of errbacks and links."""


def twos(number: int) -> list[Any]:
    return [add.s(i, i) for i in range(number)]


def linked(signature: Any, callback: Any) -> Any:
    signature.link(callback)
    return signature


def mourned(signature: Any, errback: Any) -> Any:
    signature.link_error(errback)
    return signature


SIMPLE = {
    "task": Case(lambda: add.s(1, 2), 3, {"add": 1}),
    "chain": Case(lambda: chain(add.s(1, 2), add.s(3), add.s(4)), 10, {"add": 3}),
    "group": Case(lambda: group(twos(3)), [0, 2, 4], {"add": 3}),
    "group of one": Case(lambda: group(add.s(1, 1)), [2], {"add": 1}),
    "group of one in a chain": Case(lambda: chain(group(add.s(1, 1)), note.s()), 2, {"add": 1, "note": 1}),
    "empty group in a chain": Case(lambda: chain(add.s(1, 1), group([]), add.s(1)), 3, {"add": 2}),
    "map": Case(lambda: total.map([[1, 2], [3]]), [3, 3], {"map": 1}),
    "starmap": Case(lambda: add.starmap([(1, 2), (3, 4)]), [3, 7], {"starmap": 1}),
    "chunks": Case(
        lambda: add.chunks(zip(range(4), range(4), strict=True), 2).group(), [[0, 2], [4, 6]], {"starmap": 2}
    ),
}

HEADERS = {
    "chord": Case(lambda: chord(twos(10), total.s()), 90, {"add": 10, "total": 1}),
    "chord of one": Case(lambda: chord([add.s(1, 1)], total.s()), 2, {"add": 1, "total": 1}),
    "group then task": Case(lambda: chain(group(twos(3)), note.s()), [0, 2, 4], {"add": 3, "note": 1}),
    "group or task": Case(lambda: group(twos(3)) | note.s(), [0, 2, 4], {"add": 3, "note": 1}),
    "generator header": Case(
        lambda: chord((add.s(i, i) for i in range(3)), note.s()), [0, 2, 4], {"add": 3, "note": 1}
    ),
    "generator of chains": Case(
        lambda: chord((chain(add.s(i, i), add.s(1)) for i in range(2)), note.s()), [1, 3], {"add": 4, "note": 1}
    ),
    "chunks then task": Case(
        lambda: add.chunks(zip(range(4), range(4), strict=True), 2).group() | note.s(),
        [[0, 2], [4, 6]],
        {"starmap": 2, "note": 1},
    ),
    "map in a header": Case(
        lambda: chord([total.map([[1], [2]]), add.s(1, 1)], note.s()), [[1, 2], 2], {"map": 1, "add": 1, "note": 1}
    ),
    "chord of chains": Case(
        lambda: chord([chain(add.s(1, 1), add.s(i)) for i in range(3)], note.s()), [2, 3, 4], {"add": 6, "note": 1}
    ),
    "group in a header": Case(
        lambda: chord([group(add.s(1, 1), add.s(2, 2)), add.s(3, 3)], note.s()), [4, 2, 6], {"add": 3, "note": 1}
    ),
    "group in a group in a header": Case(
        lambda: chord([group(group(add.s(1, 1)), add.s(2, 2)), add.s(3, 3)], note.s()), [4, 2, 6], {"add": 3, "note": 1}
    ),
    "chord in a header": Case(
        lambda: chord([chord(twos(3), total.s()), add.s(1, 0)], note.s()), [6, 1], {"add": 4, "total": 1, "note": 1}
    ),
    "chord in a chord in a header": Case(
        lambda: chord([chord([chord(twos(3), total.s()), add.s(1, 0)], total.s()), add.s(2, 0)], note.s()),
        [7, 2],
        {"add": 5, "total": 2, "note": 1},
    ),
    "only chords in a header": Case(
        lambda: chord([chord(twos(2), total.s()), chord(twos(3), total.s())], note.s()),
        [2, 6],
        {"add": 5, "total": 2, "note": 1},
    ),
    "chain ending in a group in a header": Case(
        lambda: chord([chain(add.s(1, 1), group(add.s(1), add.s(2))), add.s(0, 0)], note.s()),
        [[3, 4], 0],
        {"add": 4, "note": 1},
    ),
    "generator of chains ending in a group": Case(
        # Celery numbers the tasks of each group from 0, so which of them comes first is nobody's promise.
        lambda: chord((chain(add.s(i, 1), group(add.s(1), add.s(2))) for i in range(2)), total.s()),
        12,
        {"add": 6, "total": 1},
    ),
    "chain ending in a chord in a header": Case(
        lambda: chord([chain(add.s(1, 1), group(add.s(1), add.s(2)), total.s()), add.s(0, 0)], note.s()),
        [7, 0],
        {"add": 4, "total": 1, "note": 1},
    ),
    "immutable header": Case(
        lambda: chain(add.s(1, 1), group(add.si(1, 1), add.si(2, 2)), note.s()), [2, 4], {"add": 3, "note": 1}
    ),
    "header that ignores its results": Case(
        lambda: chord([quiet.s(4), quiet.s(5)], note.s()), [4, 5], {"quiet": 2, "note": 1}
    ),
    "header that ignores its results this time": Case(
        lambda: chord([add.s(1, 1).set(ignore_result=True), add.s(2, 2)], note.s()), [2, 4], {"add": 2, "note": 1}
    ),
    "retried part": Case(
        lambda: chord([stubborn.s(5), add.s(1, 1)], total.s()), 7, {"stubborn": 2, "add": 1, "total": 1}
    ),
    "the same signature twice": Case(
        lambda: chord([(same := add.s(1, 1)), same], note.s()), [2, 2], {"add": 2, "note": 1}
    ),
    "delayed header": Case(
        lambda: chord([add.s(1, 1).set(countdown=0.2), add.s(2, 2)], note.s()), [2, 4], {"add": 2, "note": 1}
    ),
}

BODIES = {
    "chain body": Case(lambda: chord(twos(2), chain(total.s(), add.s(100))), 102, {"add": 3, "total": 1}),
    "group body": Case(
        lambda: chord(twos(2), group(total.s(), note.s())), [2, [0, 2]], {"add": 2, "total": 1, "note": 1}
    ),
    "chain ending in a group as body": Case(
        lambda: chord(twos(2), chain(total.s(), group(add.s(1), add.s(2)))), [3, 4], {"add": 4, "total": 1}
    ),
    "chord as body": Case(
        lambda: chord(twos(2), chord([total.s(), total.s()], note.s())), [2, 2], {"add": 2, "total": 2, "note": 1}
    ),
    "immutable body": Case(lambda: chord(twos(2), add.si(20, 1)), 21, {"add": 3}),
    "partial body": Case(lambda: chord(twos(2), constant.s([7])), [0, 2], {"add": 2, "constant": 1}),
    "body with arguments of its own": Case(
        lambda: chord(twos(2), note.s(label="mine")), [0, 2], {"add": 2, "note": 1}, also=("mine [0, 2]",)
    ),
    "empty header": Case(lambda: chord([], total.s()), 0, {"total": 1}),
    "empty generator header": Case(lambda: chord((add.s(i, i) for i in range(0)), total.s()), 0, {"total": 1}),
    "empty header, chain body": Case(lambda: chord([], chain(total.s(), add.s(1))), 1, {"total": 1, "add": 1}),
    "map body": Case(lambda: chord([add.s(1, 1)], total.map([[1], [2]])), [1, 2], {"map": 1, "add": 1}),
}

NESTED = {
    "chord in a chain": Case(
        lambda: chain(add.s(1, 1), chord([add.s(1), add.s(2)], total.s())), 7, {"add": 3, "total": 1}
    ),
    "chord in the middle of a chain": Case(
        lambda: chain(add.s(1, 1), chord([add.s(1), add.s(2)], total.s()), add.s(1)), 8, {"add": 4, "total": 1}
    ),
    "chain of chords": Case(
        lambda: chain(chord(twos(2), total.s()), chord([add.s(1), add.s(2)], total.s()), chord([add.s(1)], note.s())),
        [8],
        {"add": 5, "total": 2, "note": 1},
    ),
    "groups in a chain": Case(
        lambda: chain(group(add.s(1, 1), add.s(2, 2)), group(total.s(), total.s()), note.s()),
        [6, 6],
        {"add": 2, "total": 2, "note": 1},
    ),
    "group of chords": Case(
        lambda: group(chord(twos(2), total.s()), chord(twos(3), total.s())), [2, 6], {"add": 5, "total": 2}
    ),
    "group of chains": Case(lambda: group(chain(add.s(1, 1), add.s(1)), add.s(5, 5)), [3, 10], {"add": 3}),
    "chord sent by a task": Case(lambda: starts_a_chord.s(1), 1, {"starts_a_chord": 1, "add": 2, "note": 1}),
}

REPLACED = {
    "replaced by a chord": Case(lambda: becomes_chord.s(1), 5, {"becomes_chord": 1, "add": 2, "total": 1}),
    "replaced by a group": Case(lambda: becomes_group.s(1), [2, 3], {"becomes_group": 1, "add": 2, "accumulate": 1}),
    "replaced by a chain": Case(lambda: becomes_links.s(1), 3, {"becomes_links": 1, "add": 2}),
    "part replaced by a chord": Case(
        lambda: chord([becomes_chord.s(1), add.s(1, 1)], note.s()),
        [5, 2],
        {"becomes_chord": 1, "add": 3, "total": 1, "note": 1},
    ),
    "part replaced by a group": Case(
        lambda: chord([becomes_group.s(1), add.s(1, 1)], note.s()),
        [[2, 3], 2],
        {"becomes_group": 1, "add": 3, "accumulate": 1, "note": 1},
    ),
    "part replaced by a chain": Case(
        lambda: chord([becomes_links.s(1), add.s(1, 1)], note.s()), [3, 2], {"becomes_links": 1, "add": 3, "note": 1}
    ),
    "body replaced by a chord": Case(
        lambda: chord([add.s(1, 1)], becomes.s(canvas=chord(twos(2), total.s()))),
        2,
        {"add": 3, "becomes": 1, "total": 1},
    ),
    "replaced in a chain": Case(
        lambda: chain(add.s(0, 1), becomes_chord.s(), add.s(1)), 6, {"becomes_chord": 1, "add": 4, "total": 1}
    ),
    "replaced by a chord of chords": Case(
        lambda: becomes.s(canvas=chord([chord(twos(2), total.s()), add.s(1, 1)], note.s())),
        [2, 2],
        {"becomes": 1, "add": 3, "total": 1, "note": 1},
    ),
    "growing chord": Case(
        lambda: chord([grows.s(1), add.s(1, 1)], note.s()), [1, 2, 11], {"grows": 1, "add": 2, "note": 1}
    ),
    "chord that grows as it grows": Case(
        lambda: chord([grows_twice.s(1), add.s(1, 1)], total.s()),
        107,
        {"grows_twice": 1, "grows_once": 1, "add": 2, "total": 1},
    ),
}


LINKS = {
    "link on a body": Case(
        lambda: chord(twos(2), linked(total.s(), note.s(label="linked"))),
        2,
        {"add": 2, "total": 1, "note": 1},
        ("linked 2",),
    ),
    "link on a part": Case(
        lambda: chord([linked(add.s(1, 1), note.s(label="linked")), add.s(2, 2)], note.s()),
        [2, 4],
        {"add": 2, "note": 2},
        ("linked 2",),
    ),
    "link on a chord": Case(
        lambda: linked(chord(twos(2), total.s()), note.s(label="linked")),
        2,
        {"add": 2, "total": 1, "note": 1},
        ("linked 2",),
    ),
    "two links on a body": Case(
        lambda: chord(twos(2), linked(linked(total.s(), note.s(label="one")), note.s(label="two"))),
        2,
        {"add": 2, "total": 1, "note": 2},
        ("one 2", "two 2"),
    ),
    "chord as a link": Case(
        lambda: linked(add.s(1, 1), chord([add.s(1), add.s(2)], note.s(label="linked"))),
        2,
        {"add": 3, "note": 1},
        ("linked [3, 4]",),
    ),
    "link_error that is not needed": Case(
        lambda: mourned(chord(twos(2), total.s()), wail.s()), 2, {"add": 2, "total": 1}
    ),
}

FAILURES = {
    "failed part": Case(
        lambda: chord([add.s(1, 1), fail.s()], total.s()),
        Failure("ChordError", "ValueError('no')"),
        {"add": 1, "fail": 1},
    ),
    "two failed parts": Case(
        lambda: chord([fail.s(message="first"), fail.s(message="second")], total.s()),
        Failure("ChordError", "ValueError('first')"),
        {"fail": 2},
    ),
    "failed part, errback on the body": Case(
        lambda: chord([add.s(1, 1), fail.s()], mourned(total.s(), wail.s())),
        Failure("ChordError"),
        {"add": 1, "fail": 1, "wail": 1},
    ),
    "failed part, errback of the new kind on the body": Case(
        lambda: chord([add.s(1, 1), fail.s()], mourned(total.s(), mourner.s())),
        Failure("ChordError"),
        {"add": 1, "fail": 1},
        ("mourner ChordError",),
    ),
    "failed part with an errback": Case(
        lambda: chord([add.s(1, 1), mourned(fail.s(), wail.s())], total.s()),
        Failure("ChordError"),
        {"add": 1, "fail": 1, "wail": 1},
    ),
    "failed body with an errback": Case(
        lambda: chord(twos(2), mourned(fail.s(), wail.s())),
        Failure("ValueError", "no"),
        {"add": 2, "fail": 1, "wail": 1},
    ),
    "failed part of a chord with an errback": Case(
        lambda: mourned(chord([add.s(1, 1), fail.s(), fail.s()], total.s()), wail.s()),
        Failure("ChordError"),
        {"add": 1, "fail": 2, "wail": 1},
    ),
    "failed body of a chord with an errback": Case(
        lambda: mourned(chord(twos(2), fail.s()), wail.s()),
        Failure("ValueError", "no"),
        {"add": 2, "fail": 1, "wail": 1},
    ),
    "failed first task of a chain in a header": Case(
        lambda: chord([chain(fail.s(), add.s(1)), add.s(1, 1)], total.s()),
        Failure("ChordError", "ValueError('no')"),
        {"add": 1, "fail": 1},
    ),
    "failed part, group body": Case(
        lambda: chord([fail.s(), add.s(1, 1)], group(total.s(), note.s())),
        [Failure("ValueError", "no")] * 2,
        {"add": 1, "fail": 1},
    ),
    "failed part, group body with an errback": Case(
        lambda: mourned(chord([fail.s(), add.s(1, 1)], group(total.s(), note.s())), wail.s()),
        [Failure("ValueError", "no")] * 2,
        {"add": 1, "fail": 1, "wail": 2},
    ),
    "failed part, chain body": Case(
        lambda: chord([fail.s(), add.s(1, 1)], chain(total.s(), add.s(1))), Failure("ChordError"), {"add": 1, "fail": 1}
    ),
    "failed chord in a chain": Case(
        lambda: chain(add.s(1, 1), chord([fail.s(), add.s(1)], total.s()), add.s(1)),
        Failure("ChordError"),
        {"add": 2, "fail": 1},
    ),
    "failed task before a chord": Case(
        lambda: chain(fail.s(), chord([add.s(1), add.s(2)], total.s())), Failure("ValueError", "no"), {"fail": 1}
    ),
    "added part that fails": Case(
        lambda: chord([grows_by_failing.s(1), add.s(2, 2)], total.s()),
        Failure("ChordError", "ValueError('no')"),
        {"grows_by_failing": 1, "fail": 1, "add": 1},
    ),
    "part that cannot be encoded": Case(
        lambda: chord([opaque.s(), add.s(2, 2)], total.s()), Failure("ChordError"), {"opaque": 1, "add": 1}
    ),
}

ERRBACKS_ON_HEADERS = {
    "failed parts of a chord with an errback": Case(
        lambda: mourned(chord([add.s(1, 1), fail.s(), fail.s()], total.s()), wail.s()),
        Failure("ChordError"),
        {"add": 1, "fail": 2, "wail": 3},
    ),
    "failed body of a chord with an errback": Case(
        lambda: mourned(chord(twos(2), fail.s()), wail.s()),
        Failure("ValueError", "no"),
        {"add": 2, "fail": 1, "wail": 1},
    ),
}

UNHEARD: dict[str, Case] = {}
"""Celery tells nobody how these ended: whoever waits for the result waits for ever, with its own backend too."""

# What its Redis backend gives before 5.7, tried with each version.
if VERSION < (5, 7):
    SIMPLE["empty group in a chain"] = replace(SIMPLE["empty group in a chain"], outcome=Failure("TypeError"))
    _unheard = ["failed chord in a chain", "failed task before a chord"]
    if VERSION < (5, 6):
        _unheard += ["failed part, chain body", "failed part, group body", "failed part, group body with an errback"]
    UNHEARD |= {name: FAILURES.pop(name) for name in _unheard}
    _part = {"add": 1, "fail": 1}
    _revoked = [Failure("ValueError|TaskRevokedError")] * 2  # Celery 5.6 does both, and which comes last is chance
    for name in ("failed part, group body", "failed part, group body with an errback"):  # which is not called
        table = FAILURES if name in FAILURES else UNHEARD
        table[name] = replace(table[name], outcome=_revoked, runs=_part)

# Celery never finishes the outer chord of these. Recovery does: its part has ended, and was not returned.
UNFINISHED = {
    "failed chord in a header": Case(
        lambda: chord([chord([fail.s(), add.s(1, 1)], total.s()), add.s(2, 2)], note.s()),
        Failure("ChordError"),
        {"add": 2, "fail": 1},
    ),
    "part replaced by what fails": Case(
        lambda: chord([becomes.s(canvas=group(fail.s(), add.s(1, 1))), add.s(2, 2)], total.s()),
        Failure("ChordError"),
        {"becomes": 1, "fail": 1, "add": 2},
    ),
}
