"""Chords: opened in PostgreSQL before the header is published, and finished through one row.

Whoever finds a chord complete, the worker of its last part or recovery, goes the same way: claim the row, join the
results, and then in one transaction write the callback's messages down and mark the row. Only after that commit they
are pushed. The claim is a lease, so that nobody's death strands a chord; the row is one, so that it is dispatched once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from celery import Celery, states
from celery.canvas import Signature, maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.serialization import loads, prepare_accept_content
from kombu.utils.encoding import ensure_bytes
from psycopg.types.json import Jsonb

from patchpilot.backend.config import Config
from patchpilot.backend.outbox import Outbox, callback_of
from patchpilot.backend.routes import recorded_routes, routes
from patchpilot.backend.storing import Stored, serializer_of, store
from patchpilot.clock import SYSTEM, Backoff
from patchpilot.errors import NeedsOperator, Unsafe
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


class ClaimLost(Unsafe):
    """Somebody else has taken the chord: the claim was held for longer than its lease."""


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


@dataclass(frozen=True)
class Claim:
    """A complete chord that this process alone may finish, until its lease is over."""

    group_id: str
    token: str
    callback: Signature
    routes: dict[str, Any]
    structure: Any
    counting: str


class Chords:
    """The chords of one application, as one process sees them."""

    def __init__(self, app: Celery, database: Database, codec: ResultCodec, outbox: Outbox, config: Config) -> None:
        self._app = app
        self._database = database
        self._codec = codec
        self._outbox = outbox
        self._config = config
        self._warned: set[str] = set()

    def open(
        self, group_id: str, header: Sequence[Any], callback: Signature, *, flat: bool = False, shadow: bool = False
    ) -> None:
        """Record a chord: which tasks belong to it, what it calls, and how that is published.

        :param header: the frozen results of the header's tasks.
        :param flat: whether the callback gets the results of a group in the header one by one, not as a list.
        :raises EncodeError: if the callback cannot be stored unchanged, and the configuration is strict.
        """
        of_tasks = routes(self._app, callback)
        stored = store(callback, serializer_of(of_tasks, callback, self._app.conf.task_serializer))
        self._check(callback.name, group_id, stored)
        nested = not flat and any(isinstance(result, GroupResult) for result in header)
        row = {
            "group_id": group_id,
            "callback_id": str(callback.options.get("task_id") or group_id),
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
    def growing(group_id: str, task_id: str) -> Note:
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

    def finish(self, group_id: str, note: Note | None = None, spare: Any = None) -> Claim | None:
        """Finish the chord if it is complete and nobody else is at it.

        :param note: what to write down in the transaction that marks the chord as finished.
        :param spare: the callback as a header task's message has it, for a chord whose callback could not be stored.
        :returns: the claim under which this process finished it; None if it did not.
        :raises NeedsOperator: its callback could not be stored, and there is no spare one.
        """
        row = self._claim(group_id)
        if row is None:
            return None
        try:
            claim = self._claimed(row, spare)
            self._settle(claim, note)
        except ClaimLost as error:
            logger.warning("%s", error)
            return None
        except Exception:
            # Whatever it was, the next one may try; a process that dies here leaves a lease that ends.
            self._database.execute(SQL["release"], row)
            raise
        return claim

    def _claim(self, group_id: str) -> Row | None:
        """Take the chord, if it is complete and free. The claim is committed when this returns.

        A row that is locked for a moment is skipped, so that nobody waits for a claimer; but if nobody claims it then,
        it is ours to take: another last part will not come.
        """
        asked = {"group_id": group_id, "token": str(uuid4()), "lease": self._config.claim_lease}
        patience = Backoff(SYSTEM, self._config.claim_lease.total_seconds())
        while self._database.fetch(SQL["is_ready"], asked):
            for row in self._database.fetch(SQL["claim"], asked):
                return {**row, "token": asked["token"]}
            if not patience.pause():
                break
        return None

    def _claimed(self, row: Row, spare: Any) -> Claim:
        if row["callback"] is not None:
            accept = prepare_accept_content(self._app.conf.accept_content)
            callback = loads(row["callback"], row["callback_type"], row["callback_encoding"], accept=accept)
        elif spare is not None:
            callback = spare
        else:
            raise NeedsOperator(f"chord {row['group_id']} cannot be recovered: {row['unrecoverable']}")
        return Claim(
            group_id=row["group_id"],
            token=row["token"],
            callback=maybe_signature(callback, app=self._app),
            routes=row["routes"],
            structure=row["structure"],
            counting=row["counting"],
        )

    def _settle(self, claim: Claim, note: Note | None) -> None:
        """Dispatch the callback, or the error in its place."""
        try:
            self._dispatch(claim, self._join(claim), note)
        except ChordError as error:
            self._fail(claim, error, note)
        except EncodeError as error:
            self._fail(claim, ChordError(f"Callback error: {error!r}"), note)

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

    def _dispatch(self, claim: Claim, results: list[Any], note: Note | None) -> None:
        with (
            callback_of(claim.group_id),
            recorded_routes(claim.routes),
            self._outbox.together(_finished(claim, "dispatched", note)),
        ):
            claim.callback.delay(results)

    def _fail(self, claim: Claim, error: ChordError, note: Note | None) -> None:
        logger.error("Chord %s failed: %s", claim.group_id, error)
        with recorded_routes(claim.routes), self._outbox.together(_finished(claim, "failed", note)):
            self._codec.chord_error_from_stack(claim.callback, error)


def waiting(rows: Sequence[Row]) -> Waiting | None:
    """What a statement that returned a part says of its chord."""
    return Waiting(rows[0]["live"], rows[0]["counted_here"]) if rows else None


def _finished(claim: Claim, state: str, note: Note | None) -> Note:
    """What is committed together with the messages: the chord is over, provided that the claim still holds."""

    def write(connection: Connection) -> None:
        row = {"group_id": claim.group_id, "token": claim.token, "state": state}
        if not connection.execute(SQL["finish"], row).rowcount:
            raise ClaimLost(f"chord {claim.group_id} was taken over by another process, which finishes it")
        if note is not None:
            note(connection)

    return write


def _leaves(result: Any) -> Iterator[str]:
    if isinstance(result, GroupResult):
        for child in result.results:
            yield from _leaves(child)
    else:
        yield str(result.id)


def _shape(result: Any) -> Any:
    """A task's id, or a list of shapes for a group."""
    return [_shape(child) for child in result.results] if isinstance(result, GroupResult) else str(result.id)


def _filled(shape: Any, values: dict[str, Any]) -> Any:
    return [_filled(child, values) for child in shape] if isinstance(shape, list) else values[shape]
