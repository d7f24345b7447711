"""Waiting for a result while PostgreSQL stands still: what is not known yet is no error."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import ResultSet

from patchpilot.backend import waiting
from patchpilot.errors import Transient
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.postgres.connection import Database
from tests.conftest import shop_on
from tests.support.frozen import Freezable, freezable
from tests.support.processes import Shop
from tests.support.shop import add, app, total

pytestmark = pytest.mark.backend

WAIT = 60
FOR_EVER = {"patchpilot_postgres_budget": 600, "patchpilot_postgres_timeout": 600}
HASTY = {"patchpilot_postgres_budget": 1, "patchpilot_postgres_timeout": 1}


@pytest.fixture(scope="module")
def postgres(lab_roster: Roster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Freezable]:
    with freezable(tmp_path_factory.mktemp("freezable"), lab_roster) as opened:
        yield opened


@pytest.fixture
def here(
    request: pytest.FixtureRequest, postgres: Freezable, lab_roster: Roster, tmp_path: Path, valkey: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Shop]:  # fmt: skip
    """The test application on it, with the settings of the test."""
    for key, value in request.param.items():
        monkeypatch.setitem(app.conf, key, value)
    monkeypatch.setattr(waiting, "ASK_EVERY", 0.05)
    with shop_on(lab_roster, tmp_path, valkey, postgres.database(), monkeypatch) as shop:
        yield shop


patient = pytest.mark.parametrize("here", [FOR_EVER], indirect=True, ids=["patient"])
hasty = pytest.mark.parametrize("here", [HASTY], indirect=True, ids=["hasty"])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def result() -> Any:
    return app.AsyncResult(str(uuid.uuid4()))


def waiter(threads: ThreadPoolExecutor, **options: Any) -> tuple[Any, Future[Any]]:
    """A result, and who waits for it: PostgreSQL has been asked in vain when this returns."""
    deep, awaited = Event(), result()
    future = threads.submit(awaited.get, on_interval=lambda *_: deep.set(), **options)
    assert deep.wait(WAIT)
    return awaited, future


@patient
@pytest.mark.parametrize("of", ["one", "several"])
def test_whoever_begins_to_wait_hears_of_the_timeout(
    here: Shop, postgres: Freezable, threads: ThreadPoolExecutor, of: str
) -> None:
    assert result().state == "PENDING"  # connected
    awaited = result() if of == "one" else ResultSet([result(), result()])
    with postgres.frozen():
        heard = threads.submit(awaited.get, timeout=1).exception(WAIT)
    assert isinstance(heard, CeleryTimeoutError)


@patient
@pytest.mark.parametrize("of", ["chord", "chain"])
def test_the_parents_of_a_result_are_not_asked_for_longer(
    here: Shop, postgres: Freezable, threads: ThreadPoolExecutor, of: str
) -> None:
    """Celery asks how they stand before it waits."""
    parts = [add.s(1, 1), add.s(2, 2)]
    awaited = (chord(parts, total.s()) if of == "chord" else chain(add.s(1, 1), add.s(2))).apply_async()
    with postgres.frozen():
        heard = threads.submit(awaited.get, timeout=1).exception(WAIT)
    assert isinstance(heard, CeleryTimeoutError)


@patient
def test_whoever_waits_already_hears_of_the_timeout(
    here: Shop, postgres: Freezable, threads: ThreadPoolExecutor
) -> None:
    _, waits = waiter(threads, timeout=5)
    with postgres.frozen():
        assert isinstance(waits.exception(WAIT), CeleryTimeoutError)


@patient
def test_nobody_waits_as_long_as_another_thread_does(
    here: Shop, postgres: Freezable, threads: ThreadPoolExecutor
) -> None:
    """Who has more time holds the connection meanwhile."""
    awaited, patient_one = waiter(threads, timeout=2 * WAIT)
    with postgres.frozen():
        until(lambda: _is_busy(app.backend.database), seconds=WAIT, what="the patient one asked")
        heard = threads.submit(result().get, timeout=1).exception(WAIT)
        assert not patient_one.done()
    assert isinstance(heard, CeleryTimeoutError)
    app.backend.store_result(awaited.id, 8, "SUCCESS")
    assert patient_one.result(WAIT) == 8


def _is_busy(database: Database) -> bool:
    if not database._lock.acquire(timeout=2):
        return True
    database._lock.release()
    return False


@hasty
def test_whoever_waits_without_a_timeout_survives_any_outage(
    here: Shop, postgres: Freezable, threads: ThreadPoolExecutor
) -> None:
    (early, waits), late = waiter(threads), result()
    database = app.backend.database
    with postgres.frozen():
        until(lambda: database._gave_up_at is not None, seconds=WAIT, what="a budget was spent")
        deep = Event()
        waits_too = threads.submit(late.get, on_interval=deep.set)
        assert deep.wait(WAIT)
        assert not waits.done()
    until(lambda: _stored(early.id) and _stored(late.id), seconds=WAIT, what="PostgreSQL was back")
    assert (waits.result(WAIT), waits_too.result(WAIT)) == (8, 8)


def _stored(task_id: str) -> bool:
    try:
        app.backend.store_result(task_id, 8, "SUCCESS")
    except Transient:
        return False
    return True


@patient
def test_haste_is_nobody_elses(here: Shop, postgres: Freezable) -> None:
    """A thread that had little time does not make others give up at once."""
    with Database(here.dsn, budget=600, patience=600) as database:
        assert database.fetch("SELECT 1 AS one") == [{"one": 1}]
        with postgres.frozen(), database.within(0.1), pytest.raises(Transient):
            database.fetch("SELECT 1")
        assert not database._is_given_up()
