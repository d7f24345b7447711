"""The test application on a broker whose every write can be lost: once with our backend, once with Celery's own."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from celery import Celery, Signature
from kombu import Connection

from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Applied, Finding, Recovery, Site, Window
from tests.conftest import forget_connections
from tests.support import shop as shop_module
from tests.support.commands import configured, patchpilot
from tests.support.processes import Shop, Worker
from tests.support.saboteur import Saboteur, Which

WAIT = 60
NOW = Window(min_age=timedelta(0))

# Connections that are gone are noticed, and opened again, quickly.
QUICK: dict[str, Any] = {
    "broker_transport_options": {"socket_timeout": 5, "socket_connect_timeout": 5, "health_check_interval": 5},
    "redis_socket_timeout": 5,
    "broker_channel_error_retry": True,
}


@dataclass(frozen=True)
class Side:
    """A backend, and how it counts."""

    name: str
    stock: bool = False
    counting: str = "postgres"

    def __str__(self) -> str:
        return self.name


OURS = Side("ours")
VALKEY = Side("valkey", counting="valkey")
STOCK = Side("stock", stock=True)


class Tasks:
    """Signatures of the test application's tasks: ``tasks.add(1, 1)``."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Callable[..., Signature]:
        def signature(*args: Any, **kwargs: Any) -> Signature:
            return self._app.signature(f"{shop_module.__name__}.{name}", args=args, kwargs=kwargs)

        return signature


@dataclass
class Stage:
    """One side's application, with a worker that has one process and takes only what it is told to."""

    side: Side
    shop: Shop
    saboteur: Saboteur
    app: Celery
    worker: Worker
    seen: int = 0
    queues: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> Tasks:
        return Tasks(self.app)

    # -- queues and what is in them ----------------------------------------------------------------------------------

    def queue(self, name: str) -> str:
        """A queue of this case's own, which nobody consumes yet."""
        self.queues.append(f"{name}-{uuid.uuid4().hex[:8]}")
        return self.queues[-1]

    def consume(self, *queues: str) -> None:
        """Have the worker take messages from these queues too."""
        for queue in queues:
            self._tell("add_consumer", {"queue": queue})

    def consume_without_answer(self, queue: str) -> None:
        """As :meth:`consume`, where the worker may lose its connection before it can answer."""
        with self.app.connection_for_write() as connection:
            self.app.control.broadcast("add_consumer", arguments={"queue": queue}, connection=connection)

    def ask(self, question: Callable[[redis.Redis], Any]) -> Any:
        """Ask the primary, whichever it is, past the endpoint."""
        return self.saboteur.primary.ask(question)

    def waiting(self, queue: str) -> int:
        return int(self.ask(lambda client: client.llen(queue)))

    def all_acknowledged(self) -> bool:
        return self.ask(lambda client: client.hlen("unacked")) == 0

    def await_rest(self, *unconsumed: str) -> None:
        """Wait until the worker has done all that there is to do. Twice, for what the last of it may have sent."""
        busy = [queue for queue in ("celery", *self.queues) if queue not in unconsumed]
        for _ in range(2):
            until(
                lambda: self.all_acknowledged() and not any(map(self.waiting, busy)), seconds=WAIT,
                what=f"the queues were empty; the worker: {self.worker.output()[-3000:]}",
            )  # fmt: skip
            mark = uuid.uuid4().hex
            self.tasks.quiet(mark).apply_async()
            self.shop.await_line(f"quiet {mark}", seconds=WAIT)
        # The mark's own acknowledgement may come after its line, and must not be taken for one that is to be lost.
        until(self.all_acknowledged, seconds=WAIT, what="the last mark was acknowledged")

    def give_back(self) -> None:
        """The visibility timeout of everything that is unacknowledged is over."""
        options = {"visibility_timeout": 0}
        with Connection(self.saboteur.primary.url, transport_options=options) as connection:
            connection.default_channel.qos.restore_visible()

    def _tell(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Tell the worker something until it says that it heard, through however many reconnects."""

        def heard() -> bool:
            with self.app.connection_for_write() as connection:
                return bool(
                    self.app.control.broadcast(
                        command, arguments=dict(arguments), reply=True, limit=1, timeout=2, connection=connection
                    )
                )

        until(heard, seconds=WAIT, what=f"the worker heard of {command}")

    # -- what ran ----------------------------------------------------------------------------------------------------

    def ledger(self) -> list[str]:
        """What this case has written, in order, the marks of :meth:`await_rest` aside."""
        lines = self.shop.ledger()[self.seen :]
        return sorted(line for line in lines if not line.startswith("quiet ") or len(line.split()[1]) != 32)

    def stored(self, task_id: str) -> dict[str, Any]:
        """The result of a task as it is stored."""
        if self.side.stock:
            raw = self.ask(lambda client: client.get(f"celery-task-meta-{task_id}"))
        else:
            with Database(self.shop.dsn) as database:
                raw = database.fetch("SELECT meta FROM patchpilot.result WHERE task_id = %s", [task_id])[0]["meta"]
        meta: dict[str, Any] = json.loads(raw)
        return meta

    def await_line(self, line: str, count: int = 1) -> None:
        until(
            lambda: self.ledger().count(line) >= count, seconds=WAIT,
            what=f"{line!r} x{count} in {self.ledger()}; the worker: {self.worker.output()[-3000:]}",
        )  # fmt: skip

    # -- recovery ----------------------------------------------------------------------------------------------------

    def recover(self, *expected: str) -> tuple[Applied, ...]:
        """Recover until these diagnoses have been remedied, and no others."""
        done: list[Applied] = []
        site = Site(self.saboteur.url, self.shop.dsn)
        with Recovery(site, stale=timedelta(seconds=4)) as recovery:

            def enough() -> bool:
                done.extend(recovery.recover(NOW))
                return len(done) >= len(expected)

            until(enough, seconds=WAIT, what=f"{expected} were remedied, not {done}: {recovery.survey(NOW)}")
        assert sorted(it.diagnosis for it in done) == sorted(expected), done
        return tuple(done)

    def recover_by_command(self, *expected: str) -> None:
        """As :meth:`recover`, in a process of its own."""
        done: list[str] = []

        def enough() -> bool:
            ran = patchpilot("recover", "--min-age", "0s", "--output", "json", "--config", configured(self.shop))
            assert ran.returncode == 0, ran.stderr
            done.extend(it["diagnosis"] for it in json.loads(ran.stdout)["applied"])
            return len(done) >= len(expected)

        until(enough, seconds=WAIT, what=f"{expected} were remedied, not {done}")
        assert sorted(done) == sorted(expected)

    def survey(self) -> tuple[Finding, ...]:
        with Recovery(Site(self.saboteur.url, self.shop.dsn), stale=timedelta(seconds=4)) as recovery:
            return recovery.survey(NOW)

    def nothing_to_recover(self) -> None:
        with Recovery(Site(self.saboteur.url, self.shop.dsn), stale=timedelta(seconds=4)) as recovery:
            assert recovery.sweep(NOW).findings == ()

    # -- workers -----------------------------------------------------------------------------------------------------

    def new_worker(self, **environment: str) -> None:
        """Another worker in place of the one there was, which is killed with all its processes."""
        self.worker.kill()
        self.worker = self.shop.worker("-c", "1", **environment)

    # -- one case ----------------------------------------------------------------------------------------------------

    @contextmanager
    def used(self) -> Iterator[Self]:
        """Make this stage the one that this process sends to."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHOP_LEDGER", str(self.shop.ledger_file))
            if not self.side.stock:
                addresses = dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url"), self.saboteur.url)
                backend = {
                    "result_backend": self.shop.environment["SHOP_BACKEND"], "patchpilot_postgres": self.shop.dsn,
                    "patchpilot_counting": self.side.counting,
                }  # fmt: skip
                for key, value in {**addresses, **backend, **QUICK}.items():
                    patch.setitem(self.app.conf, key, value)
                forget_connections(self.app)
            else:
                self.app._pool = self.app.amqp._producer_pool = (
                    None  # whoever forgets connections closes the pools of all
                )
            self.seen = len(self.shop.ledger())
            try:
                yield self
            finally:
                self._clear()
                waiting = self.app.backend.result_consumer
                if not self.side.stock:
                    forget_connections(self.app)
                # Results that are still about would have a word with a server that is gone by then.
                waiting._pubsub = None
                waiting.subscribed_to.clear()

    def _clear(self) -> None:
        """What one case leaves must not disturb the next one."""
        for queue in self.queues:
            self._tell("cancel_consumer", {"queue": queue})
        names = ["unacked", "unacked_index", "celery", *self.queues]
        self.ask(lambda client: client.delete(*names, *client.keys("celery-taskset-meta-*"), "any"))
        self.queues.clear()
        with Database(self.shop.dsn) as database:
            database.execute("DELETE FROM patchpilot.outbox")
            database.execute("DELETE FROM patchpilot.chord")


class Stages:
    """Stages by side, opened when first asked for and kept open until the end."""

    def __init__(self, roster: Roster, directory: Path, postgres: Postgres, template: str) -> None:
        self._roster = roster
        self._directory = directory
        self._postgres = postgres
        self._template = template
        self._open: dict[Side, Stage] = {}
        self._close = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def at(self, side: Side) -> Stage:
        """The stage of this side."""
        if side not in self._open:
            self._open[side] = self._opened(side)
        return self._open[side]

    def _opened(self, side: Side) -> Stage:
        directory = self._directory / side.name
        directory.mkdir()
        saboteur = self._close.enter_context(Saboteur(f"stage-{side.name}", directory, self._roster))
        dsn = self._postgres.create_database(f"stage_{side.name}", template=self._template)
        self._close.callback(self._postgres.drop_database, f"stage_{side.name}")
        environment = {"SHOP_SETTINGS": json.dumps(QUICK), "SHOP_COUNTING": side.counting, "SHOP_FENCE_LEASE": "2"}
        if side.stock:
            environment |= {"SHOP_STOCK": "1", "SHOP_BACKEND": saboteur.url}
        shop = Shop(self._roster, directory, saboteur.url, dsn, **environment)
        self._close.callback(shop.close)
        worker = shop.worker("-c", "1")
        return Stage(side, shop, saboteur, self._producer(side, saboteur), worker)

    def _producer(self, side: Side, saboteur: Saboteur) -> Celery:
        if not side.stock:
            return shop_module.app
        app = Celery("stock", broker=saboteur.url, backend=saboteur.url, set_as_current=False)
        app.conf.update(QUICK)
        self._close.callback(app.close)
        self._close.callback(lambda: app.backend.client.connection_pool.disconnect())
        return app


# -- which write ----------------------------------------------------------------------------------------------------


def push(queue: str, task_id: str | None = None, name: str | None = None) -> Which:
    """The push of a message into ``queue``."""

    def which(command: Any) -> bool:
        if command[0].upper() != b"LPUSH" or command[1] != queue.encode():
            return False
        headers = json.loads(command[2])["headers"]
        return (task_id is None or headers["id"] == task_id) and (name is None or headers["task"].endswith(f".{name}"))

    return which


def retried(queue: str) -> Which:
    """The push of a retry."""
    return lambda command: push(queue)(command) and bool(json.loads(command[2])["headers"]["retries"])


def pop(queue: str) -> Which:
    """A look into ``queue`` that takes what is there."""
    return lambda command: command[0].upper() == b"BRPOP" and queue.encode() in command[1:]


def written_down(command: Any) -> bool:
    """What was taken is written down as not yet acknowledged."""
    return command[0].upper() == b"HSET" and command[1] == b"unacked"


def acknowledged(command: Any) -> bool:
    return command[0].upper() == b"HDEL" and command[1] == b"unacked"


def size(command: Any) -> bool:
    """The size of a chord's header."""
    return command[0].upper() in (b"SET", b"SETEX") and command[1].endswith(b".s")


def part(task_id: str) -> Which:
    """The return of a part, by Celery's script or by ours."""

    def which(command: Any) -> bool:
        return command[0].upper() in (b"EVAL", b"EVALSHA") and any(
            word.split(b":")[0] == task_id.encode() for word in command[3:]
        )

    return which


def grown(command: Any) -> bool:
    """A chord grows by a task."""
    return command[0].upper() in (b"INCR", b"INCRBY") and command[1].endswith(b".t")


def cleaned_up(command: Any) -> bool:
    """The keys of a chord that is over are removed, by Celery's script or by us."""
    if command[0].upper() in (b"EVAL", b"EVALSHA"):
        return command[2] == b"5"
    return command[0].upper() == b"DEL" and any(key.endswith(b".d") for key in command[1:])
