"""A part returns while Valkey or PostgreSQL is away: its task has succeeded, and stays so.

The broker is one Valkey and the backend's another one, behind a link: only the backend notices what happens to it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import redis
from celery import chord
from celery.result import AsyncResult

from patchpilot.lab.launch import HOST, Address, free_port
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.recovery import Applied, Recovery, Site, Window
from tests.support.extras import grows_behind, mourner
from tests.support.outpost import Outpost, Outposts
from tests.support.shop import hold, total
from tests.support.station import Setup

pytestmark = pytest.mark.backend

WAIT = 60
NOW = Window(min_age=timedelta(0))

PATIENT = Setup("patient", {"patchpilot_counting": "valkey"}, options=("-c", "1"))
IMPATIENT = Setup("impatient", {"patchpilot_counting": "valkey", "patchpilot_valkey_budget": 0.5}, options=("-c", "1"))
IN_POSTGRES = Setup("in_postgres", {"patchpilot_counting": "postgres"}, options=("-c", "1"))
HASTY = Setup("hasty", {"patchpilot_counting": "valkey", "patchpilot_postgres_budget": 1}, options=("-c", "1"))


@pytest.fixture(scope="module")
def outposts(lab_roster: Roster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outposts]:
    with Outposts(lab_roster, tmp_path_factory.mktemp("outposts")) as opened:
        yield opened


@pytest.fixture
def outpost(request: pytest.FixtureRequest, outposts: Outposts) -> Iterator[Outpost]:
    opened = outposts.at(request.param)
    with opened.station.used():
        yield opened


def on(setup: Setup) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("outpost", [setup], indirect=True, ids=str)


@contextmanager
def refused(outpost: Outpost) -> Iterator[None]:
    outpost.link.refuse()
    yield
    outpost.link.retarget(outpost.node.address)


@contextmanager
def frozen(outpost: Outpost) -> Iterator[None]:
    """Packets are dropped: sockets stay open, new ones connect, and nothing answers."""
    outpost.link.freeze()
    yield
    outpost.link.thaw()


@contextmanager
def demoted(outpost: Outpost) -> Iterator[None]:
    """A replica now, with its data: whoever is still connected to it gets READONLY."""
    outpost.node.follow(Address(HOST, free_port()))
    yield
    outpost.node.promote()


@contextmanager
def paused(outpost: Outpost) -> Iterator[None]:
    outpost.node.ask(lambda client: client.client_pause(600_000, all=False))
    yield
    outpost.node.ask(lambda client: client.client_unpause())


@contextmanager
def busy(outpost: Outpost) -> Iterator[None]:
    """Its one thread runs a script that does not end. Everybody else is told so."""
    outpost.node.ask(lambda client: client.config_set("busy-reply-threshold", 1))
    with ThreadPoolExecutor(1) as threads, outpost.node.client() as client:
        script = threads.submit(_run, outpost)
        until(lambda: _is_busy(client), seconds=WAIT, what="the script ran")
        yield
        client.script_kill()
        assert isinstance(script.exception(WAIT), redis.ResponseError)


def _run(outpost: Outpost) -> None:
    with redis.Redis.from_url(outpost.node.url) as client:
        client.eval("while true do end", 0)


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False


DISTURBANCES = [refused, frozen, demoted, paused, busy]


class Held:
    """A chord of one part, which has begun and waits, with errbacks that would tell of a failure.

    :param grows: whether the part adds another one before it ends.
    """

    def __init__(self, outpost: Outpost, *, ignore_result: bool = False, grows: bool = False, **options: Any) -> None:
        self._gate = outpost.station.shop.directory / f"gate-{uuid.uuid4()}"
        self._more = ["add 5 10", "total 20"] if grows else ["total 5"]
        part = (grows_behind if grows else hold).s(5, str(self._gate)).set(ignore_result=ignore_result, **options)
        self.result = chord([part], total.s().on_error(mourner.s())).apply_async()
        self.part: AsyncResult = self.result.parent.results[0]
        until(lambda: "hold began" in outpost.station.ledger(), seconds=WAIT, what="the part had begun")
        outpost.listen()

    @property
    def group_id(self) -> str:
        return str(self.result.parent.id)

    def end(self) -> None:
        """Let the part return."""
        self._gate.touch()

    def check(self, outpost: Outpost) -> None:
        """Everything went as if nothing had happened."""
        assert self.result.get(timeout=WAIT) == (20 if len(self._more) > 1 else 5)
        outpost.station.await_silence()
        written = [line for line in outpost.station.ledger() if not line.startswith("start ")]
        assert written == ["hold began", "hold ended", *self._more]
        assert (self.part.state, self.part.result) == ("SUCCESS", 5)


def counted(outpost: Outpost, held: Held) -> str:
    """Where the chord is counted by now."""
    sql = "SELECT counting, distrusted FROM patchpilot.chord WHERE group_id = %s"
    [row] = outpost.station.database.fetch(sql, [held.group_id])
    return "postgres" if row["distrusted"] else str(row["counting"])


def let_expire(outpost: Outpost) -> None:
    """Forget the keys of a chord that ended while nobody could remove them."""
    outpost.node.ask(lambda client: client.flushall())


def recover(outpost: Outpost) -> tuple[Applied, ...]:
    """Recover until something was done."""
    done: list[Applied] = []

    def something() -> bool:
        done.extend(recovery.recover(NOW))
        return bool(done)

    shop = outpost.station.shop
    with Recovery(Site(shop.broker, shop.dsn), stale=timedelta(seconds=4)) as recovery:
        until(something, seconds=WAIT, what="something was recovered")
    return tuple(done)


@on(PATIENT)
@pytest.mark.parametrize("disturbance", DISTURBANCES, ids=lambda it: it.__name__)
def test_a_part_return_is_tried_again(outpost: Outpost, disturbance: Callable[[Outpost], Iterator[None]]) -> None:
    held = Held(outpost)
    with disturbance(outpost):
        held.end()
        outpost.await_word(f"counting the parts of chord {held.group_id} is tried again")
    held.check(outpost)
    assert counted(outpost, held) == "valkey"


@on(PATIENT)
def test_a_soft_time_limit_that_strikes_while_a_part_returns(outpost: Outpost) -> None:
    """It is for the task's body, and that has ended in time."""
    held = Held(outpost, link_error=[mourner.s()], soft_time_limit=8)
    with frozen(outpost):
        held.end()
        outpost.await_word("Soft time limit (8s) exceeded")
    held.check(outpost)


@on(PATIENT)
def test_a_time_limit_that_strikes_while_a_part_returns(outpost: Outpost) -> None:
    held = Held(outpost, link_error=[mourner.s()], time_limit=8)
    with frozen(outpost):
        held.end()
        outpost.await_word("had succeeded before it was ended")
        until(lambda: "total 5" in outpost.station.ledger(), seconds=WAIT, what="its callback ran meanwhile")
    let_expire(outpost)
    held.check(outpost)


@on(PATIENT)
def test_a_soft_time_limit_that_strikes_while_postgresql_is_away(outpost: Outpost) -> None:
    held = Held(outpost, link_error=[mourner.s()], soft_time_limit=8)
    outpost.postgres.stop()
    try:
        held.end()
        outpost.await_word("Soft time limit (8s) exceeded")
    finally:
        outpost.postgres.start()
    held.check(outpost)


@on(PATIENT)
def test_a_part_without_a_result_is_tried_again(outpost: Outpost) -> None:
    held = Held(outpost, ignore_result=True)
    with refused(outpost):
        held.end()
        outpost.await_word(f"counting the parts of chord {held.group_id} is tried again")
    assert held.result.get(timeout=WAIT) == 5
    outpost.station.await_silence()


@on(PATIENT)
def test_connections_that_were_dropped_are_opened_again(outpost: Outpost) -> None:
    held = Held(outpost)
    outpost.link.close_connections()
    held.end()
    held.check(outpost)


@on(IMPATIENT)
@pytest.mark.parametrize("disturbance", [refused, frozen, demoted], ids=lambda it: it.__name__)
def test_a_part_that_valkey_does_not_count_in_time_is_counted_in_postgresql(
    outpost: Outpost, disturbance: Callable[[Outpost], Iterator[None]]
) -> None:
    held = Held(outpost)
    with disturbance(outpost):
        held.end()
        outpost.await_word(f"The parts of chord {held.group_id} are counted in PostgreSQL from here on")
        until(lambda: "total 5" in outpost.station.ledger(), seconds=WAIT, what="its callback ran meanwhile")
    let_expire(outpost)
    held.check(outpost)


@on(IMPATIENT)
def test_a_chord_is_sent_and_grows_while_valkey_is_away(outpost: Outpost) -> None:
    """Whoever sends it, or adds to it, hears nothing of that."""
    with refused(outpost):
        held = Held(outpost, grows=True)
        assert counted(outpost, held) == "postgres"
        held.end()
        until(lambda: "total 20" in outpost.station.ledger(), seconds=WAIT, what="its callback ran meanwhile")
    held.check(outpost)


@on(PATIENT)
def test_a_chord_that_grows_is_counted_in_postgresql(outpost: Outpost) -> None:
    """Growing twice by the same task is growing once, and Valkey counts what it is told."""
    held = Held(outpost, grows=True)
    assert counted(outpost, held) == "valkey"
    held.end()
    held.check(outpost)
    assert counted(outpost, held) == "postgres"


@on(IN_POSTGRES)
@pytest.mark.parametrize("disturbance", DISTURBANCES, ids=lambda it: it.__name__)
def test_a_part_that_postgresql_counts_needs_no_valkey(
    outpost: Outpost, disturbance: Callable[[Outpost], Iterator[None]]
) -> None:
    held = Held(outpost)
    with disturbance(outpost):
        held.end()
        until(lambda: "total 5" in outpost.station.ledger(), seconds=WAIT, what="its callback ran meanwhile")
    held.check(outpost)


@on(IN_POSTGRES)
def test_postgresql_and_valkey_go_away_together(outpost: Outpost) -> None:
    held = Held(outpost)
    with refused(outpost):
        outpost.postgres.stop(hard=True)
        held.end()
        outpost.await_word("PostgreSQL is away, trying again")
        outpost.postgres.start()
        held.check(outpost)


@on(HASTY)
def test_postgresql_stays_away_for_longer_than_anybody_waits(outpost: Outpost) -> None:
    """The task has succeeded, and nobody could write that down. So it runs again; it has not failed."""
    held = Held(outpost)
    outpost.postgres.stop()
    held.end()
    outpost.await_word(f"Task {held.part.id} is left to recovery")
    outpost.postgres.start()
    assert held.part.state == "PENDING"
    assert {applied.id for applied in recover(outpost)} == {held.group_id}
    assert held.result.get(timeout=WAIT) == 5
    written = [line for line in outpost.station.ledger() if not line.startswith("start ")]
    assert written == ["hold began", "hold ended"] * 2 + ["total 5"]


@on(IN_POSTGRES)
def test_an_error_that_nobody_foresaw_is_not_the_part_s(outpost: Outpost) -> None:
    """The record of the callback is broken. The part has succeeded all the same, and its chord is left to recovery."""
    held, database = Held(outpost), outpost.station.database
    [whole] = database.fetch("SELECT callback FROM patchpilot.chord WHERE group_id = %s", [held.group_id])
    write = "UPDATE patchpilot.chord SET callback = %s WHERE group_id = %s"
    database.execute(write, [b"{", held.group_id])
    held.end()
    outpost.await_word(f"Chord {held.group_id} is left to recovery, from part {held.part.id} on")
    outpost.await_word("succeeded in")
    database.execute(write, [whole["callback"], held.group_id])
    assert {applied.id for applied in recover(outpost)} == {held.group_id}
    held.check(outpost)
