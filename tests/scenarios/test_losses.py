"""Every row of the loss model: a failover that loses exactly one write, and what becomes of the work.

Where Celery's own backend is put on the stage too, it shows the symptom; ours ends with every task and every callback
run. Which row is which test, and why some have none, is in `docs/losses.md`. What cannot be lost when the parts are
counted in PostgreSQL, the default, is lost on a stage that counts them in Valkey.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from celery import Signature, chain, chord, group

from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from tests.support.sent import ADDS, Sent, adds, on, slow, slowly
from tests.support.stage import (
    OURS,
    STOCK,
    VALKEY,
    WAIT,
    Stage,
    Stages,
    cleaned_up,
    grown,
    part,
    push,
    retried,
    size,
)

# -- messages -------------------------------------------------------------------------------------------------------


@on(STOCK, OURS)
def test_a_lost_header_message(stage: Stage) -> None:
    sent = Sent(stage, *adds(stage))
    with stage.saboteur.losing(push(sent.parts, sent.ids[1])):
        sent.send()
    stage.consume(sent.parts, sent.after)
    if not sent.is_stuck("add 0 0", "add 2 2"):
        stage.recover("header-message-lost")
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(STOCK, OURS)
def test_a_lost_task_in_the_middle_of_a_chain(stage: Stage) -> None:
    """In a chord, and by itself: what comes after it has never been sent."""
    middle, alone, queue = str(uuid.uuid4()), str(uuid.uuid4()), stage.queue("chain")
    links = chain(stage.tasks.add(1, 1), stage.tasks.add(10).set(task_id=middle), stage.tasks.add(100), app=stage.app)
    sent = Sent(stage, links, stage.tasks.add(2, 2), alone=0)
    sent.send_and_take_all_but_one(sent.after)
    with stage.saboteur.losing(push(sent.alone, middle), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.await_rest()
    steps = [stage.tasks.add(3, 3), stage.tasks.add(30).set(task_id=alone), stage.tasks.note(label="end")]
    chain(*(step.set(queue=queue) for step in steps), app=stage.app).apply_async()
    with stage.saboteur.losing(push(queue, alone), settled=stage.all_acknowledged):
        stage.consume(queue)
    if not sent.is_stuck("add 1 1", "add 2 2", "add 3 3"):
        stage.recover("header-message-lost", "message-lost")
        sent.is_done(
            "add 1 1", "add 2 10", "add 12 100", "add 2 2", "total 116", "add 3 3", "add 6 30", "end 36", value=116
        )


@slow
@on(STOCK, OURS)
def test_a_lost_retry(stage: Stage) -> None:
    sent = Sent(stage, stage.tasks.stubborn(5), stage.tasks.add(1, 1), alone=0)
    sent.send_and_take_all_but_one(sent.after)
    with stage.saboteur.losing(retried(sent.alone), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    if not sent.is_stuck("stubborn 0", "add 1 1"):
        stage.recover("header-message-lost")
        sent.is_done("stubborn 0", "stubborn 1", "add 1 1", "total 7", value=7)


@on(STOCK, OURS, slowly(VALKEY))
def test_a_lost_callback_whose_chord_has_been_cleaned_up(stage: Stage) -> None:
    """The push is lost, what came after it is not: there is no trace of the callback in the broker any more."""
    sent = Sent(stage, *adds(stage), alone=2)
    sent.send_and_take_all_but_one()
    with stage.saboteur.losing(push(sent.after, sent.callback), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.consume(sent.after)
    stuck = sent.is_stuck(*ADDS)
    keys = stage.ask(lambda client: client.keys("celery-taskset-meta-*"))
    assert [key for key in keys if key.endswith(".s") or not stuck] == []  # nobody will find it complete
    if not stuck:
        stage.recover("callback-message-lost")
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(STOCK, VALKEY)
def test_a_lost_callback_whose_chord_has_not_been_cleaned_up(stage: Stage) -> None:
    """The push is lost, and all that came after it: every part has been counted, and nobody looks again."""
    sent = Sent(stage, *adds(stage), alone=2)
    sent.send_and_take_all_but_one()
    with stage.saboteur.losing(push(sent.after, sent.callback), cleaned_up, settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.consume(sent.after)
    stuck = sent.is_stuck(*ADDS)
    counted = f"celery-taskset-meta-{sent.result.parent.id}.d"
    assert stage.ask(lambda client: client.scard(counted)) == 3
    if not stuck:
        stage.recover("callback-message-lost")
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(OURS)
def test_a_lost_link(stage: Stage) -> None:
    queue = stage.queue("links")
    linked = stage.tasks.add(1, 1)
    linked.link(stage.tasks.note(label="linked").set(queue=queue))
    sent = Sent(stage, linked, stage.tasks.add(2, 2), alone=0)
    sent.send_and_take_all_but_one(sent.after, queue)
    with stage.saboteur.losing(push(queue), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.await_line("total 6")
    assert not sent.is_stuck("add 1 1", "add 2 2", "total 6")
    stage.recover("message-lost")
    sent.is_done("add 1 1", "add 2 2", "total 6", "linked 2", value=6)


@slow
@on(STOCK, OURS)
def test_a_lost_errback(stage: Stage) -> None:
    queue = stage.queue("errbacks")
    errback = stage.tasks.quiet().set(queue=queue)
    sent = Sent(stage, stage.tasks.boom(), stage.tasks.add(1, 1), alone=0, errback=errback)
    sent.send_and_take_all_but_one(sent.after, queue)
    with stage.saboteur.losing(push(queue), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    if not sent.is_stuck("add 1 1"):
        stage.recover("callback-message-lost")
        sent.is_done("add 1 1", f"quiet {sent.callback}")


# -- the count of a chord -------------------------------------------------------------------------------------------


@on(STOCK, VALKEY)
def test_a_lost_part_return(stage: Stage) -> None:
    """The incident: every task has succeeded, and the callback never runs. Impossible when PostgreSQL counts."""
    sent = Sent(stage, *adds(stage), alone=1)
    sent.send()
    with stage.saboteur.losing(part(sent.ids[1]), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.consume(sent.parts, sent.after)
    if not sent.is_stuck(*ADDS):
        stage.recover("part-return-lost")
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(OURS)
def test_counting_in_postgresql_writes_nothing_to_lose(stage: Stage) -> None:
    """No key of the chord is ever made: neither its size, nor a part, nor a claim."""
    seen: list[bytes] = []

    def of_a_chord(command: Any) -> bool:
        seen.extend(word for word in command[1:] if b"celery-taskset-meta" in word)
        return False

    sent = Sent(stage, stage.tasks.grows(1), *adds(stage))
    with stage.saboteur.watching(of_a_chord):
        sent.send()
        stage.consume(sent.parts, sent.after)
        sent.is_done(*ADDS, "add 1 10", "total 18", value=18)
    assert seen == []


@slow
@on(STOCK, VALKEY)
def test_a_lost_size(stage: Stage) -> None:
    sent = Sent(stage, *adds(stage))
    with stage.saboteur.losing(size):
        sent.send()
    stage.consume(sent.parts, sent.after)
    if not sent.is_stuck(*ADDS):
        stage.recover("part-return-lost")
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(STOCK, VALKEY)
def test_a_lost_addition_to_a_chord(stage: Stage) -> None:
    """Celery's own backend calls back too early, without one of the parts, and never again. We write nothing to lose:
    a chord that grows is counted in PostgreSQL from then on."""
    sent = Sent(stage, stage.tasks.grows(1), stage.tasks.add(2, 2), alone=0)
    sent.send()
    if stage.side.stock:
        with stage.saboteur.losing(grown, settled=stage.all_acknowledged):
            stage.consume(sent.alone)
        stage.consume(sent.after)
        stage.await_rest(sent.parts)
        assert stage.ledger() == ["add 1 10", "total 12"]
        return
    seen: list[Any] = []

    def of_growth(command: Any) -> bool:
        seen.extend(command[1:2] if grown(command) else ())
        return False

    with stage.saboteur.watching(of_growth):
        stage.consume(sent.alone, sent.after)
        stage.await_rest(sent.parts)
        assert stage.ledger() == ["add 1 10"]
        stage.consume(sent.parts)
        sent.is_done("add 1 10", "add 2 2", "total 16", value=16)
    assert seen == []


@slow
@on(VALKEY, OURS)
def test_a_lost_clean_up_and_a_part_that_comes_again(stage: Stage) -> None:
    """The keys of the chord are all there again, full. A part that is delivered once more finds them."""
    sent = Sent(stage, *adds(stage), alone=2)
    sent.send()
    [again] = stage.ask(lambda client: client.lrange(sent.parts, -1, -1))
    stage.consume(sent.parts, sent.after)
    stage.await_rest(sent.alone)
    if stage.side is VALKEY:
        with stage.saboteur.losing(cleaned_up, settled=stage.all_acknowledged):
            stage.consume(sent.alone)
    else:
        stage.consume(sent.alone)
    stage.await_line("total 6")
    stage.ask(lambda client: client.lpush(sent.parts, again))
    stage.await_line("add 0 0", 2)
    sent.is_done(*ADDS, "add 0 0", "total 6", value=6)  # a header task runs as often as it is delivered


# -- failures -------------------------------------------------------------------------------------------------------


@on(STOCK, slowly(VALKEY))
def test_a_success_that_a_failover_does_not_make_a_failure(stage: Stage) -> None:
    """Without any loss of data: the return of a part came to a node that was no primary, and is not tried again by
    Celery's own backend, which calls the chord failed though all its tasks have succeeded."""
    sent = Sent(stage, *adds(stage), alone=1, errback=stage.tasks.mourn())
    sent.send()
    with stage.saboteur.demoting(part(sent.ids[1])):
        stage.consume(sent.alone)
    stage.consume(sent.parts, sent.after)
    if stage.side.stock:
        stage.await_rest()
        assert [stage.stored(task_id)["status"] for task_id in sent.ids] == ["SUCCESS"] * 3
        assert [line.split("(")[0] for line in stage.ledger()] == [*ADDS, "mourn ChordError"]
        assert stage.stored(sent.callback)["status"] == "FAILURE"
    else:
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(STOCK, OURS)
def test_a_chord_whose_sending_raised_half_way(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller has heard of it and may send it again, so nobody finishes this one."""
    sent = Sent(stage, *adds(stage))
    for task in sent.canvas.tasks:
        task.set(retry=False)
    with stage.saboteur.refusing(push(sent.parts, sent.ids[1])), pytest.raises(Exception, match=r"(?i)connect|closed"):
        sent.send()
    stage.consume(sent.parts, sent.after)
    if not sent.is_stuck("add 0 0"):
        assert [(it.diagnosis, it.curable) for it in stage.survey()] == [("half-published", False)]
        assert stage.recover() == ()


@on(slowly(STOCK), VALKEY)
def test_a_lost_error_path(stage: Stage) -> None:
    """The part that failed is not counted, so the last one does not tell of it: neither the errback that is a function,
    nor the one that is a message."""
    queue = stage.queue("errbacks")
    errback = stage.tasks.quiet().set(queue=queue)
    sent = Sent(stage, stage.tasks.boom(), stage.tasks.add(1, 1), alone=0, errback=errback)
    sent.canvas.body.on_error(stage.tasks.mourn())
    sent.send()
    with stage.saboteur.losing(part(sent.ids[0]), settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.consume(sent.parts, sent.after, queue)
    if not sent.is_stuck("add 1 1"):
        stage.recover_by_command("error-path-lost")  # a process that has none of the application's code
        why = f"ChordError(\"Dependency {sent.ids[0]} raised ValueError('boom')\")"
        sent.is_done("add 1 1", f"quiet {sent.callback}", f"mourn {why}")
        assert repr(sent.result.get(timeout=WAIT, propagate=False)) == why


@slow
@on(OURS)
def test_an_error_path_that_died_with_its_process(stage: Stage) -> None:
    """The same where PostgreSQL counts: the worker is killed after the last part is on record and before it takes the
    chord, which somebody else has locked for that long."""
    sent = Sent(stage, stage.tasks.boom(), stage.tasks.add(1, 1), errback=stage.tasks.mourn())
    sent.send()
    with Database(stage.shop.dsn) as database, Database(stage.shop.dsn) as watching:

        def killed(connection: Any) -> None:
            connection.execute("SELECT FROM patchpilot.chord FOR UPDATE")
            stage.consume(sent.parts, sent.after)
            pending = "SELECT FROM patchpilot.chord_part WHERE state IS NULL"
            until(lambda: watching.fetch(pending) == [], seconds=WAIT, what="all parts had returned")
            stage.worker.kill()

        database.run(killed)
    stage.new_worker()
    stage.consume(sent.after)  # where the callback would have gone
    stage.recover("error-path-lost")
    sent.is_done("add 1 1", f"mourn ChordError(\"Dependency {sent.ids[0]} raised ValueError('boom')\")")


@slow
@on(VALKEY)
def test_a_lost_clean_up_of_a_failed_chord(stage: Stage) -> None:
    """A part that comes again finds the count as it was. The errbacks have been called, and are not called again."""
    sent = Sent(stage, stage.tasks.boom(), stage.tasks.add(1, 1), alone=1, errback=stage.tasks.mourn())
    sent.send()
    [again] = stage.ask(lambda client: client.lrange(sent.alone, 0, 0))
    stage.consume(sent.parts)
    stage.await_rest(sent.alone)
    with stage.saboteur.losing(cleaned_up, settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    mourned = f"mourn ChordError(\"Dependency {sent.ids[0]} raised ValueError('boom')\")"
    stage.await_line(mourned)
    stage.ask(lambda client: client.lpush(sent.alone, again))
    stage.await_line("add 1 1", 2)
    sent.is_done(*["add 1 1"] * 2, mourned)


def body_of(stage: Stage, shape: str, ids: list[str]) -> Signature:
    """A callback of some shape, and what becomes of it is stored under these ids."""
    one, other = (stage.tasks.total().set(task_id=id_) for id_ in ids)
    if shape == "group":
        return group(one, other, app=stage.app)
    return chain(one, other, app=stage.app) if shape == "chain" else one


@pytest.mark.parametrize("shape", ["task", slowly("chain"), slowly("group")])
def test_a_failed_chord_is_stored_as_celery_stores_it(stages: Stages, shape: str) -> None:
    """Byte for byte, but for the time and the traceback, which is of the process that stored it."""
    ids = [str(uuid.uuid4()) for _ in range(4)]
    stored = {}
    for side in (STOCK, VALKEY):
        with stages.at(side).used() as stage:
            queues = [stage.queue("alone"), stage.queue("parts")]
            header = [stage.tasks.add(1, 1), stage.tasks.boom()]
            header = [it.set(task_id=id_, queue=queue) for it, id_, queue in zip(header, ids, queues, strict=False)]
            chord(header, body_of(stage, shape, ids[2:]), app=stage.app).apply_async()
            if stage.side.stock:
                stage.consume(*queues)
            else:
                with stage.saboteur.losing(part(ids[0]), settled=stage.all_acknowledged):
                    stage.consume(queues[0])
                stage.consume(queues[1])
                stage.await_rest()
                stage.recover("error-path-lost")
            stage.await_rest()
            stored[side] = [
                stage.stored(task_id) for task_id in {"task": ids[2:3], "chain": ids[3:]}.get(shape, ids[2:])
            ]
    for theirs, ours in zip(stored[STOCK], stored[VALKEY], strict=True):
        assert theirs["status"] == "FAILURE"
        assert {**ours, "date_done": None, "traceback": None} == {**theirs, "date_done": None, "traceback": None}
        assert json.dumps(ours["result"]) == json.dumps(theirs["result"])
        assert (ours["traceback"] is None) == (theirs["traceback"] is None)
