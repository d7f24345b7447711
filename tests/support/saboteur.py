"""A failover that loses exactly one write, or what lies between two of them.

A primary and a replica, and before them the endpoint, which reads what clients send. When the write that is to be lost
comes by, everybody else is held up, the replica is waited for and detached, the write is made on the primary and
acknowledged to whoever made it, and only then the endpoint leads to what was the replica: it knows nothing of it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from patchpilot.lab.launch import HOST, Address, free_port
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import ValkeyNode

Command = Sequence[bytes]
Which = Callable[[Command], bool]

WAIT = 60


@dataclass
class Plot:
    """What is to be lost, or done to a command in place of that."""

    begins: Which
    ends: Which
    act: Callable[[], None] | None = None
    """What to do when the command comes, after which it is passed on; None for losing it."""
    settled: Callable[[], bool] | None = None
    """Waited for before anything is done to the command, so that nothing else is under way then."""
    drop: bool = False
    """The command goes nowhere and nobody gets through until :meth:`Saboteur.relent`."""
    detached: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Saboteur:
    """The endpoint, and the two nodes behind it."""

    def __init__(self, name: str, directory: Path, roster: Roster) -> None:
        self._nodes = [ValkeyNode(f"{name}-{number}", directory, roster=roster) for number in (1, 2)]
        self._door = socket.create_server((HOST, 0))
        self.address = Address(HOST, self._door.getsockname()[1])
        self._turn = threading.RLock()
        self._visits: set[_Visit] = set()
        self._plot: Plot | None = None
        self._closed = False
        self._refusing = False

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    @property
    def primary(self) -> ValkeyNode:
        return self._nodes[0]

    def __enter__(self) -> Self:
        self.primary.start()
        self._nodes[1].start(follow=self.primary.address)
        self._nodes[1].await_sync(self.primary)
        threading.Thread(target=self._receive, name=f"saboteur {self.address}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._door.close()
        self._drop_all()
        for node in self._nodes:
            node.stop(hard=True)

    # -- what tests ask for -------------------------------------------------------------------------------------------

    @contextmanager
    def losing(
        self, begins: Which, ends: Which | None = None, *, settled: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        """Lose the command that ``begins`` says, and all up to the one that ``ends`` says, by default the same.

        :param settled: waited for before the first of them is made.
        """
        with self._plotting(Plot(begins, ends or begins, settled=settled)):
            yield
        # What was lost is lost: the old primary forgets it as well, and follows.
        self._nodes[1].follow(self.primary.address)
        self._nodes[1].await_sync(self.primary)

    @contextmanager
    def refusing(self, which: Which) -> Iterator[None]:
        """From the command that ``which`` says on nobody gets through, until :meth:`relent`."""
        with self._plotting(Plot(which, which, drop=True)):
            yield
        self.relent()

    @contextmanager
    def demoting(self, which: Which) -> Iterator[None]:
        """The command that ``which`` says comes to a node that is no primary: for that one moment."""
        with self._plotting(Plot(which, which, act=lambda: self.primary.follow(Address(HOST, free_port())))):
            yield

    @contextmanager
    def watching(self, which: Which) -> Iterator[None]:
        """Show every command to ``which``, and do nothing."""
        self._plot = Plot(which, which)
        try:
            yield
        finally:
            self._plot = None

    def relent(self) -> None:
        """Let everybody in again."""
        self._refusing = False

    @contextmanager
    def _plotting(self, plot: Plot) -> Iterator[None]:
        self._plot = plot
        try:
            yield
            until(plot.done.is_set, seconds=WAIT, what="the write that was to be lost had come by")
        finally:
            self._plot = None

    # -- commands that come by ----------------------------------------------------------------------------------------

    def pass_on(self, visit: _Visit, commands: list[tuple[Command, bytes]]) -> None:
        """Give commands to the primary; one at a time, so that nothing overtakes the one that is to be lost."""
        plot = self._plot
        if (
            plot is not None
            and plot.settled is not None
            and any(self._is(plot.begins, command) for command, _ in commands)
        ):
            until(plot.settled, seconds=WAIT, what="everything else had been done")
        with self._turn:
            for command, raw in commands:
                plot = self._plot
                if plot is None or plot.done.is_set():
                    visit.send(raw)
                elif plot.drop and self._is(plot.begins, command):
                    self._refusing = True
                    self._drop_all()
                    plot.done.set()
                    return
                elif plot.act is not None and self._is(plot.begins, command):
                    plot.act()
                    visit.send(raw)
                    visit.await_replies()
                    self.primary.promote()
                    plot.done.set()
                elif plot.act is None and not plot.drop:
                    self._maybe_lose(plot, visit, command, raw)
                else:
                    visit.send(raw)

    def _is(self, which: Which, command: Command) -> bool:
        """Whether it is that command, and will be carried out: not so a script that the server has yet to get."""
        if not which(command):
            return False
        if command[0].upper() != b"EVALSHA":
            return True
        digest = command[1].decode()
        return bool(self.primary.ask(lambda client: client.script_exists(digest))[0])

    def _maybe_lose(self, plot: Plot, visit: _Visit, command: Command, raw: bytes) -> None:
        if not plot.detached and self._is(plot.begins, command):
            self._nodes[1].await_sync(self.primary)
            self._nodes[1].promote()
            plot.detached = True
        if plot.detached and self._is(plot.ends, command):
            visit.last = True
            for other in self._visits - {visit}:
                other.hush()
        visit.send(raw)
        if visit.last and not visit.in_transaction:  # of a transaction, the end is what counts
            visit.await_replies()
            self._move(plot)

    def _move(self, plot: Plot) -> None:
        self._nodes.reverse()
        self._drop_all()
        plot.done.set()

    # -- connections --------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        while not self._closed:
            with suppress(OSError):
                client, _ = self._door.accept()
                if self._refusing or self._closed:
                    client.close()
                else:
                    self._welcome(client)

    def _welcome(self, client: socket.socket) -> None:
        with self._turn:
            try:
                server = socket.create_connection((self.primary.address.host, self.primary.address.port))
            except OSError:
                client.close()
                return
            visit = _Visit(self, client, server)
            self._visits.add(visit)
        visit.start()

    def leave(self, visit: _Visit) -> None:
        with self._turn:
            self._visits.discard(visit)

    def _drop_all(self) -> None:
        with self._turn:
            visits, self._visits = self._visits, set()
        for visit in visits:
            visit.close()


class _Visit:
    """One client's connection."""

    def __init__(self, saboteur: Saboteur, client: socket.socket, server: socket.socket) -> None:
        self._saboteur = saboteur
        self._client = client
        self._server = server
        self._sent = 0
        self._answered = 0
        self._hushed = False
        self.in_transaction = False
        self.last = False
        """What this client asks now is the last that the old primary does."""

    def start(self) -> None:
        for work in (self._up, self._down):
            threading.Thread(target=work, name="saboteur's visit", daemon=True).start()

    def send(self, raw: bytes) -> None:
        word = _words(raw)[0].upper()
        self.in_transaction = word == b"MULTI" or (self.in_transaction and word not in (b"EXEC", b"DISCARD"))
        self._sent += 1
        with suppress(OSError):
            self._server.sendall(raw)

    def await_replies(self) -> None:
        """Wait until the client has the replies to all it has asked."""
        until(lambda: self._answered >= self._sent, seconds=WAIT, what="the primary had answered")

    def hush(self) -> None:
        """The client gets no answer any more."""
        self._hushed = True

    def close(self) -> None:
        for side in (self._client, self._server):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def _up(self) -> None:
        buffer = b""
        with suppress(OSError):
            while data := self._client.recv(65536):
                commands, buffer = parsed(buffer + data)
                self._saboteur.pass_on(self, commands)
        self._over()

    def _down(self) -> None:
        buffer = b""
        with suppress(OSError):
            while data := self._server.recv(65536):
                if self._hushed:
                    continue
                self._client.sendall(data)
                number, buffer = answers(buffer + data)
                self._answered += number
        self._over()

    def _over(self) -> None:
        self._saboteur.leave(self)
        self.close()


def parsed(buffer: bytes) -> tuple[list[tuple[Command, bytes]], bytes]:
    """The whole commands in ``buffer``, each with its own bytes, and what is left."""
    found: list[tuple[Command, bytes]] = []
    while (end := _end(buffer, 0)) is not None:
        raw, buffer = buffer[:end], buffer[end:]
        found.append((_words(raw), raw))
    return found, buffer


def answers(buffer: bytes) -> tuple[int, bytes]:
    """How many whole answers are in ``buffer``, and what is left."""
    number = 0
    while (end := _end(buffer, 0)) is not None:
        number, buffer = number + 1, buffer[end:]
    return number, buffer


def _end(buffer: bytes, at: int) -> int | None:
    """Where the value that begins at ``at`` ends (RESP 2 and 3), or None if it is not all there."""
    line = buffer.find(b"\r\n", at)
    if line < 0:
        return None
    kind, head, at = buffer[at : at + 1], buffer[at + 1 : line], line + 2
    if kind in b"$=!" and head != b"-1":
        end = at + int(head) + 2
        return end if len(buffer) >= end else None
    if kind in b"*~>%|" and head != b"-1":
        for _ in range(int(head) * (2 if kind in b"%|" else 1)):
            after = _end(buffer, at)
            if after is None:
                return None
            at = after
    return at


def _words(raw: bytes) -> Command:
    """The words of one whole command."""
    words, at = [], raw.find(b"\r\n") + 2
    while at < len(raw):
        line = raw.find(b"\r\n", at)
        size = int(raw[at + 1 : line])
        words.append(raw[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return words
