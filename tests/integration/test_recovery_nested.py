"""Nested work: one sweep re-creates what is missing at every level, inside out, and no second one is needed."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Signature, chain, chord, group

from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from tests.support import canvases
from tests.support.commands import configured, patchpilot
from tests.support.extras import becomes_chord
from tests.support.processes import Shop
from tests.support.shop import add, becomes_chord_of, boom, hold, mourn, note, total

pytestmark = [pytest.mark.backend, pytest.mark.parametrize("counting", ["valkey"], indirect=True)]

NOW = Window(min_age=timedelta(0))
WAIT = 30


def lose_counts(broker: redis.Redis, chords: int) -> None:
    """Every chord that is open loses its count: none of them will find out that it is complete."""
    until(lambda: len(broker.keys("celery-taskset-meta-*.s")) == chords, seconds=WAIT, what=f"{chords} were counted")
    for key in broker.keys("celery-taskset-meta-*.s"):
        broker.delete(key)


def lose(broker: redis.Redis, *task_ids: str) -> None:
    """These messages were never replicated."""
    for raw in broker.lrange("celery", 0, -1):
        if json.loads(raw)["headers"]["id"] in task_ids:
            assert broker.lrem("celery", 1, raw) == 1


def await_found(recovery: Recovery, *diagnoses: str) -> None:
    until(
        lambda: sorted(it.diagnosis for it in recovery.survey(NOW)) == sorted(diagnoses), seconds=WAIT,
        what=f"{diagnoses} were found, not {recovery.survey(NOW)}",
    )  # fmt: skip


def once(shop: Shop, recovery: Recovery, *lines: str) -> None:
    """Wait for what was to run; all of it has run once, and there is nothing left."""
    for line in lines:
        shop.await_line(line)
    with Database(shop.dsn) as database:
        left = "SELECT FROM patchpilot.outbox UNION ALL SELECT FROM patchpilot.chord WHERE state IN ('open', 'claimed')"
        until(lambda: not database.fetch(left), seconds=WAIT, what="all was over")
    assert sorted(shop.ledger()) == sorted(lines)
    assert recovery.sweep(NOW).findings == ()


def test_chords_in_chords(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """Three of them, and no count is left. The inner one is known to be complete; once it has called back the others
    see to themselves, because a sweep has whoever returns a part from then on ask PostgreSQL."""
    inner = chord([add.s(1, 1), add.s(2, 2)], total.s(label="inner"))
    middle = chord([inner, add.s(3, 3)], total.s(label="middle"))
    chord([middle, add.s(4, 4)], total.s(label="outer")).apply_async()
    lose_counts(broker, 3)
    shop.worker()
    await_found(recovery, "part-return-lost")
    assert [it.callback for it in recovery.recover(NOW)] == [total.name]
    adds = [f"add {i} {i}" for i in (1, 2, 3, 4)]
    once(shop, recovery, *adds, "inner 6", "middle 12", "outer 20")


def test_a_loss_at_each_level_is_made_good_in_one_sweep(shop: Shop, broker: redis.Redis, recovery: Recovery) -> None:
    """By the command itself: a message of the inner header is lost, one of the outer header, and a whole chord beside
    it is complete and was never dispatched."""
    ids = [str(uuid.uuid4()) for _ in range(2)]
    inner = chord([add.s(1, 1).set(task_id=ids[0]), add.s(2, 2)], total.s(label="inner"))
    beside = chord([add.s(5, 5)], total.s(label="beside"))
    chord([inner, beside, add.s(3, 3).set(task_id=ids[1])], total.s(label="outer")).apply_async()
    lose_counts(broker, 3)
    lose(broker, *ids)
    shop.worker()
    await_found(recovery, "header-message-lost", "header-message-lost", "part-return-lost")
    done = patchpilot("recover", "--min-age", "0s", "--output", "json", "--config", configured(shop))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["applied"]) == 3
    once(shop, recovery, "add 1 1", "add 2 2", "add 3 3", "add 5 5", "inner 6", "beside 10", "outer 22")


def test_a_chord_in_a_chain(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    gate = shop.directory / "gate"
    held = hold.si(5, str(gate))
    chain(add.s(1, 1), chord([held, add.s(10)], total.s()), note.s(label="end")).apply_async()
    shop.worker()
    shop.await_line("hold began")
    lose_counts(broker, 1)
    assert recovery.survey(NOW) == ()
    gate.touch()
    await_found(recovery, "part-return-lost")
    assert len(recovery.recover(NOW)) == 1
    once(shop, recovery, "add 1 1", "hold began", "hold ended", "add 2 10", "total 17", "end 17")


def test_the_messages_of_a_group_body_are_one_finding(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """And a plan that was made of it sends all of them."""
    body = group(total.s(label=label).set(queue="late") for label in ("one", "two"))
    chord([add.s(1, 1), add.s(2, 2)], body).apply_async()
    worker = shop.worker()
    until(lambda: broker.llen("late") == 2, seconds=WAIT, what="both were sent")
    broker.delete("late")
    await_found(recovery, "callback-message-lost")
    command = ["recover", "--min-age", "0s", "--output", "json", "--config", configured(shop)]
    plan = shop.directory / "plan.json"
    plan.write_text(patchpilot(*command, "--dry-run").stdout)
    answer = json.loads(patchpilot(*command, "--plan", plan).stdout)
    assert (len(answer["applied"]), answer["changed"]) == (1, [])
    assert broker.llen("late") == 2
    worker.stop()
    shop.worker("-Q", "late", "-c", "1")
    once(shop, recovery, "add 1 1", "add 2 2", "one 6", "two 6")


def test_a_part_that_was_replaced_by_a_chord(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """What replaces it is sent by the worker, and is lost there: one sweep, and the chord around it ends as well."""
    chord([becomes_chord_of.s(str(shop.directory / "gate")), add.s(4, 4)], note.s(label="end")).apply_async()
    shop.worker()
    shop.await_line("hold began")
    lose_counts(broker, 2)
    (shop.directory / "gate").touch()
    await_found(recovery, "part-return-lost")
    assert len(recovery.recover(NOW)) == 1
    once(shop, recovery, "hold began", "hold ended", "add 1 1", "add 4 4", "total 3", "end [3, 8]")


def test_chords_that_fail_from_the_inside_out(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """A failed chord calls nobody back, so nobody would tell the one around it: the same sweep does, up to the last."""
    inner = chord([boom.s(), add.s(1, 1)], total.s(label="inner").on_error(mourn.s()))
    middle = chord([inner, add.s(2, 2)], total.s(label="middle").on_error(mourn.s()))
    outer = chord([middle, add.s(3, 3)], total.s(label="outer").on_error(mourn.s())).apply_async()
    lose_counts(broker, 3)
    shop.worker()
    await_found(recovery, "error-path-lost")
    # By the command: a process of its own has none of the errbacks' code.
    done = patchpilot("recover", "--min-age", "0s", "--output", "json", "--config", configured(shop))
    applied = [(it["diagnosis"], it["id"]) for it in json.loads(done.stdout)["applied"]]
    assert [it[0] for it in applied] == ["error-path-lost", "part-return-interrupted", "part-return-interrupted"]
    assert applied[-1][1] == outer.parent.id
    until(lambda: len(shop.ledger()) >= 6, seconds=WAIT, what="every errback was called")
    failure = outer.get(timeout=WAIT, propagate=False)
    assert type(failure).__name__ == "ChordError"
    with Database(shop.dsn) as database:
        states = database.fetch("SELECT DISTINCT state::text FROM patchpilot.chord")
        until(lambda: not database.fetch("SELECT FROM patchpilot.outbox"), seconds=WAIT, what="all was over")
    assert states == [{"state": "failed"}]
    assert [line.split("(")[0] for line in sorted(shop.ledger())] == [
        "add 1 1", "add 2 2", "add 3 3", *["mourn ChordError"] * 3
    ]  # fmt: skip
    assert recovery.sweep(NOW).findings == ()


def test_a_failed_chord_whose_callback_is_a_group_fails_the_one_around_it_in_the_same_sweep(
    shop: Shop, recovery: Recovery, broker: redis.Redis
) -> None:
    inner = chord([boom.s(), add.s(1, 1)], group(note.s(label="one"), note.s(label="two")))
    outer = chord([inner, add.s(2, 2)], total.s()).apply_async()
    lose_counts(broker, 2)
    shop.worker()
    await_found(recovery, "error-path-lost")
    applied = recovery.recover(NOW)
    assert [it.diagnosis for it in applied] == ["error-path-lost", "part-return-interrupted"]
    assert applied[-1].id == outer.parent.id
    assert type(outer.get(timeout=WAIT, propagate=False)).__name__ == "ChordError"
    assert recovery.sweep(NOW).findings == ()


def test_a_plan_does_not_go_further_than_it_says(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    """What follows from its remedies is left to the next sweep, as it was not in the plan."""
    inner = chord([boom.s()], total.s(label="inner"))
    outer = chord([inner, add.s(3, 3)], total.s(label="outer")).apply_async()
    lose_counts(broker, 2)
    shop.worker()
    await_found(recovery, "error-path-lost")
    command = ["recover", "--min-age", "0s", "--output", "json", "--config", configured(shop)]
    plan = shop.directory / "plan.json"
    plan.write_text(patchpilot(*command, "--dry-run").stdout)
    answer = json.loads(patchpilot(*command, "--plan", plan).stdout)
    assert [it["diagnosis"] for it in answer["applied"]] == ["error-path-lost"]
    assert outer.state == "PENDING"


def test_from_chords_that_were_chosen_it_goes_to_no_others(shop: Shop, recovery: Recovery, broker: redis.Redis) -> None:
    inner = chord([boom.s()], total.s(label="inner"))
    outer = chord([inner, add.s(3, 3)], total.s(label="outer")).apply_async()
    lose_counts(broker, 2)
    shop.worker()
    await_found(recovery, "error-path-lost")
    [found] = recovery.survey(NOW)
    assert [it.id for it in recovery.sweep(NOW, ids={found.id}).applied] == [found.id]
    assert outer.parent.id != found.id


def test_a_plan_sends_its_own_messages_and_no_others(shop: Shop, broker: redis.Redis) -> None:
    """And finds them again, in the window it was made with."""
    chord([add.s(i, i) for i in range(4)], total.s()).apply_async()
    rest = broker.lrange("celery", 0, -2)
    [planned] = broker.lrange("celery", -1, -1)
    broker.lrem("celery", 1, planned)
    command = ["recover", "--output", "json", "--config", configured(shop)]
    plan = shop.directory / "plan.json"
    plan.write_text(patchpilot(*command, "--min-age", "0s", "--dry-run").stdout)
    assert len(json.loads(plan.read_text())["findings"][0]["messages"]) == 1
    for message in rest[:2]:
        broker.lrem("celery", 1, message)
    answer = json.loads(patchpilot(*command, "--plan", plan, "--only", "tasks").stdout)
    assert (answer["applied"], answer["changed"]) == ([], [])
    answer = json.loads(patchpilot(*command, "--plan", plan).stdout)
    assert [it["now"] for it in answer["changed"]] == ["header-message-lost, of 1 of its 1 messages and of 2 others"]
    assert len(answer["applied"]) == 1
    ids = [json.loads(it)["headers"]["id"] for it in broker.lrange("celery", 0, -1)]
    assert sorted(ids) == sorted(json.loads(it)["headers"]["id"] for it in (planned, rest[2]))


@pytest.mark.parametrize("table", ["HEADERS", "BODIES", "NESTED", "REPLACED", "LINKS"])
def test_nested_work_that_is_under_way_is_not_found(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """Not even after the time in which a producer sends what is missing."""
    monkeypatch.setattr("patchpilot.recovery.diagnose.PUBLISHING", timedelta(0))
    for case in getattr(canvases, table).values():
        case.canvas().apply_async()
    assert recovery.survey(NOW) == ()


def test_nested_work_that_is_half_done_is_not_found(
    shop: Shop, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchpilot.recovery.diagnose.PUBLISHING", timedelta(0))
    gate = str(shop.directory / "gate")
    held: list[Signature] = [hold.si(i, gate, label=f"hold{i}") for i in range(4)]
    inner = chord([held[0], add.s(1, 1)], total.s())
    canvas: list[Any] = [
        inner,
        chain(add.s(1, 1), chord([held[1], add.s(2)], total.s()), add.s(3)),
        chain(add.s(1, 1), group(held[2], add.s(2)), total.s()),
        chain(chord([held[3], add.s(2, 2)], total.s()), add.s(4)),
        becomes_chord.s(1),
    ]
    result = chord(canvas, note.s(label="end")).apply_async()
    shop.worker("-c", "5", "-I", "tests.support.extras")
    for i in range(4):
        shop.await_line(f"hold{i} began")
    until(lambda: recovery.survey(NOW) == (), seconds=WAIT, what=f"nothing was found: {recovery.survey(NOW)}")
    assert recovery.survey(NOW) == ()
    Path(gate).touch()
    assert len(result.get(timeout=WAIT)) == 5
