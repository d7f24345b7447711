"""TCP links: what stands between a client and a server, and can be moved, refused or frozen.

A link plays the DNS name of a primary endpoint: clients know one address, and where it leads changes under them.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from patchpilot.lab.launch import HOST, Address, free_port

_T = TypeVar("_T")
_BACKLOG = 512
_CONTROL_SECONDS = 10


class Link:
    """A TCP port that forwards to a target. Thread safe; runs an event loop in a thread of its own.

    :param target: where new connections lead at first.
    :param port: the loopback port to listen on; a free one by default.
    """

    def __init__(self, target: Address, *, port: int | None = None) -> None:
        self.address = Address(HOST, port or free_port())
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"link {self.address}", daemon=True)
        # Bound from the start: a port that was only looked up could be somebody else's by the time this link starts.
        self._door: socket.socket | asyncio.Server | None = self._bound()
        self._sides: set[_Side] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thawed = asyncio.Event()
        self._welcome = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def target(self) -> Address:
        """Where new connections lead."""
        return self._target

    @property
    def connections(self) -> int:
        """How many clients are connected, those included whose connection leads nowhere yet."""
        return sum(side.inbound for side in tuple(self._sides))

    def start(self) -> None:
        """Listen, and forward."""
        self._thread.start()
        self._do(self._open())
        self.thaw()

    def stop(self) -> None:
        """Drop every connection and stop listening. A stopped link cannot be started again."""
        if not self._thread.is_alive():
            if isinstance(self._door, socket.socket):
                self._door.close()
                self._door = None
            return
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def retarget(self, target: Address) -> None:
        """Lead new connections to ``target``, and accept them if they were refused.

        Connections that exist stay where they are.
        """
        self._target = target
        self._do(self._open())

    def refuse(self) -> None:
        """Drop the connections that exist and refuse new ones, until :meth:`retarget`."""
        self._do(self._refuse())

    def close_connections(self) -> None:
        """Drop the connections that exist. New ones are accepted."""
        self._do(self._drop())

    def freeze(self) -> None:
        """Become a black hole: every socket stays open, new ones are accepted, and nothing is forwarded either way."""
        self._do(self._freeze(frozen=True))

    def thaw(self) -> None:
        """Forward again, what was held back included."""
        self._do(self._freeze(frozen=False))

    def _do(self, change: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(change, self._loop).result(_CONTROL_SECONDS)

    async def _open(self) -> None:
        if isinstance(self._door, asyncio.Server):
            return
        door = self._door or self._bound()
        self._welcome = True
        self._door = await self._loop.create_server(lambda: _Side(self, inbound=True), sock=door, backlog=_BACKLOG)

    async def _refuse(self) -> None:
        self._welcome = False
        if isinstance(self._door, asyncio.Server):
            self._door.close()
            # Bound but not listening: the kernel refuses connections, and nobody else gets the port.
            self._door = self._bound()
        await self._drop()

    async def _drop(self) -> None:
        for side in tuple(self._sides):
            side.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)
        for side in tuple(self._sides):  # made while the tasks were being cancelled
            side.transport.abort()

    async def _freeze(self, *, frozen: bool) -> None:
        if frozen:
            self._thawed.clear()
        else:
            self._thawed.set()
        for side in tuple(self._sides):
            side.flow()

    async def _close(self) -> None:
        self._welcome = False
        if self._door is not None:
            self._door.close()
            self._door = None
        await self._drop()
        # What was accepted a moment before the door was closed is a task of asyncio's own, and aborted when it ends.
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)

    def _bound(self) -> socket.socket:
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setblocking(False)
        door.bind((self.address.host, self.address.port))
        return door

    def _entered(self, side: _Side) -> None:
        if side.inbound and not self._welcome:
            # It was accepted a moment before the door was closed.
            side.transport.abort()
            return
        self._sides.add(side)
        if side.inbound:
            task = self._loop.create_task(self._connect(side))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, client: _Side) -> None:
        await self._thawed.wait()
        target = self._target
        try:
            _, server = await self._loop.create_connection(
                lambda: _Side(self, inbound=False, peer=client), target.host, target.port
            )
        except OSError:
            client.transport.abort()
            return
        if client.transport.is_closing():
            server.transport.abort()
            return
        client.peer = server
        client.flow()


class _Side(asyncio.Protocol):
    """One of the two sockets of a forwarded connection."""

    transport: asyncio.Transport

    def __init__(self, link: Link, *, inbound: bool, peer: _Side | None = None) -> None:
        self.inbound = inbound
        self.peer = peer
        self._link = link
        self._reading = True
        self._peer_full = False
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._link._entered(self)
        self.flow()

    def data_received(self, data: bytes) -> None:
        if self.peer is not None and self._reading:
            self.peer.transport.write(data)
            return
        # Some asyncio (Python 3.11.2) starts to read after connection_made whatever was asked for there. What it has
        # read is kept, and the pause is asked for again; to pause twice would be ignored. So this holds one read.
        self._early.append(data)
        with suppress(RuntimeError):
            self.transport.resume_reading()
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self._throttle(full=True)

    def resume_writing(self) -> None:
        self._throttle(full=False)

    def connection_lost(self, _error: Exception | None) -> None:
        self._link._sides.discard(self)
        if self.peer is not None:
            self.peer.transport.close()

    def flow(self) -> None:
        """Read exactly if there is somebody to read for."""
        reading = self.peer is not None and not self._peer_full and self._link._thawed.is_set()
        if reading != self._reading and not self.transport.is_closing():
            self._reading = reading
            with suppress(RuntimeError):
                (self.transport.resume_reading if reading else self.transport.pause_reading)()
            if reading and self.peer is not None:
                early, self._early = self._early, []
                self.peer.transport.write(b"".join(early))

    def _throttle(self, *, full: bool) -> None:
        if self.peer is not None:
            self.peer._peer_full = full
            self.peer.flow()
