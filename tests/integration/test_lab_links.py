"""A link forwards, moves, refuses, and turns into a black hole."""

from __future__ import annotations

import asyncio
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from patchpilot.lab.launch import HOST, Address
from patchpilot.lab.links import Link, _Side
from patchpilot.lab.processes import until

PATIENCE = 5.0


class _Named(socketserver.ThreadingTCPServer):
    """Greets with its name, then echoes."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, name: bytes) -> None:
        self.name = name
        super().__init__((HOST, 0), _Greeter)


class _Greeter(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Named)
        try:
            self.request.sendall(self.server.name)
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except ConnectionError:
            pass


@contextmanager
def serving(name: bytes) -> Iterator[Address]:
    with _Named(name) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Address(HOST, server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def target() -> Iterator[Address]:
    with serving(b"one") as address:
        yield address


@pytest.fixture
def link(target: Address) -> Iterator[Link]:
    with Link(target) as link:
        yield link


def dial(link: Link) -> socket.socket:
    return socket.create_connection((link.address.host, link.address.port), timeout=PATIENCE)


def is_refused(link: Link) -> bool:
    try:
        dial(link).close()
    except ConnectionRefusedError:
        return True
    return False


def is_dropped(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_it_forwards_both_ways_and_more_than_any_buffer_holds(link: Link) -> None:
    payload = b"x" * 5_000_000
    with dial(link) as client:
        assert client.recv(3) == b"one"
        sender = threading.Thread(target=client.sendall, args=(payload,))
        sender.start()
        received = 0
        while received < len(payload):
            received += len(client.recv(65536))
        sender.join()


def test_it_closes_the_one_side_when_the_other_closes(link: Link) -> None:
    with dial(link) as client:
        client.recv(3)
        assert link.connections == 1
    until(lambda: link.connections == 0, seconds=PATIENCE, what="the link had let go")


def test_a_retargeted_link_leads_elsewhere_and_leaves_connections_where_they_are(link: Link) -> None:
    with serving(b"two") as other, dial(link) as old:
        assert old.recv(3) == b"one"
        link.retarget(other)
        with dial(link) as new:
            assert new.recv(3) == b"two"
        old.sendall(b"still here")
        assert old.recv(10) == b"still here"


def test_it_refuses_and_drops_until_it_is_retargeted(link: Link, target: Address) -> None:
    with dial(link) as client:
        client.recv(3)
        link.refuse()
        assert is_dropped(client)
    assert all(is_refused(link) for _ in range(20))
    link.refuse()

    link.retarget(target)

    with dial(link) as client:
        assert client.recv(3) == b"one"


def test_it_drops_connections_and_takes_new_ones(link: Link) -> None:
    with dial(link) as client:
        client.recv(3)
        link.close_connections()
        assert is_dropped(client)
    with dial(link) as client:
        assert client.recv(3) == b"one"


def test_a_frozen_link_is_half_open_and_loses_nothing_when_it_thaws(link: Link) -> None:
    with dial(link) as client:
        client.recv(3)
        link.freeze()
        client.sendall(b"held back")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        with dial(link) as late:
            late.settimeout(0.2)
            with pytest.raises(TimeoutError):
                late.recv(1)
            link.thaw()
            late.settimeout(PATIENCE)
            assert late.recv(3) == b"one"
        client.settimeout(PATIENCE)
        assert client.recv(9) == b"held back"


def test_a_link_to_nowhere_drops_the_client() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        with Link(Address(HOST, unused.getsockname()[1])) as link, dial(link) as client:
            assert is_dropped(client)


class _Wire(asyncio.Transport):
    """A transport that reads although it was told not to, as that of Python 3.11.2 does in `connection_made`."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reads = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


def test_what_is_read_before_there_is_a_peer_arrives_in_order(link: Link) -> None:
    early, late = _Side(link, inbound=False), _Side(link, inbound=False)
    wire, other = _Wire(), _Wire()
    early.connection_made(wire)
    assert not wire.reads
    wire.reads = True
    early.data_received(b"one ")
    assert not wire.reads
    early.data_received(b"two ")
    late.peer = early
    late.connection_made(other)
    early.peer = late
    early.flow()
    assert wire.reads
    early.data_received(b"three")
    assert other.written == b"one two three"
    early.connection_lost(None)
    late.connection_lost(None)


def test_bytes_sent_before_the_target_accepts_arrive(link: Link) -> None:
    with serving(b"two") as late:
        link.freeze()
        with dial(link) as client:
            client.sendall(b"first ")
            until(lambda: link.connections == 1, seconds=PATIENCE, what="the client was let in")
            client.sendall(b"second")
            link.retarget(late)
            link.thaw()
            received = b""
            while len(received) < len(b"twofirst second"):
                received += client.recv(65536)
            assert received == b"twofirst second"


def test_a_stopped_link_frees_its_port(target: Address) -> None:
    with Link(target) as link, dial(link) as client:
        client.recv(3)
        port = link.address.port
    link.stop()
    with Link(target, port=port) as again, dial(again) as client:
        assert client.recv(3) == b"one"


def test_many_threads_may_work_on_one_link(link: Link, target: Address) -> None:
    changes = [link.freeze, link.thaw, link.refuse, lambda: link.retarget(target), link.close_connections]
    threads = [threading.Thread(target=change) for change in changes * 10]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    link.thaw()
    link.retarget(target)
    with dial(link) as client:
        assert client.recv(3) == b"one"
