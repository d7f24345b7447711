"""Who is silent counts as dead only once PostgreSQL has been there for long enough to hear of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from patchpilot.backend.heartbeat import RETURNS
from patchpilot.clock import FakeClock
from patchpilot.durations import HEARTBEAT, LEAST_SILENCE
from patchpilot.workers.contact import Contact

SEEN = datetime(2026, 1, 1, tzinfo=UTC)
A = {"a": SEEN}


def keep(contact: Contact, clock: FakeClock, span: timedelta) -> None:
    """Stay in contact for ``span``."""
    contact.renew()
    left = span
    while left > timedelta():
        step = min(left, HEARTBEAT)
        clock.sleep(step.total_seconds())
        contact.renew()
        left -= step


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def contact(clock: FakeClock) -> Contact:
    return Contact(clock, RETURNS * 6)


def test_who_is_silent_is_given_time_from_the_first_contact_on(contact: Contact, clock: FakeClock) -> None:
    assert contact.owed(A) == {"a"}
    keep(contact, clock, RETURNS - timedelta(seconds=1))
    assert contact.owed(A) == {"a"}
    clock.sleep(1)
    assert contact.owed(A) == set()


def test_nobody_is_given_more_than_makes_a_worker_count_as_dead(clock: FakeClock) -> None:
    contact = Contact(clock, LEAST_SILENCE)
    assert contact.owed(A) == {"a"}
    clock.sleep(LEAST_SILENCE.total_seconds())
    assert contact.owed(A) == set()


def test_a_contact_that_lasts_gives_nobody_more_time(contact: Contact, clock: FakeClock) -> None:
    keep(contact, clock, RETURNS)
    assert contact.owed(A) == set()


def test_a_gap_in_which_postgresql_may_have_been_away_breaks_it(contact: Contact, clock: FakeClock) -> None:
    keep(contact, clock, RETURNS)
    clock.sleep(LEAST_SILENCE.total_seconds() + 0.1)
    assert contact.owed(A) == {"a"}


def test_who_had_the_time_once_is_given_none_again_until_it_was_heard_of(contact: Contact, clock: FakeClock) -> None:
    keep(contact, clock, RETURNS)
    contact.owed(A)
    clock.sleep(3600)
    later = SEEN + HEARTBEAT
    assert contact.owed({"a": SEEN, "b": SEEN}) == {"b"}
    assert contact.owed({"a": later, "b": SEEN}) == {"a", "b"}
