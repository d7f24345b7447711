"""Where Celery's own integration tests, run by `make celery-suite`, once found us to differ from its Redis backend."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import pytest
import redis
from celery import Signature, chain, chord, group
from celery.exceptions import ChordError

from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from tests.conftest import shop_on
from tests.support.processes import Shop
from tests.support.shop import add, app, boom, grows, mourn, note, quiet, total

pytestmark = pytest.mark.backend


@pytest.fixture(scope="module")
def shop(
    lab_roster: Roster,
    valkey_server: ValkeyNode,
    postgres_server: Postgres,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shop]:
    """The test application with one worker for all tests here, which leave each other alone."""
    valkey_server.ask(lambda client: client.flushall())
    name = f"test_{uuid4().hex[:12]}"
    dsn = postgres_server.create_database(name, template=migrated_template)
    with (
        pytest.MonkeyPatch.context() as patch,
        shop_on(lab_roster, tmp_path_factory.mktemp("shop"), valkey_server.url, dsn, patch) as opened,
    ):
        opened.worker()
        yield opened
    postgres_server.drop_database(name)


def await_silence(shop: Shop) -> None:
    """Wait until every message that was ever sent has ended."""
    with Database(shop.dsn) as database:
        outbox = "SELECT 1 FROM patchpilot.outbox"
        until(lambda: database.fetch(outbox) == [], seconds=30, what="every message had ended")


def test_a_generator_produces_a_header_while_it_is_published(shop: Shop) -> None:
    """Its last task may depend on what its first did. Every kind of task that a header may have is in it."""

    def header() -> Iterator[Signature]:
        yield note.s(1, label="generated")
        yield chain(add.s(1, 1), add.s(3))
        yield grows.s(20)
        yield chord([add.s(100, 200), add.s(100, 400)], total.s(label="inner"))
        yield chain(add.s(1000, 1000), chord([add.s(1), add.s(2)], total.s(label="end of a chain")))
        shop.await_line("generated 1")
        yield chain(add.s(5, 5), group(add.s(10_000), add.s(20_000)))

    parts = chord(header(), note.s(label="all of it")).apply_async().get(timeout=30)
    assert parts[:5] == [1, 5, 20, 800, 4003]
    assert sorted(parts[5:]) == [30, 10_010, 20_010]
    assert sum(line.startswith("all of it") for line in shop.ledger()) == 1


def test_a_generator_s_tasks_are_on_record_before_they_are_sent(shop: Shop) -> None:
    """Also where a thread sends them, which has a backend of its own."""
    add.delay(0, 0).get(timeout=30)  # this thread has one by now
    header = (add.s(place, place).set(queue="nowhere") for place in range(3))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(chord(header, total.s()).apply_async).result()
    with Database(shop.dsn) as database:
        group_id = {"group_id": result.parent.id}
        parts = database.fetch(
            "SELECT task_id FROM patchpilot.chord_part WHERE group_id = %(group_id)s ORDER BY position", group_id
        )
        [stored] = database.fetch(
            "SELECT generating, size FROM patchpilot.chord WHERE group_id = %(group_id)s", group_id
        )
        database.execute("DELETE FROM patchpilot.outbox WHERE group_id = %(group_id)s", group_id)
    assert [row["task_id"] for row in parts] == [child.id for child in result.parent.results]
    assert stored == {"generating": False, "size": 3}


def test_a_generator_of_groups(shop: Shop) -> None:
    """Celery numbers the tasks of each group from 0, so two of them have one place."""
    header = (group(add.s(10, place), add.s(20, place)) for place in range(3))
    assert sorted(chord(header, note.s()).apply_async().get(timeout=30)) == [10, 11, 12, 20, 21, 22]


def test_a_header_that_its_generator_breaks_off_calls_nothing(shop: Shop) -> None:
    def header() -> Iterator[Signature]:
        yield add.s(1, 1)
        yield add.s(1, 2)
        yield add.s(1, 3)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        chord(header(), total.s(label="broken off")).apply_async()
    await_silence(shop)
    with Database(shop.dsn) as database:
        [broken_off] = database.fetch("SELECT group_id FROM patchpilot.chord WHERE generating")
    assert not app.backend.finish_chord(broken_off["group_id"])
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        [found] = [it for it in recovery.survey(Window(min_age=timedelta(0))) if it.id == broken_off["group_id"]]
        assert (found.diagnosis, found.curable) == ("half-published", False)
    app.backend.set_chord_size(broken_off["group_id"], 4)  # as if the generator had brought its last task after all
    assert not app.backend.finish_chord(broken_off["group_id"])
    assert not any("broken off" in line for line in shop.ledger())


def test_what_the_parts_of_a_failed_chord_returned_stays_in_valkey(shop: Shop) -> None:
    result = chord([add.s(1, 2), boom.s(), add.s(3, 4)], total.s()).apply_async()
    assert isinstance(result.get(timeout=30, propagate=False), ChordError)
    key = app.backend.get_key_for_group(result.parent.id, ".j")
    with redis.Redis.from_url(shop.broker) as broker:
        parts = [app.backend.decode(part) for part in broker.zrange(key, 0, -1)]
        assert 0 < broker.ttl(key) <= app.conf.result_expires.total_seconds()
    assert [(task_id, state) for _, task_id, state, _ in parts] == [
        (child.id, state) for child, state in zip(result.parent.results, ["SUCCESS", "FAILURE", "SUCCESS"], strict=True)
    ]
    assert [returned for _, _, state, returned in parts if state == "SUCCESS"] == [3, 7]


def test_one_errback_without_a_list_around_it(shop: Shop) -> None:
    """`set` takes one signature as it is, and a signature is a dict: not to be taken for a list of links."""
    body = group(quiet.s().set(link_error=mourn.s(), link=quiet.si("linked")), total.s())
    chord([add.s(1, 1), add.s(2, 2)], body).apply_async()
    shop.await_line("quiet linked")


def test_a_frozen_chord_runs_each_time_it_is_sent(shop: Shop) -> None:
    """All its ids are those of the first time."""
    frozen = chord([add.s(1, 2), add.s(3, 4)], quiet.si("frozen"))
    frozen.freeze()
    for count in (1, 2, 3):
        frozen.apply_async()
        shop.await_line("quiet frozen", count=count)


def test_a_chord_that_a_task_sends_twice_runs_once(shop: Shop) -> None:
    """The task before it in a chain was delivered twice: its frozen chord is one, and nobody meant two."""
    chain(note.s(1, label="before").set(queue="parked"), chord([add.s(2), add.s(3)], total.s(label="once"))).delay()
    with redis.Redis.from_url(shop.broker) as broker:
        [message] = broker.lrange("parked", 0, -1)
        broker.lpush("celery", message)
        shop.await_line("once 7")
        broker.lpush("celery", message)
        shop.await_line("add 1 2", count=2)
        shop.await_line("add 1 3", count=2)
    await_silence(shop)
    assert shop.ledger().count("once 7") == 1
