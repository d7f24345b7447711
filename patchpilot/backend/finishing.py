"""Finishing chords: the way that the worker of a last part and recovery both go, for one chord or for many.

Claim the rows, join the results, and then in one transaction write the callbacks' messages down and mark the rows. Only
after that commit they are pushed. The claim is a lease, so that nobody's death strands a chord; the row is one, so that
a chord is dispatched once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, states
from celery.canvas import Signature, group, maybe_signature
from celery.exceptions import ChordError
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError, OperationalError
from kombu.serialization import loads, prepare_accept_content
from redis.exceptions import RedisError

from patchpilot.backend.config import Config
from patchpilot.backend.deferred import Results, deferred, store
from patchpilot.backend.dispatch import Dispatch, callback_of
from patchpilot.backend.errbacks import are_called_elsewhere
from patchpilot.backend.outbox import Outbox
from patchpilot.backend.routes import recorded_routes
from patchpilot.clock import SYSTEM, Backoff
from patchpilot.errors import NeedsOperator, PatchpilotError
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("chords")

_PASSING = (PatchpilotError, OperationalError, RedisError, OSError, SoftTimeLimitExceeded)
"""What keeps a callback from being published for a while, and says nothing about it."""

Note = Callable[[Connection, Collection[str]], None]
"""Writes down which chords were finished, in the transaction that marks them."""


class ResultCodec(Protocol):
    """The part of a Celery backend that encodes and decodes what tasks return."""

    accept: Any
    serializer: str

    def encode(self, data: Any) -> Any: ...
    def decode(self, payload: Any) -> Any: ...
    def encode_result(self, result: Any, state: str) -> Any: ...
    def exception_to_python(self, exc: Any) -> Any: ...
    def chord_error_from_stack(self, callback: Signature, exc: Exception) -> Any: ...
    def leave_parts(self, group_id: str, parts: Sequence[Row]) -> bool: ...
    def notify(self, task_id: str, payload: Any) -> bool: ...


@dataclass(frozen=True)
class Ending:
    """How a chord ends: the state it is in then, what is published, and what is stored as its callback's result."""

    state: str
    dispatch: Dispatch
    results: Results = field(default_factory=dict)
    parts: Sequence[Row] = ()
    """What is left in Valkey, as Celery leaves it, of a chord that failed."""


@dataclass
class Finished:
    """What became of the chords that somebody set out to finish. Those that were not ours to finish are in neither."""

    done: set[str] = field(default_factory=set)
    counted_in_valkey: set[str] = field(default_factory=set)
    """Of those that are done: they have keys in Valkey."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """Why a chord could not be finished. The next one may try."""


class Finisher:
    """Finishes the chords of one application, as one process sees them."""

    def __init__(self, app: Celery, database: Database, codec: ResultCodec, outbox: Outbox, config: Config) -> None:
        self._app = app
        self._database = database
        self._codec = codec
        self._outbox = outbox
        self._config = config

    def finish(self, group_ids: Sequence[str], note: Note | None = None, spare: Any = None) -> Finished:
        """Finish those of the chords that are complete and that nobody else is at. A constant number of statements.

        :param note: called in the transaction that marks the chords, with those that are.
        :param spare: the callback as a header task's message has it, for a chord whose callback could not be stored.
        :raises PatchpilotError: PostgreSQL went away.
        """
        token = str(uuid4())
        rows = {row["group_id"]: row for row in self._claim(group_ids, token)}
        if not rows:
            return Finished()
        finished = Finished()
        try:
            endings = self._endings(rows, spare, finished)
            finished.done = self._outbox.deliver(
                {group_id: ending.dispatch for group_id, ending in endings.items()},
                lambda connection: self._mark(connection, endings, token, note),
            )
        finally:
            # Whatever it was, the next one may try; a process that dies here leaves leases that end.
            left = sorted(set(rows) - finished.done)
            if left:
                self._database.execute(SQL["release"], {"group_ids": left, "token": token})
        self._tell_valkey({group_id: endings[group_id] for group_id in sorted(finished.done)})
        finished.counted_in_valkey = {each for each in finished.done if rows[each]["counting"] == "valkey"}
        return finished

    def _tell_valkey(self, endings: Mapping[str, Ending]) -> None:
        """What Celery leaves in Valkey of chords that failed. Best effort, and nothing depends on it: after the commit,
        and not one by one if Valkey is away, for each would have to wait for it."""
        for group_id, ending in endings.items():
            if ending.parts and not self._codec.leave_parts(group_id, ending.parts):
                return
            if not all(self._codec.notify(task_id, row["meta"]) for task_id, row in ending.results.items()):
                return

    def _claim(self, group_ids: Sequence[str], token: str) -> list[Row]:
        """Take the chords that are complete and free. The claims are committed when this returns.

        Rows that are locked for a moment are skipped, so that nobody waits for a claimer; but if nobody claims them
        then, they are ours to take: another last part will not come.
        """
        asked = {"token": token, "lease": self._config.claim_lease}
        patience = Backoff(SYSTEM, self._config.claim_lease.total_seconds())
        claimed: list[Row] = []
        ready: list[str] = list(group_ids)
        while ready := [row["group_id"] for row in self._database.fetch(SQL["ready"], {"group_ids": ready})]:
            rows = self._database.fetch(SQL["claim"], {**asked, "group_ids": ready})
            claimed += rows
            ready = sorted({*ready} - {row["group_id"] for row in rows})
            if not ready or not patience.pause():
                break
        return claimed

    def _endings(self, rows: Mapping[str, Row], spare: Any, finished: Finished) -> dict[str, Ending]:
        parts: defaultdict[str, list[Row]] = defaultdict(list)
        transport = self._app.conf.get("result_backend_transport_options") or {}
        ordered = transport.get("result_chord_ordered", True)
        for part in self._database.fetch(SQL["join"], {"group_ids": sorted(rows), "ordered": ordered}):
            parts[part["group_id"]].append(part)
        endings = {}
        for group_id, row in rows.items():
            try:
                endings[group_id] = self._ending(row, parts[group_id], spare)
            except Exception as error:  # noqa: BLE001 - one that cannot be finished must not keep the others from it
                finished.failed[group_id] = error
        return endings

    def _ending(self, row: Row, parts: Sequence[Row], spare: Any) -> Ending:
        """What is published for a complete chord: its callback, or the error in its place. Nothing leaves yet."""
        callback = self._callback(row, spare)
        with recorded_routes(row["routes"]):
            try:
                results = self._results(row, parts)
            except ChordError as error:
                return self._failure(row["group_id"], parts, callback, error)
            try:
                with callback_of(row["group_id"]), self._outbox.collect() as dispatch:
                    callback.delay(results)
            except Exception as error:
                if isinstance(error, _PASSING) or (are_called_elsewhere() and not isinstance(error, EncodeError)):
                    raise  # the next one may try: a worker knows more than recovery, which has none of the code
                return self._failure(row["group_id"], parts, callback, ChordError(f"Callback error: {error!r}"))
            return Ending("dispatched", dispatch)

    def _failure(self, group_id: str, parts: Sequence[Row], callback: Signature, error: ChordError) -> Ending:
        logger.error("Chord %s failed: %s", group_id, error)
        # Of a group Celery revokes the tasks as well, and their results must be there before a worker hears of that.
        later = not isinstance(callback, group)
        with callback_of(group_id), self._outbox.collect() as dispatch, deferred(wanted=later) as results:
            self._codec.chord_error_from_stack(callback, error)
        return Ending("failed", dispatch, results, parts)

    def _callback(self, row: Row, spare: Any) -> Signature:
        if row["callback"] is not None:
            accept = prepare_accept_content(self._app.conf.accept_content)
            callback = loads(row["callback"], row["callback_type"], row["callback_encoding"], accept=accept)
        elif spare is not None:
            callback = spare
        else:
            raise NeedsOperator(f"chord {row['group_id']} cannot be recovered: {row['unrecoverable']}")
        return maybe_signature(callback, app=self._app)

    def _results(self, row: Row, parts: Sequence[Row]) -> list[Any]:
        """The header's results in order, nested as the header was.

        :raises ChordError: if a part failed.
        """
        values = [self._value(part) for part in parts]
        if row["structure"] is None:
            return values
        by_id = dict(zip((part["task_id"] for part in parts), values, strict=True))
        return [_filled(shape, by_id) for shape in row["structure"]]

    def _value(self, part: Row) -> Any:
        value = self._codec.decode(part["payload"])
        if part["state"] in states.EXCEPTION_STATES:
            value = self._codec.exception_to_python(value)
        if part["state"] in states.PROPAGATE_STATES:
            error = ChordError(f"Dependency {part['task_id']} raised {value!r}")
            error.__cause__ = value if isinstance(value, Exception) else None
            raise error
        return value

    @staticmethod
    def _mark(connection: Connection, endings: Mapping[str, Ending], token: str, note: Note | None) -> Iterable[str]:
        """The chords are over, those whose claim still holds: a claim may have been held for longer than its lease."""
        params = {"group_ids": [*endings], "states": [each.state for each in endings.values()], "token": token}
        ours = [row["group_id"] for row in connection.execute(SQL["finish"], params).fetchall()]
        store(connection, [endings[group_id].results for group_id in ours])
        if note is not None and ours:
            note(connection, ours)
        return ours


def _filled(shape: Any, values: dict[str, Any]) -> Any:
    return [_filled(child, values) for child in shape] if isinstance(shape, list) else values[shape]
