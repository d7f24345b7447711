"""The loss model again: what is taken, acknowledged and given back, and processes that die; see `test_losses.py`."""

from __future__ import annotations

import uuid

from patchpilot.lab.processes import until
from tests.support.sent import ADDS, Sent, adds, on, slow, slowly
from tests.support.stage import (
    OURS,
    STOCK,
    WAIT,
    Stage,
    acknowledged,
    pop,
    written_down,
)

# -- deliveries -----------------------------------------------------------------------------------------------------


@on(slowly(STOCK), OURS)
def test_a_lost_acknowledgement_of_a_callback(stage: Stage) -> None:
    sent = Sent(stage, *adds(stage))
    sent.send_and_take_parts()
    with stage.saboteur.losing(acknowledged):
        stage.consume(sent.after)
        stage.await_line("total 6")
    assert not stage.all_acknowledged()
    if not stage.side.stock:
        stage.nothing_to_recover()
    stage.give_back()
    stage.await_rest()
    times = 2 if stage.side.stock else 1
    assert stage.ledger() == sorted((*ADDS, *["total 6"] * times))


@slow
@on(STOCK, OURS)
def test_a_lost_acknowledgement_of_a_header_task(stage: Stage) -> None:
    """It runs again, and counts once."""
    gate = stage.shop.directory / f"gate-{uuid.uuid4()}"
    sent = Sent(stage, *adds(stage), stage.tasks.hold(3, str(gate)), alone=3)
    sent.send_and_take_all_but_one()
    with stage.saboteur.losing(acknowledged):
        stage.consume(sent.alone)
    gate.touch()
    stage.consume(sent.after)
    stage.await_line("total 9")
    stage.give_back()
    stage.await_rest()
    assert stage.ledger() == sorted((*ADDS, *["hold began", "hold ended"] * 2, "total 9"))


@on(slowly(STOCK), OURS)
def test_a_callback_that_comes_back_because_taking_it_was_lost(stage: Stage) -> None:
    sent = Sent(stage, *adds(stage))
    sent.send_and_take_parts()
    with stage.saboteur.losing(pop(sent.after), acknowledged):
        stage.consume(sent.after)
        stage.await_line("total 6")
    stage.await_rest()
    times = 2 if stage.side.stock else 1
    assert stage.ledger() == sorted((*ADDS, *["total 6"] * times))
    if not stage.side.stock:
        sent.is_done(*ADDS, "total 6", value=6)


@slow
@on(STOCK, OURS)
def test_a_header_task_that_comes_back_because_taking_it_was_lost(stage: Stage) -> None:
    gate = stage.shop.directory / f"gate-{uuid.uuid4()}"
    sent = Sent(stage, *adds(stage), stage.tasks.hold(3, str(gate)), alone=3)
    sent.send_and_take_all_but_one()
    with stage.saboteur.losing(pop(sent.alone), acknowledged):
        stage.consume(sent.alone)
    gate.touch()
    stage.consume(sent.after)
    stage.await_line("total 9")
    stage.await_rest()
    assert stage.ledger() == sorted((*ADDS, *["hold began", "hold ended"] * 2, "total 9"))


@on(slowly(STOCK), OURS)
def test_a_message_that_was_taken_and_could_not_be_written_down(stage: Stage) -> None:
    """Without any loss of data: the connection went between taking it and writing that down, and so did the message."""
    sent = Sent(stage, *adds(stage, 1))
    sent.send()
    before = stage.worker.output().count("Trying to re-establish the connection")
    with stage.saboteur.refusing(written_down):
        stage.consume_without_answer(sent.parts)
        until(
            lambda: stage.worker.output().count("Trying to re-establish the connection") > before, seconds=WAIT,
            what="the worker had noticed",
        )  # fmt: skip
    stage.consume(sent.after)
    if not sent.is_stuck():
        stage.recover("header-message-lost")
        sent.is_done("add 0 0", "total 0", value=0)


@slow
@on(STOCK, OURS)
def test_a_message_that_was_taken_by_a_worker_that_died_and_was_not_written_down(stage: Stage) -> None:
    """What it had begun died with it, and begins again; what waited behind that was in its memory only."""
    gate = stage.shop.directory / f"gate-{uuid.uuid4()}"
    sent = Sent(stage, stage.tasks.hold(3, str(gate)), stage.tasks.add(1, 1), alone=1)
    sent.send()
    stage.consume(sent.parts, sent.after)
    stage.await_line("hold began")
    with stage.saboteur.losing(written_down, settled=stage.all_acknowledged):
        stage.consume(sent.alone)
    stage.new_worker()
    stage.consume(sent.parts, sent.after, sent.alone)
    if not sent.is_stuck("hold began"):
        stage.recover("header-message-lost")
        gate.touch()
        sent.is_done(*["hold began"] * 2, "hold ended", "add 1 1", "total 5", value=5)


# -- processes that die ---------------------------------------------------------------------------------------------


@slow
@on(STOCK, OURS)
def test_a_worker_that_is_killed_having_acknowledged_early(stage: Stage) -> None:
    gate = stage.shop.directory / f"gate-{uuid.uuid4()}"
    sent = Sent(stage, stage.tasks.hold(3, str(gate)), stage.tasks.add(1, 1), alone=0)
    sent.send_and_take_all_but_one(sent.after)
    stage.consume(sent.alone)
    stage.await_line("hold began")
    until(stage.all_acknowledged, seconds=WAIT, what="it was acknowledged")
    stage.new_worker()
    stage.consume(sent.alone, sent.after)
    if not sent.is_stuck("hold began", "add 1 1"):
        stage.recover("header-message-lost")
        gate.touch()
        sent.is_done(*["hold began"] * 2, "hold ended", "add 1 1", "total 5", value=5)


@slow
@on(OURS)
def test_a_worker_that_is_killed_acknowledging_late_and_recovery_whose_own_write_is_lost(stage: Stage) -> None:
    """The message is given back, that is lost, and it is given back again."""
    gate = stage.shop.directory / f"gate-{uuid.uuid4()}"
    sent = Sent(stage, stage.tasks.hold(3, str(gate)), stage.tasks.add(1, 1))
    stage.new_worker(SHOP_ACKS_LATE="1")
    sent.send()
    stage.consume(sent.parts, sent.after)
    stage.await_line("hold began")
    stage.new_worker()
    with stage.saboteur.losing(acknowledged):
        stage.recover("header-message-lost")
    assert not stage.all_acknowledged()
    stage.recover("header-message-lost")
    gate.touch()
    stage.consume(sent.parts, sent.after)
    sent.is_done(*["hold began"] * 2, "hold ended", "add 1 1", "total 5", value=5)
