"""Keys that chords leave in Valkey: those of chords that are over go, those of others stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from celery import Celery, Signature, chain, chord, group
from celery.result import GroupResult

from patchpilot.broker_name import name_of_url
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from patchpilot.recovery.housekeeping import Housekeeping
from patchpilot.recovery.strays import SQL, Strays, decide, sweep_up
from patchpilot.valkey.keys import SUFFIXES, ChordKeys, Keys
from tests.integration.test_adopt import Stock
from tests.integration.test_cli import config
from tests.support.commands import patchpilot
from tests.support.processes import Shop
from tests.support.shop import add, total

pytestmark = pytest.mark.backend

NOTHING = timedelta(0)
STEM = "celery-taskset-meta-"

counts_in_valkey = pytest.mark.parametrize("counting", ["valkey"], indirect=True)


def leave(client: redis.Redis, group_id: str, *, stem: str = STEM, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """All that Celery ever makes for a chord."""
    for suffix in suffixes:
        client.set(f"{stem}{group_id}{suffix}", 1, ex=86400)


def left(client: redis.Redis) -> set[str]:
    return {key.decode() for key in client.scan_iter(f"*{STEM}*")}


@counts_in_valkey
def test_keys_of_a_chord_that_is_over_go_and_those_of_an_open_one_stay(shop: Shop, broker: redis.Redis) -> None:
    over = chord([add.s(1, 1)], total.s()).apply_async()
    again = chord([add.s(2, 2)], total.s()).apply_async()
    shop.worker("-c", "1")
    assert (over.get(timeout=30), again.get(timeout=30)) == (2, 4)
    waiting = chord([add.s(1, 1).set(queue="elsewhere")], total.s()).apply_async()
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.chord SET finished_at = finished_at - interval '1 hour'")
        for group in (over, again, waiting):
            leave(broker, group.parent.id)
        # Touched meanwhile, as one that begins anew under its old id would be.
        keys = ChordKeys(shop.broker)
        assert sweep_up(database, [keys], [str(name_of_url(shop.broker))], NOTHING, timedelta(hours=1)) == 0
        assert len(left(broker)) == 3 * len(SUFFIXES)
        assert sweep_up(database, [keys], [str(name_of_url(shop.broker))], NOTHING, NOTHING) == 2 * (len(SUFFIXES) - 1)
        # What the parts returned is left to expire, as Celery leaves it, and nobody looks a second time.
        assert {key for key in left(broker) if waiting.parent.id not in key} == {
            f"{STEM}{over.parent.id}.j", f"{STEM}{again.parent.id}.j",
        }  # fmt: skip
        leave(broker, over.parent.id)
        assert sweep_up(database, [keys], [str(name_of_url(shop.broker))], NOTHING, NOTHING) == 0
        keys.close()


@counts_in_valkey
def test_a_chord_that_begins_anew_is_looked_after_anew(shop: Shop) -> None:
    frozen = chord([add.s(1, 1)], total.s())
    frozen.freeze()
    shop.worker("-c", "1")
    with Database(shop.dsn) as database:
        assert frozen.apply_async().get(timeout=30) == 2
        database.execute("UPDATE patchpilot.chord SET swept = true")
        frozen.apply_async()
        assert database.fetch("SELECT swept FROM patchpilot.chord") == [{"swept": False}]


def test_strays_are_reported_and_go_when_nobody_has_touched_them(shop: Shop, broker: redis.Redis) -> None:
    waiting = chord([add.s(1, 1)], total.s()).apply_async()
    leave(broker, waiting.parent.id)
    for number in range(1200):
        leave(broker, f"stray{number}", suffixes=(".s",))
    leave(broker, "whole")
    broker.set("celery-task-meta-1", "a result")
    with Housekeeping(Site(shop.broker, shop.dsn)) as housekeeping:

        def look(idle: timedelta | None, *, remove: bool = False) -> Strays:
            return housekeeping.strays(idle, remove=remove)

        broker.set(b"celery-taskset-meta-\xff.s", 1)  # no key of Celery's
        assert not any(stray.goes for stray in look(timedelta(hours=1), remove=True).found)
        broker.delete(b"celery-taskset-meta-\xff.s")
        assert not any(stray.goes for stray in look(None, remove=True).found)
        found = look(NOTHING)
        assert (len(found.found), found.keys, found.removed) == (1201, 1200 + len(SUFFIXES) - 1, 0)
        [whole] = [stray for stray in found.found if stray.keys.group_id == "whole"]
        assert (whole.goes, whole.keys.suffixes) == (True, SUFFIXES)
        assert whole.keys.expires is not None
        assert look(NOTHING, remove=True).removed == 1200 + len(SUFFIXES) - 1
        assert look(NOTHING).found == []
    # A group is saved under the key that has no suffix, by its users too.
    assert left(broker) == {f"{STEM}whole", *(f"{STEM}{waiting.parent.id}{suffix}" for suffix in SUFFIXES)}
    assert broker.get("celery-task-meta-1") == b"a result"


@pytest.fixture
def stock(shop: Shop) -> Iterator[Celery]:
    """An application without patchpilot, on the same broker."""
    opened = Stock(shop)
    yield opened.app
    opened.close()


def test_a_chord_whose_messages_wait_is_no_stray(shop: Shop, broker: redis.Redis, stock: Celery) -> None:
    """Nobody touches its keys until its turn comes. Nor has a chord a message of its own that waits for one within."""

    def task(**options: Any) -> Signature:
        return stock.signature("t", queue="other", **options)

    def send(*header: Signature, body: Signature | None = None) -> str:
        return str(chord(header, body or task(), app=stock).apply_async().parent.id)

    plain, pickled, packed, squeezed, later = [
        send(task(**options))
        for options in (
            {}, {"serializer": "pickle"}, {"serializer": "msgpack"}, {"compression": "gzip"},
            {"countdown": 3600, "priority": 9},
        )
    ]  # fmt: skip
    around = send(chord([task()], task(), app=stock))
    behind = send(chain(task(), chord([task()], task(), app=stock), app=stock))
    task().apply_async(group_id="order-42")
    broker.set(f"{STEM}order-42.s", 1)
    of = {json.loads(raw)["headers"]["group"]: raw for raw in broker.lrange("other", 0, -1)}
    broker.lrem("other", 1, of[plain])
    broker.hset("unacked", "tag", json.dumps([json.loads(of[plain]), "", "other"]))
    live = left(broker)
    assert {f"{STEM}{it}.s" for it in (plain, pickled, packed, squeezed, later, around, behind)} < live
    with Housekeeping(Site(shop.broker, shop.dsn)) as housekeeping:
        assert housekeeping.strays(NOTHING, remove=True) == Strays()
        assert left(broker) == live
        broker.delete("unacked")
        broker.lrem("other", 1, of[pickled])
        gone = housekeeping.strays(NOTHING, remove=True)
        assert {it.keys.group_id for it in gone.found} == {plain, pickled}
    assert left(broker) == live - {f"{STEM}{plain}.s", f"{STEM}{pickled}.s"}


@pytest.mark.parametrize("spoil", ["garbage", "content", "compressed", "separator"])
def test_nothing_goes_while_a_message_cannot_be_read(
    shop: Shop, broker: redis.Redis, stock: Celery, spoil: str
) -> None:
    stock.send_task("t", queue="other")
    leave(broker, "stray", suffixes=(".s",))
    message = json.loads(broker.lindex("other", 0) or "")
    headers = {**message["headers"], "compression": "application/x-gzip"}
    spoilt = {
        "garbage": "garbage", "content": json.dumps({**message, "content-type": "application/data"}),
        "compressed": json.dumps({**message, "headers": headers}),
    }  # fmt: skip
    if spoil == "separator":
        broker.sadd("_kombu.binding.x", "x::y")
    else:
        broker.lpush("other", spoilt[spoil])
    path = config(shop.directory, shop.dsn, shop.broker)
    done = patchpilot("recover", "--strays", "0s", "--config", path)
    assert (done.returncode, done.stdout.count("stays")) == (1, 1), done
    [_, why] = done.stderr.splitlines()
    assert why.startswith("patchpilot: nothing is removed: ")
    assert left(broker) == {f"{STEM}stray.s"}
    done = patchpilot("recover", "--strays", "0s", "--dry-run", "--config", path)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert "none would be removed: " in done.stderr


def test_a_group_that_was_saved_is_no_stray(shop: Shop, stock: Celery) -> None:
    result = group([stock.signature("t")], app=stock).apply_async(queue="gone")
    result.save()
    with Housekeeping(Site(shop.broker, shop.dsn)) as housekeeping, redis.Redis.from_url(shop.broker) as broker:
        broker.delete("gone")
        assert housekeeping.strays(NOTHING, remove=True) == Strays()
    assert GroupResult.restore(result.id, app=stock) is not None


def test_on_two_servers_and_under_a_prefix(shop: Shop, broker: redis.Redis) -> None:
    results = shop.broker.removesuffix("/0") + "/5"
    with redis.Redis.from_url(results) as other:
        leave(other, "there", stem=f"a*b_{STEM}")
        leave(broker, "here", stem=f"a*b_{STEM}")
        leave(other, "not ours", stem=f"aXb_{STEM}")
        with Housekeeping(Site(shop.broker, shop.dsn, results=results, results_prefix="a*b")) as housekeeping:
            assert housekeeping.strays(NOTHING, remove=True).removed == 2 * (len(SUFFIXES) - 1)
        assert left(broker) == {f"a*b_{STEM}here"}
        assert len(left(other)) == 1 + len(SUFFIXES)


@pytest.mark.parametrize("prefix", ["", "a*b", "shop:", "shop_", "shop-", "shop."])
def test_keys_are_named_as_celery_names_them(prefix: str) -> None:
    """Celery 5.4 sets every prefix off with an underscore, later ones only those that need it."""
    app = Celery(backend="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.result_backend_transport_options = {"global_keyprefix": prefix} if prefix else {}
    keys = ChordKeys("redis://127.0.0.1:1/0", prefix)
    assert keys.key("one", ".s").encode() == app.backend.get_key_for_group("one", ".s")
    keys.close()


@counts_in_valkey
def test_keys_of_a_chord_that_is_only_watched_stay_and_so_does_the_turn_of_one_that_began_anew(
    shop: Shop, broker: redis.Redis
) -> None:
    group_id = chord([add.s(1, 1)], total.s()).apply_async().parent.id
    leave(broker, group_id)
    before = left(broker)
    keys = ChordKeys(shop.broker)
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.chord SET state = 'dispatched', finished_at = now() - interval '1 hour'")
        database.execute("UPDATE patchpilot.chord SET shadow = true")
        assert sweep_up(database, [keys], [str(name_of_url(shop.broker))], NOTHING, NOTHING) == 0
        assert left(broker) == before
        database.execute("UPDATE patchpilot.chord SET shadow = false, state = 'open', finished_at = NULL")
        database.execute(SQL["swept"], {"group_ids": [group_id]})  # by whoever saw it over a moment ago
        database.execute("UPDATE patchpilot.chord SET state = 'dispatched', finished_at = now() - interval '1 hour'")
        assert sweep_up(database, [keys], [str(name_of_url(shop.broker))], NOTHING, NOTHING) > 0
    keys.close()


def test_what_began_anew_between_the_look_and_the_removal_stays(shop: Shop, broker: redis.Redis) -> None:
    """Whichever of its keys is touched."""
    leave(broker, "anew")
    keys, value = ChordKeys(shop.broker), broker.dump(f"{STEM}anew.s")
    for suffix in SUFFIXES:
        broker.restore(f"{STEM}anew{suffix}", 0, value, replace=True, idletime=7200)
    for suffix in SUFFIXES:
        broker.get(f"{STEM}anew{suffix}")
        assert keys.remove("anew", timedelta(hours=1)) == -1
        broker.restore(f"{STEM}anew{suffix}", 0, value, replace=True, idletime=7200)
    assert len(left(broker)) == len(SUFFIXES)
    assert keys.remove("anew", timedelta(hours=1), ("",)) == len(SUFFIXES) - 1
    keys.close()


def test_which_keys_may_go() -> None:
    def keys(idle: timedelta | None) -> Keys:
        return Keys("g", (".s",), idle, None)

    hour = timedelta(hours=1)
    assert decide(keys(hour), {"g"}, NOTHING) is None
    assert decide(keys(hour), (), hour) is True
    assert decide(keys(hour), (), 2 * hour) is False
    assert decide(keys(None), (), NOTHING) is False
    assert decide(Keys("a name that a serialiser may write otherwise: ü", (".s",), hour, None), (), NOTHING) is False
    assert decide(Keys("g", ("",), hour, None), (), NOTHING) is None
    assert decide(keys(hour), (), None) is False


def test_the_command(shop: Shop, broker: redis.Redis) -> None:
    leave(broker, "stray")
    broker.set(f"{STEM}\x1b[31mred.s", 1)
    path = config(shop.directory, shop.dsn, shop.broker)
    done = patchpilot("recover", "--strays", "0s", "--dry-run", "--config", path)
    assert done.returncode == 0, done.stderr
    assert "stray" in done.stdout
    assert "?[31mred" in done.stdout
    assert "\x1b" not in done.stdout
    broker.delete(f"{STEM}\x1b[31mred.s")
    assert "6 keys of 2 chords" in done.stderr
    assert len(left(broker)) == len(SUFFIXES)
    done = patchpilot("recover", "--strays", "0s", "--output", "json", "--config", path)
    assert json.loads(done.stdout)["removed"] == len(SUFFIXES) - 1
    assert left(broker) == {f"{STEM}stray"}
    done = patchpilot("recover", "--strays", "0s", "--adopt", "--config", path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@counts_in_valkey
def test_a_sweep_looks_after_what_is_over(shop: Shop, broker: redis.Redis) -> None:
    result = chord([add.s(1, 1)], total.s()).apply_async()
    shop.worker("-c", "1")
    assert result.get(timeout=30) == 2
    with Database(shop.dsn) as database, Recovery(Site(shop.broker, shop.dsn)) as recovery:
        database.execute("UPDATE patchpilot.chord SET finished_at = finished_at - interval '1 hour'")
        assert recovery.recover(Window(min_age=NOTHING)) == ()
        assert database.fetch("SELECT swept FROM patchpilot.chord") == [{"swept": True}]
