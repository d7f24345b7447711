"""The inventory of chords, and why a callback did not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chain, chord, group

from patchpilot.backend.message import Part
from patchpilot.errors import Exit, Usage
from patchpilot.lab.launch import free_port
from patchpilot.lab.processes import until
from patchpilot.postgres.connection import Database
from patchpilot.recovery.inventory import Life, inventory, life
from tests.support.commands import patchpilot
from tests.support.extras import wail
from tests.support.processes import Shop
from tests.support.shop import add, app, boom, hold, later, note, total

pytestmark = pytest.mark.backend


@pytest.fixture
def config(shop: Shop, tmp_path: Path) -> Path:
    path = tmp_path / "patchpilot.toml"
    path.write_text(
        f'[postgres]\ndsn = "{shop.dsn}"\n[recovery]\nmin_age = "0s"\n'
        f'[clusters.broker]\nrole = "broker"\nreplication_group = "b"\nendpoint = "{shop.broker}"\n'
    )
    return path


def ask(config: Path, *arguments: str) -> dict[str, Any]:
    done = patchpilot("chords", *arguments, "--config", config, "--output", "json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_what_is_open_stuck_and_unrecoverable(shop: Shop, config: Path) -> None:
    assert patchpilot("chords", "--config", config).stderr == "no chord is open\n"
    lost = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete("celery")
    chord([add.s(1, 1).set(serializer="pickle")], note.s(label={1})).apply_async()
    chord([add.s(1, 1)], total.s()).apply_async()
    with Database(shop.dsn) as database:
        found = {each.callback: each for each in inventory(database)}
    assert (found[total.name].open, found[total.name].unrecoverable) == (2, 0)
    assert (found[note.name].open, found[note.name].unrecoverable) == (1, 1)
    answer = ask(config)
    assert (answer["open"], answer["unrecoverable"]) == (3, 1)
    assert answer["oldest"] == min(it["oldest"] for it in answer["by_callback"])
    assert {it["callback"]: it["stuck"] for it in answer["by_callback"]} == {total.name: 1, note.name: 0}
    assert [it["id"] for it in answer["stuck"]] == [lost.parent.id]
    told = patchpilot("chords", "--config", config)
    assert total.name in told.stdout
    assert "UNRECOVERABLE" in told.stdout
    assert f"chord {lost.parent.id} ({total.name}): header-message-lost: 0 of 2 parts returned" in told.stdout
    first, *others = told.stderr.splitlines()
    assert first.startswith("3 chords are open, the oldest for ")
    assert first.endswith(", 1 stuck")
    assert others == [
        "open: 2 chords under way; messages of their headers: 2 in queues, none with a worker",
        "open: no worker has any of what is queued; if that stays so, look whether one consumes these queues",
    ]


def test_a_callback_that_was_lost_is_told_though_its_chord_is_not_open(shop: Shop, config: Path) -> None:
    result = chord([add.s(1, 1)], total.s().set(queue="late")).apply_async()
    shop.worker("-c", "1")
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("late") == 1, seconds=30, what="the callback was sent")
        broker.delete("late")
    told = patchpilot("chords", "--config", config)
    assert f"callback {result.parent.id} ({total.name}): callback-message-lost: " in told.stdout
    assert told.stderr == "no chord is open, 1 stuck\n"
    text = patchpilot("chords", "show", result.id, "--config", config).stdout
    assert "callback-message-lost: the message of " in text
    assert "(remedy: republish)" in text
    assert "but a message of its callback is lost (callback-message-lost): `patchpilot recover` sends it" in text


def test_a_callback_of_several_tasks_has_not_run_before_its_last_one(shop: Shop, config: Path) -> None:
    """And an errback that was lost is told to be lost."""
    tail = chord([add.s(1, 1)], chain(total.s(), note.s().set(queue="late"))).apply_async()
    half = chord([add.s(2, 2)], group(total.s(), note.s().set(queue="late"))).apply_async()
    failed = chord([boom.s()], total.s().on_error(wail.s().set(queue="late"))).apply_async()
    shop.worker("-c", "1", "-I", "tests.support.extras")
    with redis.Redis.from_url(shop.broker) as broker, Database(shop.dsn) as database:
        until(lambda: broker.llen("late") == 3, seconds=30, what="all were sent")
        said = "1 of 2 tasks of its callback ended; its callback was sent to queue late and has not begun"
        chords = [tail.parent.id, half.parent.id]
        for group_id in chords:
            until(lambda: life(database, group_id).why == said, seconds=30, what="the first had ended")  # noqa: B023
        broker.delete("late")
        for group_id in chords:
            lost = "; but a message of its callback is lost ("
            assert ask(config, "show", group_id)["why"].startswith(said + lost)
        why = ask(config, "show", failed.id)["why"]
        assert why.startswith(f"1 of 1 parts failed, so its errbacks run instead: {wail.name} was sent to queue late")
        assert "but the message of an errback is lost" in why


def test_what_the_broker_cannot_tell_is_not_known_and_the_rest_is_told(shop: Shop, config: Path) -> None:
    result = chord([add.s(1, 1)], total.s()).apply_async()
    config.write_text(config.read_text().replace(shop.broker, f"redis://127.0.0.1:{free_port()}/0"))
    answer = ask(config, "show", result.id)
    assert answer["stuck"] == []
    assert "cannot be read" in answer["unknown"]
    assert answer["why"].startswith("1 of 1 header tasks have not returned")
    assert patchpilot("chords", "--config", config).returncode == Exit.RESUME_LATER


def test_the_life_of_a_chord_says_why_its_callback_has_not_run(shop: Shop, config: Path) -> None:
    gate = shop.directory / "gate"
    result = chord([add.s(1, 1), hold.s(2, str(gate))], total.s().set(queue="late")).apply_async()

    def why() -> str:
        with Database(shop.dsn) as database:
            return life(database, result.parent.id).why

    assert "2 of 2 header tasks have not returned" in why()
    shop.worker()
    until(lambda: "1 of 2 header tasks" in why(), seconds=30, what="one had returned")
    gate.touch()
    until(lambda: why() == "its callback was sent to queue late and has not begun", seconds=30, what="it was sent")
    shop.worker("-Q", "late", "-c", "1")
    until(lambda: why() == "its callback has run: SUCCESS", seconds=30, what="it had run")
    answer = ask(config, "show", result.id)
    assert (answer["stuck"], answer["unknown"], answer["over"]) == ([], None, True)
    assert (answer["group_id"], answer["state"], answer["returned"]) == (result.parent.id, "dispatched", 2)
    told = [moment["what"] for moment in answer["moments"]]
    assert told[0].startswith("written down")
    assert sum("returned" in what for what in told) == 2
    assert any("callback dispatched" in what for what in told)
    assert any("began" in what for what in told)
    text = patchpilot("chords", "show", result.parent.id, "--config", config).stdout
    assert "its callback has run: SUCCESS" in text
    again = chord([add.s(1, 1)], later.si("again", 3600)).apply_async()
    shop.await_line("again 0")
    with Database(shop.dsn) as database:

        def its_life() -> Life:
            return life(database, again.id)

        waits = "its callback waits for a retry, in queue celery"
        until(lambda: its_life().why == waits, seconds=30, what="it waits for its retry")
        until(lambda: f"callback {again.id} ended this attempt" in {it.what for it in its_life().moments}, seconds=30,
              what="the first attempt had ended")  # fmt: skip
        assert not its_life().over
    missing = patchpilot("chords", "show", "no-such-chord", "--config", config)
    assert (missing.returncode, len(missing.stderr.strip().splitlines())) == (2, 1)


def test_the_life_of_a_failed_chord_and_of_one_that_nobody_dispatched(shop: Shop) -> None:
    failed = chord([add.s(1, 1), boom.s()], total.s().on_error(wail.s())).apply_async()
    alone = chord([boom.s()], total.s()).apply_async()
    shop.worker("-I", "tests.support.extras")
    failed.get(timeout=30, propagate=False)
    stranded = chord([add.s(3, 1).set(queue="nobody")], total.s()).apply_async()
    app.backend.chords.return_part(Part(stranded.parent.id, stranded.parent.results[0].id, 0), "SUCCESS", 4)
    with Database(shop.dsn) as database:
        said = "1 of 2 parts failed, so its errbacks ran instead"
        until(lambda: life(database, failed.id).why == said, seconds=30, what="the chord had failed")
        said = "1 of 1 parts failed; it has no errbacks, so nothing ran instead"
        until(lambda: life(database, alone.id).why == said, seconds=30, what="the other had failed")
        database.execute(
            "UPDATE patchpilot.chord SET callback = NULL, callback_type = NULL, callback_encoding = NULL, "
            "unrecoverable = 'not stored' WHERE callback_id = %s",
            [alone.id],
        )
        assert life(database, alone.id).why == "1 of 1 parts failed, so its errbacks, if it has any, ran instead"
        assert "`patchpilot recover` does" in life(database, stranded.id).why


def test_a_chord_is_found_by_the_tasks_of_its_header_and_by_a_part_of_an_id(shop: Shop, config: Path) -> None:
    result = chord([add.s(1, 1), chain(add.s(2, 2), add.s(1))], total.s()).apply_async()
    parts = [each.id for each in result.parent.results]
    with Database(shop.dsn) as database:
        sent = database.fetch("SELECT task_id FROM patchpilot.outbox")
        for asked, what in (
            *((task_id, "header-task") for task_id in {*parts, *(row["task_id"] for row in sent)}),
            (parts[0][:8], "header-task"),
            (result.id, "callback-task"),
            (result.id[:8], "callback-task"),
            (result.parent.id, "chord"),
            (result.parent.id[:8], "chord"),
        ):
            found = life(database, asked)
            assert (found.group_id, found.asked_for) == (result.parent.id, what)
        database.execute(
            "UPDATE patchpilot.outbox SET callback_of = group_id, group_id = NULL, task_id = 'follower' "
            "WHERE task_id = %s",
            [parts[0]],
        )
        found = life(database, "follower")
        assert (found.group_id, found.asked_for) == (result.parent.id, "callback-task")
        with pytest.raises(Usage, match="8 characters are needed"):
            life(database, parts[0][:7])
        with pytest.raises(Usage, match="and no task of one"):
            life(database, "%" * 8)
    text = patchpilot("chords", "show", parts[0], "--config", config).stdout
    assert text.startswith(f"{parts[0]} is a task of the header of this chord:\nchord {result.parent.id}  open")


def test_several_chords_that_an_id_may_mean_are_told_line_by_line(shop: Shop, config: Path) -> None:
    sent = [chord([add.s(1, 1).set(task_id=f"alike000-{n}")], total.s()).apply_async().parent.id for n in range(12)]
    done = patchpilot("chords", "show", "alike000", "--config", config)
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    *candidates, last = done.stderr.splitlines()
    assert [line.split()[0] for line in candidates] == sent[:1:-1]
    assert all(f"(header task alike000-{n})" in line for n, line in zip(range(11, 1, -1), candidates, strict=True))
    assert last == ("patchpilot: 'alike000' may be 12 chords, of which the last 10 are told: give more of the id")


def test_a_part_that_is_waited_for_is_said_to_be_in_its_queue_or_a_chord_of_its_own(shop: Shop) -> None:
    inner = chord([add.s(1, 1).set(queue="nobody")], total.s())
    outer = chord([inner, add.s(2, 2)], total.s()).apply_async()
    with Database(shop.dsn) as database:
        [row] = database.fetch("SELECT group_id FROM patchpilot.chord WHERE callback_id <> %s", (outer.id,))
        assert life(database, outer.parent.id).why == (
            f"2 of 2 header tasks have not returned, first {outer.parent.results[0].id}, the callback of the chord "
            f"{row['group_id']}, which is open: `patchpilot chords show {row['group_id']}` says why"
        )
        [sent] = database.fetch("SELECT task_id, sent_at FROM patchpilot.outbox WHERE queue = 'nobody'")
        why = (
            f"1 of 1 header tasks have not returned, first {sent['task_id']}, whose message was sent to %s "
            f"at {sent['sent_at']:%Y-%m-%d %H:%M:%S} and is not over"
        )
        assert life(database, row["group_id"]).why == why % "queue nobody"
        database.execute("UPDATE patchpilot.outbox SET queue = NULL, exchange = 'x', routing_key = 'y'")
        assert life(database, row["group_id"]).why == why % "exchange 'x' with routing key 'y'"
        database.execute(
            "UPDATE patchpilot.chord SET state = 'dispatched', finished_at = now() WHERE group_id = %s",
            [row["group_id"]],
        )
        assert life(database, outer.parent.id).why.endswith(f" not returned, first {outer.parent.results[0].id}")


def test_names_are_shown_and_not_obeyed(shop: Shop, config: Path) -> None:
    """Nor do they widen a table without end, or stop a command where the terminal cannot show them."""
    long = "n" * 3000
    for name in ("evil\x1b[2J\r\nINJECTED\u202e 任务", long):
        chord([add.s(1, 1)], app.signature(name)).apply_async()
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete("celery")
    dry = ("recover", "--dry-run", "--min-age", "0s")
    found = json.loads(patchpilot(*dry, "--output", "json", "--config", config).stdout)["findings"]
    assert {it["callback"] for it in found} == {"evil\x1b[2J\r\nINJECTED\u202e 任务", long}
    for arguments in (dry, ("chords",), *(("chords", "show", it["id"]) for it in found)):
        done = patchpilot(*arguments, "--config", config, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert "\n" in done.stdout
        assert "INJECTED" not in [line[:8] for line in done.stdout.splitlines()]
        assert done.stdout.replace("\n", "").isprintable()
    table, _, reasons = patchpilot(*dry, "--config", config).stdout.partition("\n\n")
    assert max(map(len, table.splitlines())) < 250
    assert f" ({long}): 0 of 1 parts returned" in reasons


def test_every_command_refuses_a_record_that_is_for_newer_versions(shop: Shop, config: Path) -> None:
    with Database(shop.dsn) as database:
        database.execute("INSERT INTO patchpilot.migration VALUES (9999, 'all_anew_needs_9999', 'x')")
    for command in (
        ("recover", "--dry-run"), ("recover",), ("recover", "--watch", "5s"), ("recover", "--adopt"), ("chords",),
        ("chords", "show", "12345678"), ("db", "purge"), ("status",), ("report",),
        ("stop", "--cluster", "broker", "--reason", "x"),
    ):  # fmt: skip
        done = patchpilot(*command, "--config", config)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (Exit.USAGE, "", 1), (command, done.stderr)
        assert "it needs migration 9999, this patchpilot has " in done.stderr
        assert done.stderr.endswith(": upgrade patchpilot\n")
    chord([add.s(1, 1)], total.s()).apply_async()  # workers and producers go on: nobody else would have their messages
