"""Nobody is told that nothing is stuck while chords are open that nobody has judged."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import redis
from celery import chord

from patchpilot.backend.message import Part
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Site, Window
from tests.support.commands import configured, patchpilot
from tests.support.processes import Shop
from tests.support.shop import add, app, total

pytestmark = pytest.mark.backend


def test_open_chords_are_told_of_by_what_keeps_them_open(shop: Shop) -> None:
    config = configured(shop)
    assert patchpilot("recover", "--dry-run", "--config", config).stderr == "nothing is stuck\n"
    old, _, _ = (chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async() for _ in range(3))
    young = patchpilot("recover", "--dry-run", "--config", config)
    assert young.stderr.splitlines() == [
        "nothing is stuck of what was looked at",
        "not looked at: 3 chords with progress in the last 5m 0s",
        "not looked at: 6 messages with progress in the last 5m 0s",
    ]
    with Database(shop.dsn) as database:
        for statement in (
            "UPDATE patchpilot.chord SET created_at = now() - interval '2 d' WHERE group_id = %s",
            "UPDATE patchpilot.outbox SET sent_at = now() - interval '2 d' WHERE group_id = %s",
        ):
            database.execute(statement, (old.parent.id,))
    for arguments in (("recover",), ("recover", "--dry-run")):
        assert patchpilot(*arguments, "--min-age", "0s", "--config", config).stderr.splitlines() == [
            "nothing is stuck of what was looked at",
            "open: 2 chords under way; messages of their headers: 4 in queues, none with a worker",
            "open: no worker has any of what is queued; if that stays so, look whether one consumes these queues",
            "not looked at: 1 chord without progress for 1d 0h",
            "not looked at: 2 messages without progress for 1d 0h",
        ]
    assert patchpilot("chords", "--config", config).stderr.splitlines()[1:] == [
        "not looked at: 2 chords with progress in the last 5m 0s",
        "not looked at: 1 chord without progress for 1d 0h",
        "not looked at: 4 messages with progress in the last 5m 0s",
        "not looked at: 2 messages without progress for 1d 0h",
    ]
    data = json.loads(
        patchpilot("recover", "--dry-run", "--min-age", "0s", "--output", "json", "--config", config).stdout
    )
    assert data["quiet"] == {
        "chords": {"at-work": 2}, "headers": {"queued": 4, "held": 0},
        "callbacks": {"queued": 0, "held": 0}, "tasks": {"queued": 0, "held": 0},
        "outside": {"young": 0, "old": 1},
        "messages_outside": {"young": 0, "old": 2},
    }  # fmt: skip


def test_what_is_open_of_another_broker_is_not_called_well(shop: Shop) -> None:
    add.delay(1, 1)
    with Database(shop.dsn) as database:
        database.execute("UPDATE patchpilot.outbox SET broker = 'another:6379/0'")
    for arguments in (("recover",), ("recover", "--dry-run")):
        assert patchpilot(*arguments, "--config", configured(shop)).stderr.splitlines() == [
            "nothing is stuck of what was looked at",
            "not looked at: 0 open chords and 1 message of another broker, another:6379/0",
        ]


def test_a_lost_message_of_a_chord_that_goes_on_is_not_too_old_to_be_looked_at(shop: Shop) -> None:
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    with redis.Redis.from_url(shop.broker) as broker, Database(shop.dsn) as database:
        broker.delete("celery")
        database.execute(
            "UPDATE patchpilot.outbox SET sent_at = now() - interval '2 d' WHERE task_id = %s",
            (result.parent.results[0].id,),
        )
    with Recovery(Site(shop.broker, shop.dsn)) as recovery:
        look = recovery.look(Window(timedelta(0), timedelta(days=1)))
    [found] = look.findings
    assert (found.diagnosis, len(found.messages), look.quiet.messages_outside.old) == ("header-message-lost", 2, 0)


def test_an_old_message_of_no_chord_is_too_old_also_beside_chords_that_are_looked_at(shop: Shop) -> None:
    task = add.delay(1, 1)
    chord([add.s(1, 1)], total.s()).apply_async()
    with Database(shop.dsn) as database, Recovery(Site(shop.broker, shop.dsn)) as recovery:
        database.execute("UPDATE patchpilot.outbox SET sent_at = now() - interval '2 d' WHERE task_id = %s", (task.id,))
        quiet = recovery.look(Window(timedelta(0), timedelta(days=1))).quiet
    assert (quiet.chords["at-work"], quiet.messages_outside.old) == (1, 1)


def test_a_header_that_may_still_be_pushed_is_as_old_as_the_last_return_to_its_chord(
    shop: Shop, broker: redis.Redis
) -> None:
    """Until a part has returned that was pushed later: what was lost before that one was lost."""
    result = chord([add.s(number, 0) for number in range(4)], total.s()).apply_async().parent
    first, lost, behind, _ = (it.id for it in result.results)
    broker.delete("celery")
    window = Window(min_age=timedelta(minutes=5))
    with Database(shop.dsn) as database, Recovery(Site(shop.broker, shop.dsn)) as recovery:
        ago = "UPDATE patchpilot.{} = now() - interval '10 min'"
        database.execute(ago.format("outbox SET recorded_at = now() - interval '1 h', sent_at"))
        database.execute(ago.format("chord SET created_at"))
        returned(result.id, first, 0)
        young = recovery.look(window)
        assert (young.findings, young.quiet.messages_outside.young) == ((), 4)
        returned(result.id, behind, 2)
        overtaken = recovery.look(window)
        assert [(it.id, it.diagnosis) for it in overtaken.findings] == [(lost, "message-lost")]
        assert overtaken.quiet.messages_outside.young == 2
        database.execute(f"{ago.format('chord_part SET returned_at')} WHERE state IS NOT NULL")
        [stuck] = recovery.survey(window)
        assert (stuck.id, stuck.diagnosis, len(stuck.messages)) == (result.id, "header-message-lost", 2)


def returned(group_id: str, task_id: str, position: int) -> None:
    app.backend.chords.return_part(Part(group_id, task_id, position), "SUCCESS", 1)
