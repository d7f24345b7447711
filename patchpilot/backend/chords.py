"""Chords: opened in PostgreSQL before the header is published, counted in Valkey, finished through one row.

Whoever finds a chord complete, the worker of its last part or recovery, goes the same way: claim the row, join the
results, publish the callback, mark the row. The claim is a lease, so that nobody's death strands a chord; the row is
one, so that nobody dispatches twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast
from uuid import uuid4

from celery import Celery, states
from celery.canvas import Signature, maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, loads, prepare_accept_content
from kombu.utils.encoding import ensure_bytes
from psycopg.types.json import Jsonb

from patchpilot.backend.outbox import callback_of
from patchpilot.backend.routes import recorded_routes, routes
from patchpilot.clock import SYSTEM, Backoff
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("chords")


class ResultCodec(Protocol):
    """The part of a Celery backend that encodes and decodes what tasks return."""

    accept: Any
    serializer: str

    def encode(self, data: Any) -> Any: ...
    def decode(self, payload: Any) -> Any: ...
    def encode_result(self, result: Any, state: str) -> Any: ...
    def exception_to_python(self, exc: Any) -> Any: ...
    def chord_error_from_stack(self, callback: Signature, exc: Exception) -> Any: ...


Note = Callable[[Connection], None]


@dataclass(frozen=True)
class Waiting:
    """How a chord stands after a part returned."""

    live: bool
    """It still waits for its callback."""
    distrusted: bool
    """Its count in Valkey may have lost parts, so ask PostgreSQL whether it is complete."""


@dataclass(frozen=True)
class Claim:
    """A complete chord that this process alone may finish, until its lease is over."""

    group_id: str
    callback_id: str
    callback: Signature
    routes: dict[str, Any]
    structure: Any
    interrupted: bool
    """Somebody claimed it before and did not get to the end."""


class Chords:
    """The chords of one application, as one process sees them.

    :param lease: how long a claim lasts.
    """

    def __init__(self, app: Celery, database: Database, codec: ResultCodec, lease: timedelta) -> None:
        self._app = app
        self._database = database
        self._codec = codec
        self._lease = lease

    def open(self, group_id: str, header: Sequence[Any], callback: Signature) -> None:
        """Record a chord: which tasks belong to it, what it calls, and how that is published.

        :param header: the frozen results of the header's tasks.
        :raises PatchpilotError: if PostgreSQL cannot take it. The chord must not be published then.
        """
        content_type, encoding, payload = dumps(callback, serializer=self._app.conf.task_serializer)
        nested = any(isinstance(result, GroupResult) for result in header)
        row = {
            "group_id": group_id,
            "callback_id": callback.options.get("task_id") or group_id,
            "callback_name": callback.name,
            "callback": ensure_bytes(payload),
            "callback_type": content_type,
            "callback_encoding": encoding,
            "routes": Jsonb(routes(self._app, callback)),
            "result_serializer": self._codec.serializer,
            "structure": Jsonb([_shape(result) for result in header]) if nested else None,
        }
        task_ids = [task_id for result in header for task_id in _leaves(result)]

        def write(connection: Connection) -> None:
            if connection.execute(SQL["open"], row).fetchone():
                connection.execute(SQL["clear_parts"], row)
                connection.execute(SQL["add_parts"], {"group_id": group_id, "task_ids": task_ids})

        self._database.run(write)

    def grow(self, group_id: str, task_id: str) -> None:
        """Add a task to a chord that is under way."""

        def write(connection: Connection) -> None:
            if connection.execute(SQL["lock"], {"group_id": group_id}).fetchone():
                connection.execute(SQL["grow"], {"group_id": group_id, "task_id": task_id})

        self._database.run(write)

    def return_part(self, group_id: str, task_id: str, state: str, result: Any) -> Waiting | None:
        """Record what a header task returned. The first return stands.

        :returns: how the chord stands; None if it is not in our record.
        """
        payload = ensure_bytes(self._codec.encode(self._codec.encode_result(result, state)))
        rows = self._database.fetch(
            SQL["return_part"], {"group_id": group_id, "task_id": task_id, "state": state, "payload": payload}
        )
        return Waiting(rows[0]["live"], rows[0]["distrusted"]) if rows else None

    def finish(self, group_id: str, note: Note | None = None) -> bool:
        """Finish the chord if it is complete and nobody else is at it.

        :param note: what to write down in the transaction that marks the chord as finished.
        :returns: whether this process finished it.
        """
        row = self._claim(group_id)
        if row is None:
            return False
        try:
            state = self._settle(self._claimed(row))
        except Exception:
            # Whatever it was, the next one may try; a process that dies here leaves a lease that ends.
            self._database.execute(SQL["release"], row)
            raise
        self._mark(row, state, note)
        return True

    def _claim(self, group_id: str) -> Row | None:
        """Take the chord, if it is complete and free. The claim is committed when this returns.

        A row that is locked for a moment is skipped, so that nobody waits for a claimer; but if nobody claims it then,
        it is ours to take: another last part will not come.
        """
        asked = {"group_id": group_id, "token": str(uuid4()), "lease": self._lease}
        patience = Backoff(SYSTEM, self._lease.total_seconds())
        while True:
            for row in self._database.fetch(SQL["claim"], asked):
                return {**row, "token": asked["token"]}
            if not self._database.fetch(SQL["is_free"], asked) or not patience.pause():
                return None

    def _claimed(self, row: Row) -> Claim:
        accept = prepare_accept_content(self._app.conf.accept_content)
        callback = loads(row["callback"], row["callback_type"], row["callback_encoding"], accept=accept)
        return Claim(
            group_id=row["group_id"],
            callback_id=row["callback_id"],
            callback=maybe_signature(callback, app=self._app),
            routes=row["routes"],
            structure=row["structure"],
            interrupted=row["claims"] > 1,
        )

    def _settle(self, claim: Claim) -> str:
        """Dispatch the callback, or the error in its place. Returns the state the chord is in then."""
        if claim.interrupted and self._already_dispatched(claim):
            return "dispatched"
        try:
            self._publish(claim, self._join(claim))
        except ChordError as error:
            return self._fail(claim, error)
        except EncodeError as error:
            return self._fail(claim, ChordError(f"Callback error: {error!r}"))
        return "dispatched"

    def _already_dispatched(self, claim: Claim) -> bool:
        rows = self._database.fetch(
            SQL["already_dispatched"], {"group_id": claim.group_id, "callback_id": claim.callback_id}
        )
        return bool(rows[0]["yes"])

    def _join(self, claim: Claim) -> list[Any]:
        """The header's results in order, nested as the header was.

        :raises ChordError: if a part failed.
        """
        transport = self._app.conf.get("result_backend_transport_options") or {}
        rows = self._database.fetch(
            SQL["join"], {"group_id": claim.group_id, "ordered": transport.get("result_chord_ordered", True)}
        )
        values = [self._value(row) for row in rows]
        if claim.structure is None:
            return values
        by_id = dict(zip((row["task_id"] for row in rows), values, strict=True))
        return [_filled(shape, by_id) for shape in claim.structure]

    def _value(self, row: Row) -> Any:
        value = self._codec.decode(row["payload"])
        if row["state"] in states.EXCEPTION_STATES:
            value = self._codec.exception_to_python(value)
        if row["state"] in states.PROPAGATE_STATES:
            error = ChordError(f"Dependency {row['task_id']} raised {value!r}")
            error.__cause__ = value if isinstance(value, Exception) else None
            raise error
        return value

    def _publish(self, claim: Claim, results: list[Any]) -> None:
        publish = getattr(self._app.amqp, "_retry_publish", None)  # since Celery 5.7: waits between its tries
        with callback_of(claim.group_id), recorded_routes(claim.routes):
            try:
                if publish is not None:
                    publish(claim.callback.delay, results)
                else:
                    claim.callback.delay(results)
            except EncodeError:
                raise
            except Exception as error:
                if not self._already_dispatched(claim):
                    raise
                # The message is in the outbox, and that is what dispatched means: recovery pushes it.
                logger.warning("Callback of chord %s is left to recovery: %r", claim.group_id, error)

    def _fail(self, claim: Claim, error: ChordError) -> str:
        logger.error("Chord %s failed: %s", claim.group_id, error)
        with recorded_routes(claim.routes):
            self._codec.chord_error_from_stack(claim.callback, error)
        return "failed"

    def _mark(self, row: Row, state: str, note: Note | None) -> None:
        def write(connection: Connection) -> None:
            marked = connection.execute(SQL["finish"], {**row, "state": state}).rowcount
            if marked and note is not None:
                note(connection)

        self._database.run(write)


def _leaves(result: Any) -> Iterator[str]:
    if isinstance(result, GroupResult):
        for child in result.results:
            yield from _leaves(child)
    else:
        yield cast("str", result.id)


def _shape(result: Any) -> Any:
    """A task's id, or a list of shapes for a group."""
    return [_shape(child) for child in result.results] if isinstance(result, GroupResult) else result.id


def _filled(shape: Any, values: dict[str, Any]) -> Any:
    return [_filled(child, values) for child in shape] if isinstance(shape, list) else values[shape]
