"""How tasks end and what becomes known of it: states, families, failures."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from celery import VERSION, chain, chord
from celery.exceptions import ChordError, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult, GroupResult

from patchpilot.lab.processes import until
from tests.support.extras import dies, fail, knocks, opaque, progresses, spawns
from tests.support.shop import add, app, hold, total
from tests.support.station import Setup, Station, on

WAIT = 60

TRACKED = Setup("tracked", {"task_track_started": True})

pytestmark = pytest.mark.backend


@pytest.fixture
def gate(station: Station) -> Path:
    return station.shop.directory / f"gate-{uuid.uuid4()}"


# -- states -----------------------------------------------------------------------------------------------------------


@on(TRACKED)
def test_a_start_is_tracked(station: Station, gate: Path) -> None:
    result = hold.delay(1, str(gate))
    until(lambda: result.state == "STARTED", seconds=WAIT, what="its start was on record")
    assert set(result.info) == {"pid", "hostname"}
    assert not result.ready()
    gate.touch()
    assert result.get(timeout=WAIT) == 1


def test_progress(station: Station, gate: Path) -> None:
    result = progresses.delay(str(gate))
    until(lambda: result.state == "PROGRESS", seconds=WAIT, what="its progress was on record")
    assert result.info == {"done": 1}
    gate.touch()
    assert result.get(timeout=WAIT) == "None"


def test_whoever_waits_hears_of_progress(station: Station, gate: Path) -> None:
    heard: list[str] = []

    def listen(meta: dict[str, Any]) -> None:
        heard.append(meta["status"])
        if meta["status"] == "PROGRESS":
            gate.touch()

    assert progresses.delay(str(gate)).get(timeout=WAIT, on_message=listen) == "None"
    assert heard == ["PROGRESS", "SUCCESS"]


def test_a_retry_shows_while_it_waits(station: Station, gate: Path) -> None:
    result = knocks.delay(str(gate))
    until(lambda: result.state == "RETRY", seconds=WAIT, what="it was to be tried again")
    assert repr(result.result) == "KeyError('closed')"
    assert "KeyError" in result.traceback
    assert not result.ready()
    gate.touch()
    assert result.get(timeout=WAIT) == "open"


def test_a_task_that_is_revoked_before_it_runs(station: Station) -> None:
    blocked = add.apply_async((1, 1), countdown=1)
    part = add.s(2, 2).set(countdown=1)
    in_chord = chord([part, add.s(3, 3)], total.s()).delay()
    for result in (blocked, in_chord.parent.results[0]):
        result.revoke()
    with pytest.raises(TaskRevokedError, match="revoked"):
        blocked.get(timeout=WAIT)
    assert (blocked.state, blocked.ready(), blocked.failed()) == ("REVOKED", True, False)
    error = in_chord.get(timeout=WAIT, propagate=False)
    assert isinstance(error, ChordError)
    assert "TaskRevokedError" in str(error)
    assert "add 1 1" not in station.ledger()


def test_a_task_that_is_revoked_while_it_runs(station: Station, gate: Path) -> None:
    result = chord([hold.s(1, str(gate))], total.s()).delay()
    [part] = result.parent.results
    until(lambda: "hold began" in station.ledger(), seconds=WAIT, what="it ran")
    part.revoke(terminate=True)
    # Celery 5.6 stores the one and then the other.
    with pytest.raises(TaskRevokedError, match="revoked|terminated" if VERSION[:2] == (5, 6) else "terminated"):
        part.get(timeout=WAIT)
    assert isinstance(result.get(timeout=WAIT, propagate=False), ChordError)


def test_a_task_that_takes_too_long(station: Station, gate: Path) -> None:
    result = chord([hold.s(1, str(gate)).set(time_limit=1)], total.s()).delay()
    [part] = result.parent.results
    with pytest.raises(TimeLimitExceeded):
        part.get(timeout=WAIT)
    assert isinstance(result.get(timeout=WAIT, propagate=False), ChordError)


def test_a_task_that_expires(station: Station) -> None:
    result = add.apply_async((9, 9), countdown=1, expires=0.5)
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=WAIT)
    station.await_silence()
    assert "add 9 9" not in station.ledger()


# -- families ---------------------------------------------------------------------------------------------------------


def test_children(station: Station) -> None:
    result = spawns.delay(3)
    result.get(timeout=WAIT)
    found = app.AsyncResult(result.id)
    [child] = found.children
    assert isinstance(child, GroupResult)
    if VERSION < (5, 7):  # of several results of one task, only the first one is told while it waits
        until(child.ready, seconds=WAIT, what="all of them had run")
    assert child.get(timeout=WAIT) == [0, 2, 4]
    assert found.get_leaf() in (0, 2, 4)
    values = [value for node, value in found.collect() if isinstance(node, AsyncResult) and not node.children]
    assert values == [0, 2, 4]


def test_parents(station: Station) -> None:
    result = chain(add.s(1, 1), add.s(2), add.s(3)).delay()
    assert result.get(timeout=WAIT) == 7
    assert [result.parent.get(), result.parent.parent.get(), result.parent.parent.parent] == [4, 2, None]
    first, second = result.parent.parent, result.parent
    assert [child.id for child in app.AsyncResult(first.id).children] == [second.id]
    assert app.backend.get_task_meta(second.id)["parent_id"] == first.id
    assert app.backend.get_task_meta(first.id).get("parent_id") is None
    failed = chain(fail.s(), add.s(2), add.s(3)).delay()
    with pytest.raises(ValueError, match="no"):
        failed.get(timeout=WAIT)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("demanding", "UnpickleableExceptionWrapper", "Demanding('a b')"),
        ("holding", "UnpickleableExceptionWrapper", "Holding('a', <function"),
        ("local", "UnpickleableExceptionWrapper", "Local('a')"),
        ("unprintable", "UnpickleableExceptionWrapper", "x"),
        ("caused", "ValueError", "('outer', {'at': 1})"),
        ("group", "Exception", "ExceptionGroup"),
        ("unicode", "ValueError", "\udc80 \0 é"),
        ("system", "SystemError", "anything"),
    ],
)
def test_exceptions(station: Station, how: str, kind: str, words: str) -> None:
    """As Celery gives them back with JSON: at worst in other clothes, never as another error, and never not at all."""
    result = dies.delay(how)
    error = result.get(timeout=WAIT, propagate=False)
    assert type(error).__name__ == kind
    assert words in str(error)
    assert "raise " in result.traceback
    of_chord = chord([dies.s(how), add.s(1, 1)], total.s()).delay()
    assert isinstance(of_chord.get(timeout=WAIT, propagate=False), ChordError)


def test_a_result_that_cannot_be_encoded_is_a_failure(station: Station) -> None:
    with pytest.raises(Exception, match="not JSON serializable"):
        opaque.delay().get(timeout=WAIT)
