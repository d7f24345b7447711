"""What a person is told of workers that may have something and do not say so."""

from __future__ import annotations

import re

import pytest

from patchpilot.errors import NeedsOperator
from patchpilot.recovery.hands import Hands
from patchpilot.recovery.housekeeping import _check


@pytest.mark.parametrize(
    ("hands", "words"),
    [
        (Hands(silent=frozenset({"b@h", "a@h"})), "alive and without an answer: a@h, b@h"),
        (Hands(strangers=2), "2 more that listen to the broker as workers do have not answered"),
        (Hands(unread=True), "has been sent something that nobody can look into"),
        (Hands(places=None), "workers without patchpilot"),
        (Hands(places=frozenset({"celery"})), "workers without patchpilot"),
        (Hands(unreached=frozenset({"/0.mine.pidbox"})), "workers listen on /0.mine.pidbox, where they are not asked"),
    ],
)
def test_whoever_may_have_something_is_named(hands: Hands, words: str) -> None:
    [doubt] = hands.doubts
    assert words in doubt
    assert hands.may_have({"queue": "celery", "routing_key": "celery", "exchange": ""})


@pytest.mark.parametrize(
    ("hands", "words"),
    [
        (Hands(answered=frozenset({"i"}), strangers=1), "nothing is adopted: 1 that listen"),
        (Hands(answered=frozenset({"i"}), unreached=frozenset({"/0.mine.pidbox"})), "/0.mine.pidbox"),
        (Hands(answered=frozenset({"i"}), places=None), "without patchpilot"),
        (Hands(answered=frozenset({"i"}), places=frozenset({"celery"})), "without patchpilot"),
    ],
)
def test_nothing_is_adopted_beside_who_may_have_no_patchpilot(hands: Hands, words: str) -> None:
    with pytest.raises(NeedsOperator, match=re.escape(words)):
        _check(hands)


def test_workers_with_patchpilot_are_no_hindrance_to_adoption_if_they_are_busy() -> None:
    _check(Hands(answered=frozenset({"i"}), silent=frozenset({"a@h"}), unread=True))


@pytest.mark.parametrize(
    ("exchange", "queue", "routing_key", "expected"),
    [
        ("papers", None, "news.today", True),  # sent to an exchange, whatever is bound to it
        ("papers", "news", "news.today", True),
        ("others", None, "news.today", False),
        ("", None, "papers", True),
        ("others", "papers", "x", True),
        ("", "others", "papers", True),  # the queue's name is that of the exchange's binding, if there is one
        ("", None, "news", False),
    ],
)
def test_a_worker_without_patchpilot_may_have_what_was_sent_to_where_it_consumes(
    exchange: str, queue: str | None, routing_key: str, *, expected: bool
) -> None:
    hands = Hands(answered=frozenset({"i"}), places=frozenset({"papers"}))
    assert hands.may_have({"queue": queue, "routing_key": routing_key, "exchange": exchange}) is expected


def test_where_everybody_has_answered_there_is_no_doubt() -> None:
    hands = Hands(answered=frozenset({"i"}))
    assert hands.doubts == ()
    assert not hands.may_have({"queue": "celery", "routing_key": "celery", "exchange": ""})
