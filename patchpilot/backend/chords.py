"""Chords: opened in PostgreSQL before the header is published, and what their parts return.

How a complete one is finished is in :mod:`patchpilot.backend.finishing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from celery import Celery
from celery._state import get_current_worker_task
from celery.canvas import Signature
from celery.result import GroupResult
from celery.utils.functional import _regen
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError, OperationalError
from kombu.utils.encoding import ensure_bytes
from kombu.utils.functional import LRUCache
from psycopg.types.json import Jsonb

from patchpilot.backend.config import Config, Counting
from patchpilot.backend.finishing import ResultCodec
from patchpilot.backend.message import Part
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.routes import routes
from patchpilot.backend.storing import Stored, stored
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("chords")

# Chords that this process publishes while a generator produces their header, and the latest that it has. Backends are
# one a thread and application; a chord, its header and its messages may go by different ones.
_generated: Any = LRUCache(limit=10_000)


@dataclass(frozen=True)
class Waiting:
    """How a chord stands after a part returned."""

    live: bool
    """It still waits for its callback."""
    counted_here: bool
    """PostgreSQL is to be asked whether it is complete: it counts, or the count in Valkey may have lost parts."""
    unforeseen: bool
    """This part is not on record yet: a generator produces the header, and no message told of it."""
    ready: bool | None = None
    """It is complete and nobody dispatches it; None if that has not been asked."""


@dataclass(frozen=True)
class Opening:
    """A chord that is about to be published."""

    row: dict[str, Any]
    task_ids: tuple[str, ...]
    """Of its header; none while a generator is still to produce it."""

    @property
    def group_id(self) -> str:
        return str(self.row["group_id"])

    def count_in_postgres(self) -> None:
        """Have its parts counted in PostgreSQL, whatever is configured."""
        self.row["counting"] = str(Counting.POSTGRES)

    def values(self) -> dict[str, Any]:
        """Its record, and its members."""
        return {**self.row, "task_ids": Jsonb(self.task_ids)}


class Chords:
    """The chords of one application, as one process sees them."""

    def __init__(self, app: Celery, database: Database, codec: ResultCodec, outbox: Outbox, config: Config) -> None:
        self._app = app
        self._database = database
        self._codec = codec
        self._outbox = outbox
        self._config = config
        outbox.foresee = self.foresee
        self._warned: set[str] = set()

    def open(self, group_id: str, header: Sequence[Any], callback: Signature, *, shadow: bool = False) -> None:
        """Record a chord: which tasks belong to it, what it calls, and how that is published.

        :param header: the frozen results of the header's tasks. Those of a generator are not asked for: it may wait for
            what its first tasks do. Its parts are recorded with its messages, or when they return.
        :raises EncodeError: if the callback cannot be stored unchanged, and the configuration is strict.
        """
        of_tasks = routes(self._app, callback)
        record = stored(callback, of_tasks, self._app.conf.task_serializer)
        self._check(callback.name, group_id, record)
        generating = isinstance(header, _regen)
        if generating:
            _generated[group_id] = True
        known = () if generating else tuple(header)
        row = {
            "group_id": group_id,
            "callback_id": str(callback.options.get("task_id") or group_id),
            "callback_name": callback.name,
            "callback": record.payload,
            "callback_type": record.content_type,
            "callback_encoding": record.encoding,
            "unrecoverable": record.flaw if record.payload is None else None,
            "routes": Jsonb(of_tasks),
            "result_serializer": self._codec.serializer,
            "structure": _structure(known),
            "opener": _opener(),
            "generating": generating,
            "counting": str(self._config.counting),
            "shadow": shadow,
            "broker": self._outbox.identity.home,
        }
        self._outbox.open(Opening(row, _task_ids(known)), at_once=not generating)

    def foresee(self, connection: Connection, part: Part) -> None:
        """A message of a header that a generator produces is written down: so is the part that it will bring."""
        if part.group_id in _generated and connection.execute(SQL["lock"], part._asdict()).fetchone():
            connection.execute(SQL["foresee"], part._asdict())

    def generated(self, group_id: str, size: int) -> None:
        """The generator of a header is at its end, after ``size`` tasks. The last one is still to be published.

        :raises OperationalError: if that cannot be written down.
        """
        if group_id in _generated:
            try:
                self._database.execute(SQL["generated"], {"group_id": group_id, "size": size})
            except PatchpilotError as error:
                raise OperationalError(f"chord {group_id} not published: {error}") from error

    def _check(self, name: str, group_id: str, stored: Stored) -> None:
        """Say at once what recovery would find out too late."""
        if stored.flaw is None:
            return
        if self._config.strict:
            raise EncodeError(f"callback {name} of chord {group_id} cannot be stored as it is: {stored.flaw}")
        if stored.payload is None:
            logger.warning("Chord %s cannot be recovered: its callback %s: %s", group_id, name, stored.flaw)
        elif name not in self._warned:
            self._warned.add(name)
            logger.warning("Callback %s does not get what it was sent with: %s", name, stored.flaw)

    def distrust(self, group_id: str) -> None:
        """Count the parts of a chord in PostgreSQL from here on: the count in Valkey is not complete."""
        opening = self._outbox.opening(group_id)
        if opening is not None:
            opening.count_in_postgres()
        else:
            self._database.execute(SQL["distrust"], {"group_id": group_id})

    def grow(self, group_id: str, task_id: str) -> bool:
        """Add a task to a chord that is under way. False if the chord is not in our record."""
        return self._database.run(self.growing(group_id, task_id))

    @staticmethod
    def growing(group_id: str, task_id: str) -> Callable[[Connection], bool]:
        """What :meth:`grow` writes."""

        def write(connection: Connection) -> bool:
            row = {"group_id": group_id, "task_id": task_id}
            known = connection.execute(SQL["lock"], row).fetchone() is not None
            if known and connection.execute(SQL["grow"], row).rowcount:
                connection.execute(SQL["grown"], row)
            return known

        return write

    def return_part(self, part: Part, state: str, result: Any) -> Waiting | None:
        """Record what a header task returned. The first return stands.

        :returns: how the chord stands; None if it is not in our record.
        """
        row = {**part._asdict(), "state": state, "payload": self.payload(state, result)}
        return waiting(self._database.fetch(SQL["return_part"], row))

    def payload(self, state: str, result: Any) -> bytes:
        """What a part returned, as it is stored.

        :raises EncodeError: if it cannot be serialised.
        """
        payload: bytes = ensure_bytes(self._codec.encode(self._codec.encode_result(result, state)))
        return payload

    def return_unforeseen(self, part: Part, state: str, result: Any) -> Waiting | None:
        """As :meth:`return_part`, of a part that is not on record yet."""

        def write(connection: Connection) -> None:
            if connection.execute(SQL["lock"], part._asdict()).fetchone():
                connection.execute(SQL["foresee"], part._asdict())

        self._database.run(write)
        return self.return_part(part, state, result)


def waiting(rows: Sequence[Row]) -> Waiting | None:
    """What a statement that returned a part says of its chord."""
    if not rows or rows[0]["live"] is None:
        return None
    row = rows[0]
    return Waiting(row["live"], row["counted_here"], row["unforeseen"], row.get("ready"))


def _opener() -> str:
    """Who sends a chord: the task that runs here, which if it is delivered twice sends it twice; else this one call."""
    task = get_current_worker_task()
    return str(task.request.id if task is not None else uuid4())


def _task_ids(header: Sequence[Any]) -> tuple[str, ...]:
    return tuple(task_id for result in header for task_id in _leaves(result))


def _structure(header: Sequence[Any]) -> Jsonb | None:
    nested = any(isinstance(result, GroupResult) for result in header)
    return Jsonb([_shape(result) for result in header]) if nested else None


def _leaves(result: Any) -> Iterator[str]:
    if isinstance(result, GroupResult):
        for child in result.results:
            yield from _leaves(child)
    else:
        yield str(result.id)


def _shape(result: Any) -> Any:
    """A task's id, or a list of shapes for a group."""
    return [_shape(child) for child in result.results] if isinstance(result, GroupResult) else str(result.id)
