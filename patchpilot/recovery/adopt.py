"""Adopting chords: those that Celery's own Redis backend has begun are taken over, with all that is left of them.

What is found is judged, purely; what can be taken over is, in this order: its messages that are still queued get an id
of ours, which changes nothing for whoever takes them; the chord, its parts and these messages are written down in one
transaction; then Celery's own count is stopped, what returned meanwhile is taken over too, and its keys go. Whoever
dies on the way leaves what the next one finishes. Two at once write one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from celery import Celery
from celery.canvas import maybe_signature
from psycopg import DataError
from psycopg.types.json import Jsonb

from patchpilot.backend.config import MESSAGE_ID
from patchpilot.backend.message import attempt_of, moment
from patchpilot.backend.routes import task_names
from patchpilot.backend.storing import store
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.queries import queries
from patchpilot.recovery.stock import FLAW, UNREADABLE, Reader, Returned, Stock, leaves, names, raw_body_of
from patchpilot.valkey.broker import Broker, Delivery
from patchpilot.valkey.keys import ChordKeys
from patchpilot.workers.application import backend_of

SQL = queries("adopt")
CHORDS = queries("chords")

NOT_KEPT = frozenset({"delivery_tag", "delivery_info", "body_encoding"})
"""Properties of a message that its next sending makes anew."""


@dataclass(frozen=True)
class Part:
    """One part of a chord that is to be adopted."""

    position: int
    task_id: str
    returned: Returned | None


@dataclass(frozen=True)
class Verdict:
    """Whether a chord can be adopted, and why not."""

    group_id: str
    callback: str | None
    returned: int
    total: int | None
    reason: str | None = None
    """Why it is not adopted; None if it is."""
    parts: tuple[Part, ...] = ()
    unknown: int = 0
    """Parts of which nothing is known but that there are such: their tasks run, or are lost."""
    adopted: bool = False
    """Whether this pass has done it."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can express it."""
        return {
            "group_id": self.group_id, "callback": self.callback, "returned": self.returned, "total": self.total,
            "running_or_lost": self.unknown, "adopted": self.adopted, "reason": self.reason,
        }  # fmt: skip


@dataclass
class Found:
    """All that was found: the chords that are on no record, and those that an adoption was cut short on."""

    stocks: dict[str, Stock] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)


def judge(stock: Stock) -> Verdict:
    """Decide what becomes of a chord. Pure."""
    callback = str(stock.callback.get("task")) if stock.callback else None
    total = None if stock.count.size is None else stock.total
    known = {part.task_id for part in stock.returned} | stock.pending.keys()
    reasons = (
        (stock.flaw is not None, stock.flaw),
        (stock.count.claimed, "a worker dispatches its callback, or has done so"),
        (total is None, "its size is not in Valkey: it is still being sent, or its size was lost"),
        (len(stock.returned) == total, "all its parts have returned: it is complete, and Celery's own affair"),
        (callback is None, "no message of its header is left: nothing tells what its callback is"),
        (len(known) > (total or 0), f"it has more parts than its size says: {len(known)} of {total}"),
    )
    for applies, reason in reasons:
        if applies:
            return Verdict(stock.group_id, callback, len(stock.returned), total, reason)
    parts = _in_order(stock)
    return Verdict(stock.group_id, callback, len(stock.returned), total, parts=parts, unknown=(total or 0) - len(parts))


def _in_order(stock: Stock) -> tuple[Part, ...]:
    """The parts that are known, each in its place in the header."""
    returned = {part.task_id: part for part in stock.returned}
    if stock.order is not None:
        return tuple(Part(place, task_id, returned.get(task_id)) for place, task_id in enumerate(leaves(stock.order)))
    places: dict[int, str] = {}
    late: list[str] = []
    indices = {task_id: part.place for task_id, part in stock.pending.items()}
    indices |= {task_id: part.place for task_id, part in returned.items()}
    for task_id in (*returned, *(it for it in stock.pending if it not in returned)):
        index = indices.get(task_id)
        if index is None or index in places:
            late.append(task_id)
        else:
            places[index] = task_id
    # What was added to it comes last.
    behind = max((*places, stock.total - 1)) + 1
    places.update({behind + number: task_id for number, task_id in enumerate(late)})
    return tuple(Part(place, task_id, returned.get(task_id)) for place, task_id in sorted(places.items()))


class Adoption:
    """Adopts on one site.

    :param app: the stand-in for the application.
    :param keys: where Celery's own backend counts.
    :param serializers: that results may be encoded with; where nothing tells, the first one.
    :param known: that which they are encoded with, if that is known.
    """

    def __init__(
        self, database: Database, broker: Broker, keys: ChordKeys, app: Celery, serializers: Iterable[str],
        known: str = "",
    ) -> None:  # fmt: skip
        self._database = database
        self._broker = broker
        self._keys = keys
        self._app = app
        self._known = known
        self._serializers = names(serializers)
        self._reader = Reader(app, serializers)

    def look(self) -> Found:
        """Find the chords that are under way in Celery's own backend.

        :raises Transient: PostgreSQL, the broker or the results' server cannot be reached.
        """
        found = Found()
        for delivery in self._broker.messages(self._broker.declared()):
            for number, part in enumerate(self._reader.parts_of(delivery.message)):
                stock = found.stocks.setdefault(part.group_id, Stock(part.group_id))
                stock.pending[part.task_id] = part
                stock.queue = stock.queue or delivery.queue
                stock.content_type = stock.content_type or delivery.message["content-type"]
                if number == 0:  # the others are parts that a chord within the header brings
                    stock.deliveries.append(delivery)
        for page in self._keys.pages():
            for keys in page:
                found.stocks.setdefault(keys.group_id, Stock(keys.group_id))
        on_record = {
            row["group_id"]: row["adopted"]
            for row in self._database.fetch(SQL["of_these"], {"group_ids": sorted(found.stocks)})
        }
        found.unfinished = sorted(group_id for group_id, adopted in on_record.items() if adopted)
        found.stocks = {key: stock for key, stock in found.stocks.items() if key not in on_record}
        counts = {key: self._keys.count(key) for key in found.stocks}
        found.stocks = {key: stock for key, stock in found.stocks.items() if stock.pending or not counts[key].over}
        for stock in found.stocks.values():
            self._reader.read(stock, counts[stock.group_id])
            if stock.missing:
                self._reader.end(stock, self._keys.results(stock.missing))
        return found

    def adopt(self, found: Found, *, unacked: bool) -> list[Verdict]:
        """Take over what can be.

        :param unacked: also messages that are unacknowledged: nobody who could have taken them lives.
        :raises Transient: a server went away. What was done stays done; call again.
        """
        verdicts = [
            Verdict(group_id, None, 0, None, reason)
            for group_id in found.unfinished
            if (reason := self._take_the_rest(group_id)) is not None
        ]
        for stock in found.stocks.values():
            verdict = judge(stock)
            if verdict.reason is None:
                verdict = self._take(stock, verdict, unacked)
            verdicts.append(verdict)
        return verdicts

    def _take(self, stock: Stock, verdict: Verdict, unacked: bool) -> Verdict:
        try:
            done = self._write_down(stock, verdict, unacked)
        except (*UNREADABLE, DataError) as error:
            return replace(verdict, reason=f"it cannot be written down: {' '.join(str(error).split())}")
        reason = self._take_the_rest(stock.group_id) if done else "somebody else has adopted it"
        return replace(verdict, adopted=reason is None, reason=reason)

    def _write_down(self, stock: Stock, verdict: Verdict, unacked: bool) -> bool:
        """Write down a chord, its parts, and its messages that are still where they were found.

        :param unacked: see :meth:`adopt`.
        :returns: whether nobody else had.
        """
        since = self._database.fetch(SQL["now"])[0]["now"]
        chord = self._chord(stock, verdict)
        taken = [it for it in stock.deliveries if it.tag is None or unacked]
        # By message: one that others pushed down or took while the broker was read was found more than once.
        rows = list({row["message_id"]: row for it in taken for row in self._marked(stock, it)}.values())
        return self._database.run(lambda connection: self._write(connection, chord, verdict.parts, rows, since))

    def _marked(self, stock: Stock, delivery: Delivery) -> list[dict[str, Any]]:
        """Give a message an id of ours, where it is; its row for the outbox. None, if it is there no more."""
        headers = delivery.message["headers"]
        properties = delivery.message["properties"]
        message_id = headers.get(MESSAGE_ID) or str(uuid5(NAMESPACE_OID, f"patchpilot {properties['delivery_tag']}"))
        headers = {**headers, MESSAGE_ID: message_id}
        if not self._broker.replace(delivery, {**delivery.message, "headers": headers}):
            return []
        to = properties.get("delivery_info") or {}
        return [{
            "message_id": message_id, "task_id": str(headers["id"]), "task_name": str(headers["task"]),
            "group_id": stock.group_id, "callback_of": None, "scope": message_id, "attempt": attempt_of(headers),
            "exchange": to.get("exchange") or "", "routing_key": to.get("routing_key") or "",
            "queue": delivery.queue, "headers": json.dumps(headers).encode(),
            "properties": json.dumps({key: it for key, it in properties.items() if key not in NOT_KEPT}).encode(),
            "body": raw_body_of(delivery.message), "content_type": delivery.message["content-type"],
            "content_encoding": delivery.message["content-encoding"], "eta": moment(headers.get("eta")),
            "expires": moment(headers.get("expires")), "broker": self._broker.name,
        }]  # fmt: skip

    def _write(
        self,
        connection: Connection,
        chord: dict[str, Any],
        parts: Sequence[Part],
        rows: list[dict[str, Any]],
        since: Any,
    ) -> bool:
        if not connection.execute(SQL["adopt"], {**chord, "since": since}).fetchone():
            return False
        connection.execute(
            SQL["add_parts"],
            {
                "group_id": chord["group_id"],
                "positions": [part.position for part in parts],
                "task_ids": [part.task_id for part in parts],
                "states": [part.returned.state if part.returned else None for part in parts],
                "payloads": [part.returned.payload if part.returned else None for part in parts],
            },
        )
        if rows:
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            connection.execute(queries("outbox")["record"], {**columns, "shadow": False})
            connection.execute(SQL["backdate"], {"message_ids": columns["message_id"], "since": since})
        return True

    def _chord(self, stock: Stock, verdict: Verdict) -> dict[str, Any]:
        callback = maybe_signature(stock.callback, app=self._app)
        stored = store(callback, self._app.conf.task_serializer)
        # How the application routes it is not known here; its workers do. Should recovery have to send the callback,
        # it goes where the header went, unless the callback says where.
        routes = {name: {"queue": stock.queue} for name in task_names(self._app, callback)} if stock.queue else {}
        return {
            "group_id": stock.group_id,
            "callback_id": str(callback.options.get("task_id") or stock.group_id),
            "callback_name": callback.name,
            "callback": stored.payload,
            "callback_type": stored.content_type,
            "callback_encoding": stored.encoding,
            "unrecoverable": stored.flaw if stored.payload is None else None,
            "routes": Jsonb(routes),
            "result_serializer": self._serializer_of(stock),
            "structure": Jsonb(stock.order) if stock.order is not None else None,
            # Parts that are not known are foreseen when they return, as those of a generator are.
            "size": verdict.total if verdict.unknown else 0,
            "broker": self._broker.name,
        }

    def _serializer_of(self, stock: Stock) -> str:
        """That of its results; a guess until a part has returned: recovery looks at what has by then."""
        told = [part.serializer for part in stock.returned]
        guesses = names((self._known, stock.content_type or ""))
        return next(each for each in (*told, *guesses, *self._serializers) if each in self._serializers)

    def _take_the_rest(self, group_id: str) -> str | None:
        """Stop Celery's own count, take over what it has counted by now, and remove its keys.

        :returns: why the chord is not ours, or not whole; None if it is. If somebody dispatches it, it is given back.
        """
        while True:
            count = self._keys.stop(group_id)
            if count.claimed:
                self._database.execute(SQL["give_back"], {"group_id": group_id})
                return "a worker began to dispatch its callback"
            try:
                returned = [self._reader.returned(raw, index) for raw, index in count.parts]
            except UNREADABLE:
                return f"it is on record, but a part returned meanwhile: {FLAW}, and adopt again"
            for part in returned:
                self._return(group_id, part)
            self._database.execute(SQL["parts_ended"], {"group_id": group_id})
            if self._keys.drop(group_id, len(count.parts)):
                break
        # Whoever returned the last part did so where nobody looks any more. What fails here is found by recovery.
        backend_of(self._app).finish_chords([group_id])
        return None

    def _return(self, group_id: str, part: Returned) -> None:
        row = {**part._asdict(), "group_id": group_id, "position": part.place or 0}

        def write(connection: Connection) -> None:
            if connection.execute(CHORDS["lock"], row).fetchone():
                connection.execute(CHORDS["foresee"], row)
                connection.execute(CHORDS["return_part"], row)

        self._database.run(write)
