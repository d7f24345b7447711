"""Every canvas gives what Celery's own Redis backend gives, runs every task once and leaves nothing behind."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from celery import VERSION, chain, chord, group
from celery.exceptions import ChordError
from kombu.exceptions import EncodeError

from patchpilot.lab.processes import until
from patchpilot.recovery import Applied, Recovery, Site, Window
from tests.support import canvases
from tests.support.canvases import Case
from tests.support.extras import constant, fail, opaque, starts
from tests.support.shop import add, app, hold, note, total
from tests.support.station import Setup, Station, on

WAIT = 30

TABLES = {
    "tasks": canvases.SIMPLE, "headers": canvases.HEADERS, "bodies": canvases.BODIES, "nested": canvases.NESTED,
    "replaced": canvases.REPLACED, "links": canvases.LINKS, "failures": canvases.FAILURES,
}  # fmt: skip

IN_POSTGRES = Setup("in-postgres", {"patchpilot_counting": "postgres"})
IN_VALKEY = Setup("in-valkey", {"patchpilot_counting": "valkey"})
PREFIXED_PICKLE = Setup(
    "prefixed-pickle",
    {
        "patchpilot_counting": "valkey",
        "task_serializer": "pickle", "result_serializer": "pickle", "accept_content": ["pickle", "json"],
        "broker_transport_options": {"global_keyprefix": "shop:"},
        "result_backend_transport_options": {"global_keyprefix": "shop:"},
    },
)  # fmt: skip
UNORDERED_MSGPACK = Setup(
    "unordered-msgpack",
    {
        "patchpilot_counting": "postgres",
        "task_serializer": "msgpack", "result_serializer": "msgpack", "accept_content": ["msgpack", "json"],
        "result_backend_transport_options": {"result_chord_ordered": False},
    },
)  # fmt: skip


pytestmark = pytest.mark.backend


def outcome(result: Any) -> Any:
    return result.get(timeout=WAIT, propagate=False)


def check(station: Station, cases: Mapping[str, Case]) -> None:
    """Send all canvases at once; compare what becomes of each, and of all together what ran."""
    sent = {name: case.canvas().apply_async() for name, case in cases.items()}
    assert {name: outcome(result) for name, result in sent.items()} == {
        name: case.outcome for name, case in cases.items()
    }
    station.await_silence()
    expected = sum((Counter(case.runs) for case in cases.values()), Counter())
    until(lambda: has_run(station, expected.total()), seconds=WAIT, what=f"{expected} in {station.ledger()}")
    assert starts(station.ledger()) == expected
    lines = Counter(station.ledger())
    also = Counter(line for case in cases.values() for line in case.also)
    assert {line: lines[line] for line in also} == also


def has_run(station: Station, number: int) -> bool:
    return sum(line.startswith("start ") for line in station.ledger()) >= number


@on(IN_POSTGRES, IN_VALKEY)
@pytest.mark.parametrize("table", TABLES)
def test_what_celery_gives(station: Station, table: str) -> None:
    check(station, TABLES[table])


@on(IN_POSTGRES, IN_VALKEY)
@pytest.mark.skipif(not canvases.UNHEARD, reason="since Celery 5.7 somebody hears of every failure")
def test_what_celery_tells_nobody_ends_all_the_same(station: Station) -> None:
    sent = {name: case.canvas().apply_async() for name, case in canvases.UNHEARD.items()}
    expected = sum((Counter(case.runs) for case in canvases.UNHEARD.values()), Counter())
    until(lambda: has_run(station, expected.total()), seconds=WAIT, what=f"{expected} in {station.ledger()}")
    station.await_silence()
    assert starts(station.ledger()) == expected
    assert [name for name, result in sent.items() if result.ready()] == []


@on(IN_POSTGRES, IN_VALKEY)
def test_errbacks_on_headers(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``task_allow_error_cb_on_chord_header`` an errback of the chord is one of each of its parts too."""
    monkeypatch.setitem(app.conf, "task_allow_error_cb_on_chord_header", True)
    check(station, canvases.ERRBACKS_ON_HEADERS)


@on(IN_POSTGRES, IN_VALKEY)
def test_recovery_finishes_what_celery_never_does(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchpilot.recovery.evidence.INTERRUPTED_AFTER", timedelta(0))
    cases = canvases.UNFINISHED
    sent = [case.canvas().apply_async() for case in cases.values()]
    applied: list[Applied] = []

    def all_recovered() -> bool:
        applied.extend(recovery.recover(Window(min_age=timedelta(0))))
        return len(applied) == len(sent)

    with Recovery(Site(station.shop.broker, station.shop.dsn)) as recovery:
        until(all_recovered, seconds=WAIT, what="they were recovered")
    assert {it.diagnosis for it in applied} == {"part-return-interrupted"}
    assert [outcome(result) for result in sent] == [case.outcome for case in cases.values()]
    station.await_silence()
    assert starts(station.ledger()) == sum((Counter(case.runs) for case in cases.values()), Counter())


@on(IN_POSTGRES, IN_VALKEY)
def test_explicit_ids(station: Station) -> None:
    mine = str(uuid.uuid4())
    header = [add.s(1, 1).set(task_id=f"part-{mine}"), add.s(2, 2)]
    result = chord(header, note.s()).apply_async(task_id=f"body-{mine}")
    assert result.id == f"body-{mine}"
    assert result.parent.results[0].id == f"part-{mine}"
    assert outcome(result) == [2, 4]
    assert outcome(app.AsyncResult(f"part-{mine}")) == 2
    # Twice the same id: each part brings its own result.
    twice = chord([add.s(1, 1).set(task_id=f"twice-{mine}"), add.s(2, 2).set(task_id=f"twice-{mine}")], note.s())
    assert outcome(twice.apply_async()) == [2, 4]
    if VERSION < (5, 7):  # then only text is an id: Celery raises TypeError
        return
    # A UUID in place of a string is as good.
    given = uuid.uuid4()
    assert outcome(add.apply_async((3, 3), task_id=given)) == 6
    assert outcome(chord([add.s(1, 1).set(task_id=uuid.uuid4()), add.s(2, 2)], note.s()).apply_async()) == [2, 4]


@on(IN_POSTGRES, IN_VALKEY)
def test_a_canvas_may_be_applied_again(station: Station) -> None:
    """The second time its tasks have ids of their own, unless it was frozen: then everything has the same ids."""
    sent_once = chain(add.si(1, 1), add.s(1))
    sent_once.freeze()
    assert [outcome(sent_once.apply_async()) for _ in range(2)] == [3, 3]
    if VERSION < (5, 7):  # then a chord's second callback never comes
        return
    canvas = chord([add.s(1, 1), add.s(2, 2)], note.s())
    assert [outcome(canvas.apply_async()) for _ in range(2)] == [[2, 4], [2, 4]]
    station.await_silence()
    assert starts([line for line in station.ledger() if "note" in line]) == {"note": 2}


@on(PREFIXED_PICKLE)
def test_pickle_with_a_prefix(station: Station) -> None:
    """What only pickle carries arrives as it was, in headers, bodies and exceptions."""
    assert outcome(opaque.delay()) == {1, 2}
    values = [{1, 2}, (1, (2,)), datetime(2026, 1, 1, tzinfo=UTC), Decimal("1.5"), {1: "one"}, b"\0"]
    assert outcome(chord([constant.s(value) for value in values], note.s()).apply_async()) == values
    assert outcome(chord([add.s(1, 1)], constant.s({1, 2})).apply_async()) == [2]
    failed = outcome(chord([fail.s(), add.s(1, 1)], total.s()).apply_async())
    assert isinstance(failed, ChordError)
    names = ("chord in a header", "generator header", "chain body", "growing chord", "part replaced by a group")
    check(fresh(station), some(*names))


@on(PREFIXED_PICKLE)
def test_every_key_has_the_prefix(station: Station) -> None:
    gate = station.shop.directory / f"gate-{uuid.uuid4()}"
    result = chord([hold.s(1, str(gate)), add.s(1, 1)], note.s()).apply_async()
    counted = app.backend.get_key_for_group(result.parent.id, ".d")  # Celery 5.4 puts an underscore in between
    assert counted.startswith(b"shop:")
    until(lambda: station.broker.scard(counted) == 1, seconds=WAIT, what="the first part was counted")
    keys = {key.decode() for key in station.broker.keys("*")}
    gate.touch()
    assert outcome(result) == [1, 2]
    assert {key for key in keys if not key.startswith("shop:")} == set()


@on(UNORDERED_MSGPACK)
def test_msgpack_in_the_order_of_return(station: Station) -> None:
    gate = station.shop.directory / f"gate-{uuid.uuid4()}"
    result = chord([hold.s(b"\0raw", str(gate)), constant.s({"a": [1, None]})], note.s()).apply_async()
    second = "SELECT 1 FROM patchpilot.chord_part WHERE position = 1 AND state IS NOT NULL AND group_id = %s"
    until(lambda: bool(station.database.fetch(second, [result.parent.id])), seconds=WAIT, what="the second came first")
    gate.touch()
    assert outcome(result) == [{"a": [1, None]}, b"\0raw"]
    names = ("chain body", "failed part", "replaced by a chord", "chord that grows as it grows", "immutable body")
    check(fresh(station), some(*names))


@on(UNORDERED_MSGPACK)
def test_what_cannot_be_read_again_is_refused(station: Station) -> None:
    """msgpack loses the last part of a group. Celery publishes it, and its workers drop what they cannot read."""
    with pytest.raises(EncodeError, match="note"):
        chord([add.s(1, 1)], group(note.s(), note.s())).apply_async()
    assert station.left_over() == {}


@on(IN_POSTGRES, IN_VALKEY)
def test_json_keeps_what_celery_keeps(station: Station) -> None:
    values = [datetime(2026, 1, 1, tzinfo=UTC), Decimal("1.5"), uuid.uuid4(), b"\0", "é\0", None, 1.5]
    assert outcome(chord([constant.s(value) for value in values], note.s()).apply_async()) == values
    assert outcome(constant.delay((1, {2: "two"}))) == [1, {"2": "two"}]


@on(IN_POSTGRES)
def test_eager_canvases_touch_nothing(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "task_always_eager", True)
    for case in some("chord", "chord in a chain", "chain body", "group", "generator header").values():
        assert case.canvas().apply_async().get() == case.outcome
    with pytest.raises(ValueError, match="no"):
        chord([fail.s(), add.s(1, 1)], total.s()).apply_async().get()


def some(*names: str) -> dict[str, Case]:
    everything = {name: case for table in TABLES.values() for name, case in table.items()}
    return {name: everything[name] for name in names}


def fresh(station: Station) -> Station:
    station.await_silence()
    station.begin()
    return station
