"""Workers and publishers through failovers, with the transport as `patchpilot.install` sets it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from celery import Celery, group
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import OperationalError

import patchpilot
from patchpilot.backend.sockets import NotPrimary, PrimarySSLConnection, insisting
from patchpilot.errors import NeedsOperator
from patchpilot.lab.links import Link
from patchpilot.lab.processes import until
from patchpilot.lab.replicas import ReplicaSet, Windows
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode
from tests.conftest import forget_connections, shop_on
from tests.support.processes import Shop, Worker
from tests.support.shop import add, app, hold, quiet, relay, seems_dead
from tests.support.tls import TlsFront

# The user's own settings: what is waited for below passes quickly.
SETTINGS: dict[str, Any] = {
    "broker_transport_options": {"socket_timeout": 2, "socket_connect_timeout": 2, "health_check_interval": 1},
    "redis_socket_timeout": 2,
    "redis_backend_health_check_interval": 1,
}


pytestmark = pytest.mark.backend


@pytest.fixture
def away(
    lab_roster: Roster, tmp_path: Path, replicated: ReplicaSet, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    """The test application on a broker that fails over."""
    for key, value in SETTINGS.items():
        monkeypatch.setitem(app.conf, key, value)
    with shop_on(lab_roster, tmp_path, replicated.endpoint, migrated, monkeypatch) as opened:
        opened.environment["SHOP_SETTINGS"] = json.dumps(SETTINGS)
        yield opened


class Stream:
    """Tasks published one after the other for as long as the block lasts. Nobody may ever hear of an error."""

    def __init__(self) -> None:
        self.sent = 0
        self.errors: list[BaseException] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._publish)

    def __enter__(self) -> Self:
        self._thread.start()
        self.await_more()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.await_more()
        self._over.set()
        self._thread.join()
        assert self.errors == []

    def await_more(self) -> None:
        goal = self.sent + 20
        until(lambda: self.sent >= goal, seconds=60, what=f"more was published; errors: {self.errors}")

    def _publish(self) -> None:
        while not self._over.wait(0.005):
            try:
                quiet.delay(self.sent)
                self.sent += 1
            except Exception as error:  # noqa: BLE001 - the block's end says it
                self.errors.append(error)


def carries_on(shop: Shop, worker: Worker, label: str) -> None:
    """The worker consumes, its pool publishes and stores results, and nothing has exited."""
    relay.delay(label, 4)
    try:
        shop.await_line(f"{label} 0", seconds=60)
    except NeedsOperator as error:
        raise AssertionError(f"{error}; the worker: {worker.output()[-4000:]}") from error
    assert add.delay(1, 2).get(timeout=60) == 3
    assert worker.process.poll() is None, worker.output()[-2000:]


def demote(replicas: ReplicaSet) -> tuple[ValkeyNode, ValkeyNode]:
    """Swap the roles of primary and replica. No socket is closed, and the endpoint still leads to the old one."""
    old, [new] = replicas.primary, replicas.replicas
    new.await_sync(old)
    new.promote()
    old.follow(new.address)
    return old, new


def clients(node: ValkeyNode) -> list[str]:
    """The last commands of those who are connected to a node, its primary and ourselves aside."""
    with node.client() as client:
        seen = [(entry["flags"], entry["cmd"]) for entry in client.client_list()]
    return [command for flags, command in seen if "M" not in flags and command != "client|list"]


def greetings(node: ValkeyNode) -> int:
    """How often a node was asked for its role, which every new connection does."""
    return int(node.ask(lambda client: client.info("commandstats"))["cmdstat_hello"]["calls"])


POOLS = {"prefork": ("-c", "2"), "threads": ("-P", "threads", "-c", "4"), "gevent": ("-P", "gevent", "-c", "10")}
MOST = ["prefork", *(pytest.param(pool, marks=pytest.mark.slow) for pool in ("threads", "gevent"))]


@pytest.mark.parametrize("pool", POOLS)
def test_sockets_closed_at_the_failover(away: Shop, replicated: ReplicaSet, pool: str) -> None:
    worker = away.worker(*POOLS[pool])
    carries_on(away, worker, "before")
    with Stream():
        replicated.failover(Windows(write_loss=0.05, endpoint_lag=0.5))
    carries_on(away, worker, "after")


@pytest.mark.parametrize("pool", MOST)
def test_half_open_sockets(away: Shop, replicated: ReplicaSet, pool: str) -> None:
    """Packets are dropped in front of the old primary, for connections that exist and for new ones, and for good."""
    old, [new] = replicated.primary, replicated.replicas
    with Link(old.address) as hole:
        replicated.link.retarget(hole.address)
        worker = away.worker(*POOLS[pool])
        carries_on(away, worker, "before")
        with Stream():
            new.await_sync(old)
            hole.freeze()
            new.promote()
            known = hole.connections
            until(lambda: hole.connections > known, seconds=60, what="somebody came back, and into the hole")
            replicated.link.retarget(new.address)
        carries_on(away, worker, "after")


@pytest.mark.parametrize("pool", MOST)
def test_a_primary_demoted_with_its_sockets_left_open(away: Shop, replicated: ReplicaSet, pool: str) -> None:
    worker = away.worker(*POOLS[pool])
    carries_on(away, worker, "before")
    with Stream():
        asked = greetings(replicated.primary)
        old, new = demote(replicated)
        until(lambda: greetings(old) > asked + 5, seconds=60, what="they came back too early, again and again")
        replicated.link.retarget(new.address)
    carries_on(away, worker, "after")
    forget_connections(app)  # this process would count as well

    def moved() -> bool:
        group(add.s(1, 1) for _ in range(8)).apply_async().get(timeout=60)
        # Threads share connections, and one that nobody takes stays where it is until somebody does.
        return pool != "prefork" or clients(old) == []

    until(moved, seconds=60, what="nobody was left on the demoted node")
    assert worker.process.poll() is None


def test_a_worker_stops_when_it_is_told_to_while_its_broker_is_silent(away: Shop, replicated: ReplicaSet) -> None:
    """Celery's heartbeat would hold its main loop until the broker is back. It is the first to notice here."""
    options = {**SETTINGS["broker_transport_options"], "health_check_interval": 600}
    settings = {**SETTINGS, "broker_transport_options": options}
    worker = away.worker("-c", "1", SHOP_SETTINGS=json.dumps(settings))
    carries_on(away, worker, "before")
    known = replicated.link.connections
    replicated.link.freeze()
    until(lambda: replicated.link.connections > known, seconds=60, what="it had noticed, and tried in vain")
    worker.process.terminate()
    until(lambda: worker.process.poll() is not None, seconds=60, what="it had stopped")


def test_an_acknowledgement_that_fails_does_not_stop_the_worker(away: Shop, replicated: ReplicaSet) -> None:
    """It counts against the prefetch limit, so the worker would not read again, nor notice anything."""
    worker = away.worker("-c", "1", SHOP_ACKS_LATE="1")
    gate = away.directory / "gate"
    hold.delay(None, str(gate))
    away.await_line("hold began")
    _, new = demote(replicated)
    gate.touch()
    until(lambda: "Couldn't ack" in worker.output(), seconds=60, what="the acknowledgement failed")
    replicated.link.retarget(new.address)
    carries_on(away, worker, "after")


def test_a_pool_process_that_dies_as_the_connection_does(away: Shop, replicated: ReplicaSet) -> None:
    """It has let go of its pipe and is not gone yet: Celery listens to it no more, but counts it as one of its own."""
    worker = away.worker("-c", "1")
    seems_dead.delay()
    away.await_line("let go")
    replicated.failover(Windows(write_loss=0.05, endpoint_lag=0.5))
    carries_on(away, worker, "after")


@pytest.mark.filterwarnings("ignore:Call to 'get_connection':DeprecationWarning")  # kombu 5.4's, to redis-py 5.3
def test_an_acknowledgement_takes_a_fresh_connection(replicated: ReplicaSet) -> None:
    """Or the message would come again when the visibility timeout is over."""
    with Connection(replicated.endpoint, transport="patchpilot.transport:Transport") as connection:
        queue = connection.SimpleQueue("queue")
        queue.put("message")
        message = queue.get(timeout=10)
        _, new = demote(replicated)
        replicated.link.retarget(new.address)
        assert new.ask(lambda client: client.hlen("unacked")) == 1
        message.ack()
        assert new.ask(lambda client: client.hlen("unacked")) == 0


@pytest.mark.filterwarnings("ignore:Call to 'get_connection':DeprecationWarning")  # kombu 5.4's, to redis-py 5.3
def test_a_connection_that_is_given_up_leaves_no_socket_open(replicated: ReplicaSet) -> None:
    """Closing a channel deletes queues, reads what is left and restores messages; all of it fails here."""
    with Connection(replicated.endpoint, transport="patchpilot.transport:Transport") as connection:
        channels = [connection.default_channel, *(connection.channel() for _ in range(3))]
        for number, channel in enumerate(channels):
            fanout = Exchange(f"exchange-{number}", "fanout")
            for queue in (Queue(f"queue-{number}"), Queue(f"fanout-{number}", fanout, auto_delete=True)):
                Consumer(channel, queue, callbacks=[print]).consume()
        Producer(channels[0]).publish("message", routing_key="queue-1")
        connection.drain_events(timeout=10)
        old, _ = demote(replicated)
        assert clients(old)
        connection.collect()
        until(lambda: clients(old) == [], seconds=60, what="the node had seen them go")


@pytest.mark.slow
def test_a_demoted_primary_ends_a_worker_on_kombus_own_transport(away: Shop, replicated: ReplicaSet) -> None:
    """Why the transport is there at all."""
    worker = away.worker("-c", "2", SHOP_STOCK="1")
    carries_on(away, worker, "before")
    _, new = demote(replicated)
    replicated.link.retarget(new.address)
    until(lambda: worker.process.poll() is not None, seconds=60, what="the worker had ended")
    assert "UNBLOCKED" in worker.output()


def test_the_options_reach_the_sockets(valkey: str) -> None:
    with producer(valkey) as publisher:
        publisher.conf.broker_transport_options = {"socket_timeout": 3}
        with publisher.connection_for_write() as connection:
            channel = connection.default_channel
            for pool in (channel.pool, channel.async_pool):
                made = pool.make_connection()
                assert (made.socket_timeout, made.socket_connect_timeout, made.health_check_interval) == (3, 5, 5)
                assert made.socket_keepalive
                assert made.socket_keepalive_options
            # The event loop takes its timers from here.
            assert connection.transport_options["health_check_interval"] == 5


def test_a_publish_survives_losing_its_connection_again_and_again(replicated: ReplicaSet) -> None:
    """Kombu itself gives up at the second loss within one publish, and in the middle of declaring a queue."""
    link = replicated.link

    def disturb() -> None:
        for _ in range(30):
            until(lambda: link.connections > 0, seconds=60, what="somebody was connected")
            link.close_connections()

    with producer(replicated.endpoint) as publisher:
        publisher.send_task("task")
        disturber = threading.Thread(target=disturb)
        disturber.start()
        queues = itertools.count()
        while disturber.is_alive():
            publisher.send_task("task", queue=f"queue-{next(queues)}")
        disturber.join()


def test_the_first_publish_of_a_process_waits_for_the_endpoint(replicated: ReplicaSet) -> None:
    """Celery's own limit for a first connection is 4 s, whatever the retry policy says."""
    replicated.link.refuse()
    opening = threading.Timer(5, replicated.link.retarget, (replicated.primary.address,))
    opening.start()
    with producer(replicated.endpoint) as publisher:
        publisher.send_task("task")
    opening.join()
    with replicated.primary.client() as client:
        assert client.llen("celery") == 1


def test_what_the_server_refuses_for_good_is_not_retried(valkey_server: ValkeyNode, valkey: str) -> None:
    with producer(valkey) as publisher, redis.Redis.from_url(valkey) as client:
        publisher.send_task("task", queue="declared")
        client.delete("declared")
        client.mset({"declared": "not a list", "fresh": "not a list"})
        before = client.info("commandstats")["cmdstat_lpush"]["calls"]
        for queue in ("declared", "fresh"):
            with pytest.raises(OperationalError, match="WRONGTYPE"):
                publisher.send_task("task", queue=queue)
        assert client.info("commandstats")["cmdstat_lpush"]["calls"] == before + 1


class producer:  # noqa: N801 - reads as a statement where it is used
    """A user's application without a result backend, for as long as the block lasts."""

    def __init__(self, broker: str) -> None:
        self._app = Celery("user", broker=broker, set_as_current=False)
        patchpilot.install(self._app)

    def __enter__(self) -> Celery:
        return self._app

    def __exit__(self, *_: object) -> None:
        self._app.close()


def test_every_way_in_which_a_node_says_that_it_is_no_primary_is_a_lost_connection(replicated: ReplicaSet) -> None:
    address = replicated.primary.address
    pool = redis.ConnectionPool(**insisting({"host": address.host, "port": address.port}))
    blocked, queued, scripted, plain, stale = (pool.make_connection() for _ in range(5))
    for connection, command in (
        (blocked, ("BRPOP", "nothing", 0)), (queued, ("MULTI",)), (queued, ("SET", "key", 1)),
    ):  # fmt: skip
        connection.send_command(*command)
    assert [queued.read_response(), queued.read_response()] == [b"OK", b"QUEUED"]
    for connection in (scripted, plain, stale):
        connection.connect()
    old, new = demote(replicated)
    queued.send_command("EXEC")
    scripted.send_command("EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "key")
    plain.send_command("SET", "key", 1)
    for connection in (blocked, queued, scripted, plain):
        with pytest.raises(NotPrimary):
            connection.read_response()
        assert connection._sock is None
    with pytest.raises(NotPrimary, match="connected to a replica"):
        plain.connect()
    old.ask(lambda client: client.config_set("replica-serve-stale-data", "no"))
    new.stop(hard=True)
    until(lambda: not old.replication().link_up, seconds=60, what="the replica had lost its primary")
    stale.send_command("GET", "key")
    with pytest.raises(NotPrimary):
        stale.read_response()


def test_a_health_check_that_has_to_reconnect_ends(replicated: ReplicaSet) -> None:
    """It greets the node, and a greeting must not begin with a health check."""
    address = replicated.link.address
    params = {"host": address.host, "port": address.port, "health_check_interval": 5, "socket_timeout": 0.3}
    connection = redis.ConnectionPool(**insisting({**params, "retry_on_timeout": True})).make_connection()
    connection.connect()
    replicated.link.freeze()
    connection.next_health_check = 0
    with pytest.raises(redis.TimeoutError):
        connection.send_command("PING")
    replicated.link.thaw()
    connection.next_health_check = 0
    connection.send_command("PING")
    assert connection.read_response() == b"PONG"


def test_a_connection_that_only_notifies_moves_too(replicated: ReplicaSet) -> None:
    """A PUBLISH to a demoted node succeeds, and nobody hears it."""
    address = replicated.link.address
    params = insisting({"host": address.host, "port": address.port, "health_check_interval": 0.2})
    with redis.Redis(connection_pool=redis.ConnectionPool(**params)) as client:
        client.publish("channel", "message")
        old, new = demote(replicated)
        replicated.link.retarget(new.address)

        def refused() -> bool:
            try:
                client.publish("channel", "message")
            except NotPrimary:
                return True
            return False

        until(refused, seconds=60, what="the connection was found to lead nowhere")
        client.publish("channel", "message")
        assert clients(old) == []
        assert "publish" in clients(new)


def test_broker_and_results_over_tls(shop: Shop, valkey_server: ValkeyNode, tmp_path: Path) -> None:
    with TlsFront(valkey_server.address, tmp_path) as front:
        bare = f"rediss://127.0.0.1:{front.port}/0"
        url = f"{bare}?ssl_cert_reqs=required&ssl_ca_certs={front.authority}"
        worker = shop.worker("-c", "1", SHOP_BROKER=url, SHOP_BACKEND=f"patchpilot+{url}")
        carries_on(shop, worker, "over TLS")
        for unverified in (f"{bare}?ssl_cert_reqs=none", bare):
            with Connection(unverified, transport="patchpilot.transport:Transport") as connection:
                assert isinstance(connection.default_channel.pool.make_connection(), PrimarySSLConnection)
        with pytest.raises(redis.ConnectionError, match="certificate"):
            Connection(f"{bare}?ssl_cert_reqs=required", transport="patchpilot.transport:Transport").connect()
        worker.kill()
