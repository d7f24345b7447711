"""How the canary gets into an application, and what a worker tells of itself. No broker is needed for that."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals

from patchpilot.backend import about, canary
from patchpilot.backend.config import CANARY
from patchpilot.backend.instance import this_worker
from patchpilot.postgres.queries import queries

QUEUE = f"{CANARY}.{this_worker()}"

pytestmark = pytest.mark.backend


@pytest.fixture
def app() -> Celery:
    return Celery("canaries", broker="redis://user:hunter2@broker.test:6380/0", set_as_current=False)


def test_sql_knows_canaries_by_the_same_name() -> None:
    for statement in (queries("canaries")["close"], queries("canaries")["purge"], queries("recovery")["open_chords"]):
        assert f"'{CANARY}'" in statement


def test_an_application_that_is_not_complete_yet_gets_the_task_when_it_is(app: Celery) -> None:
    canary.install(app)
    assert CANARY not in app._tasks
    app.finalize()
    task = app.tasks[CANARY]
    canary.install(app)
    assert app.tasks[CANARY] is task
    assert (task.ignore_result, task.acks_late, task.app) == (True, False, app)


def test_each_application_has_a_task_of_its_own(app: Celery) -> None:
    other = Celery("others", set_as_current=False)
    for each in (app, other):
        each.finalize()
        canary.install(each)
    assert (app.tasks[CANARY].app, other.tasks[CANARY].app) == (app, other)


def test_only_a_worker_consumes_the_queue_and_whatever_it_was_told_to_consume(app: Celery) -> None:
    app.finalize()
    canary.install(app)
    assert QUEUE not in app.amqp.queues.consume_from
    app.amqp.queues.select(["reports", "celery"])
    signals.celeryd_after_setup.send(sender="w", instance=SimpleNamespace(app=app), conf=app.conf)
    assert set(app.amqp.queues.consume_from) == {"reports", "celery", QUEUE}


def test_a_backend_that_a_worker_loads_late_is_not_too_late(app: Celery) -> None:
    """For the banner, say: the signal is over, and the worker does not consume yet."""
    app.finalize()
    app.use_fast_trace_task = True
    canary.install(app)
    assert set(app.amqp.queues.consume_from) == {"celery", QUEUE}
    queue = app.amqp.queues[QUEUE]
    assert (queue.no_declare, queue.no_ack, queue.exchange.name, queue.routing_key) == (True, True, CANARY, QUEUE)


@pytest.mark.parametrize("kind", ["topic", "fanout"])
def test_the_applications_default_exchange_does_not_matter(app: Celery, kind: str) -> None:
    app.conf.task_default_exchange_type = kind
    app.finalize()
    app.amqp.queues.select_add(canary.queue_of(this_worker()))
    assert app.amqp.queues[QUEUE].exchange.type == "direct"


def test_what_a_worker_tells_of_itself_is_no_secret(app: Celery) -> None:
    app.conf.update(task_acks_late=True)
    options = {"socket_timeout": 10, "password": "hunter2"}
    connection = SimpleNamespace(hostname="broker.test", port=None, transport_options=options)
    consumed = SimpleNamespace(queues=[SimpleNamespace(name=name) for name in ("celery", QUEUE, f"{CANARY}.another")])
    consumer: Any = SimpleNamespace(
        task_consumer=consumed, connection=connection, pool=SimpleNamespace(num_processes=3)
    )
    said = about._about(SimpleNamespace(consumer=consumer, app=app))
    assert (said["instance"], said["queues"], said["canary"], said["processes"]) == (this_worker(), ["celery"], True, 3)
    assert said["broker"] == ["broker.test", 6379]
    assert said["settings"]["task_acks_late"] is True
    assert said["settings"]["broker_transport_options.socket_timeout"] == 10
    assert said["settings"]["broker_transport_options.visibility_timeout"] is None
    assert "hunter2" not in json.dumps(said)
    consumer.task_consumer = None
    assert about._about(SimpleNamespace(consumer=consumer, app=app))["queues"] == []
