"""Chords: opened in PostgreSQL before the header is published, and what their parts return.

How a complete one is finished is in :mod:`patchpilot.backend.finishing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from celery import Celery
from celery.canvas import Signature
from celery.result import GroupResult
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import ensure_bytes
from psycopg.types.json import Jsonb

from patchpilot.backend.config import Config
from patchpilot.backend.finishing import ResultCodec
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.routes import routes
from patchpilot.backend.storing import Stored, serializer_of, store
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("chords")


Work = Callable[[Connection], None]


@dataclass(frozen=True)
class Waiting:
    """How a chord stands after a part returned."""

    live: bool
    """It still waits for its callback."""
    counted_here: bool
    """PostgreSQL is to be asked whether it is complete: it counts, or the count in Valkey may have lost parts."""


@dataclass(frozen=True)
class Opening:
    """A chord that is about to be published."""

    row: dict[str, Any]
    task_ids: tuple[str, ...]

    @property
    def group_id(self) -> str:
        return str(self.row["group_id"])

    def write(self, connection: Connection, publish_error: str | None = None) -> None:
        """Write it and its members down, unless the same chord is on record already."""
        if connection.execute(SQL["open"], {**self.row, "publish_error": publish_error}).fetchone():
            connection.execute(SQL["clear_parts"], self.row)
            connection.execute(SQL["add_parts"], {"group_id": self.group_id, "task_ids": list(self.task_ids)})


class Chords:
    """The chords of one application, as one process sees them."""

    def __init__(self, app: Celery, database: Database, codec: ResultCodec, outbox: Outbox, config: Config) -> None:
        self._app = app
        self._database = database
        self._codec = codec
        self._outbox = outbox
        self._config = config
        self._warned: set[str] = set()

    def open(self, group_id: str, header: Sequence[Any], callback: Signature, *, shadow: bool = False) -> None:
        """Record a chord: which tasks belong to it, what it calls, and how that is published.

        :param header: the frozen results of the header's tasks.
        :raises EncodeError: if the callback cannot be stored unchanged, and the configuration is strict.
        """
        of_tasks = routes(self._app, callback)
        stored = store(callback, serializer_of(of_tasks, callback, self._app.conf.task_serializer))
        self._check(callback.name, group_id, stored)
        nested = any(isinstance(result, GroupResult) for result in header)
        row = {
            "group_id": group_id,
            "callback_id": callback.options.get("task_id") or group_id,
            "callback_name": callback.name,
            "callback": stored.payload,
            "callback_type": stored.content_type,
            "callback_encoding": stored.encoding,
            "unrecoverable": stored.flaw if stored.payload is None else None,
            "routes": Jsonb(of_tasks),
            "result_serializer": self._codec.serializer,
            "structure": Jsonb([_shape(result) for result in header]) if nested else None,
            "counting": str(self._config.counting),
            "shadow": shadow,
        }
        self._outbox.open(Opening(row, tuple(task_id for result in header for task_id in _leaves(result))))

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

    def grow(self, group_id: str, task_id: str) -> None:
        """Add a task to a chord that is under way."""
        self._database.run(self.growing(group_id, task_id))

    @staticmethod
    def growing(group_id: str, task_id: str) -> Work:
        """What :meth:`grow` writes."""

        def write(connection: Connection) -> None:
            if connection.execute(SQL["lock"], {"group_id": group_id}).fetchone():
                connection.execute(SQL["grow"], {"group_id": group_id, "task_id": task_id})

        return write

    def return_part(self, group_id: str, task_id: str, state: str, result: Any) -> Waiting | None:
        """Record what a header task returned. The first return stands.

        :returns: how the chord stands; None if it is not in our record.
        """
        payload = ensure_bytes(self._codec.encode(self._codec.encode_result(result, state)))
        rows = self._database.fetch(
            SQL["return_part"], {"group_id": group_id, "task_id": task_id, "state": state, "payload": payload}
        )
        return waiting(rows)


def waiting(rows: Sequence[Row]) -> Waiting | None:
    """What a statement that returned a part says of its chord."""
    return Waiting(rows[0]["live"], rows[0]["counted_here"]) if rows else None


def _leaves(result: Any) -> Iterator[str]:
    if isinstance(result, GroupResult):
        for child in result.results:
            yield from _leaves(child)
    else:
        yield cast("str", result.id)


def _shape(result: Any) -> Any:
    """A task's id, or a list of shapes for a group."""
    return [_shape(child) for child in result.results] if isinstance(result, GroupResult) else result.id
