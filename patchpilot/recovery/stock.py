"""What is left of a chord that Celery's own Redis backend has begun: its keys, and the messages of its header.

Reads only. Each message of a header carries the chord's callback, and the place of the part that it will bring: the
task itself, the end of a chain, or the callback of a chord within, and then that of the chord around it as well.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from celery import Celery, states
from celery.result import GroupResult, result_from_tuple
from kombu.compression import decompress
from kombu.exceptions import DecodeError, KombuError
from kombu.serialization import dumps, loads, prepare_accept_content, registry
from kombu.utils.encoding import ensure_bytes

from patchpilot.valkey.broker import Delivery
from patchpilot.valkey.keys import Count

UNREADABLE = (KombuError, LookupError, TypeError, ValueError, AttributeError)
"""What comes of taking apart what is not as Celery writes it."""

FLAW = "what its parts returned cannot be decoded: add its serialiser to celery.accept_content"

_NOTHING: Mapping[str, Any] = {}


class Returned(NamedTuple):
    """A part that has returned."""

    task_id: str
    state: str
    payload: bytes
    """What it returned, as the record keeps it."""
    place: int | None
    """Its place in the header, as Celery numbers it."""
    serializer: str


class Pending(NamedTuple):
    """A part that a message will bring."""

    group_id: str
    task_id: str
    place: int | None
    """Its place in the header, as Celery numbers it."""
    callback: Mapping[str, Any]


@dataclass
class Stock:
    """All that is known of one chord."""

    group_id: str
    count: Count = field(default_factory=Count)
    returned: list[Returned] = field(default_factory=list)
    pending: dict[str, Pending] = field(default_factory=dict)
    deliveries: list[Delivery] = field(default_factory=list)
    """The messages that bring its parts."""
    order: list[Any] | None = None
    """The header's results as they nest, with task ids at the leaves; None if they do not nest."""
    flaw: str | None = None
    """Why it cannot be read."""
    queue: str | None = None
    """Where messages of its header are."""
    content_type: str | None = None
    """Of these messages."""

    @property
    def callback(self) -> Mapping[str, Any] | None:
        return next((part.callback for part in self.pending.values()), None)

    @property
    def missing(self) -> list[str]:
        """Parts that are known by name, and of which there is neither a message nor a return."""
        known = {part.task_id for part in self.returned} | self.pending.keys()
        return [task_id for task_id in leaves(self.order or ()) if task_id not in known]

    @property
    def total(self) -> int:
        return (self.count.size or 0) + self.count.added


class Reader:
    """Makes sense of what Celery's own backend and its messages hold.

    :param app: a stand-in for the application; it says what may be decoded.
    :param serializers: of results, in the order in which they are tried.
    """

    def __init__(self, app: Celery, serializers: Iterable[str]) -> None:
        self._app = app
        self._accept = prepare_accept_content(app.conf.accept_content)
        self._serializers = names(serializers)

    def parts_of(self, message: Mapping[str, Any]) -> list[Pending]:
        """The parts that a message will bring. None, if it is of no chord or cannot be decoded."""
        headers = message.get("headers") or {}
        if not (headers.get("task") and headers.get("id") and message["properties"].get("delivery_tag")):
            return []
        try:
            body = loads(body_of(message), message["content-type"], message["content-encoding"], accept=self._accept)
            embed = body[2]
            return list(_parts(headers, embed))
        except UNREADABLE:
            return []

    def read(self, stock: Stock, count: Count) -> None:
        """Take in what has been counted of ``stock``."""
        stock.count = count
        if count.garbled:
            stock.flaw = "one of its keys in Valkey holds what Celery does not write there"
            return
        try:
            stock.returned = [self.returned(raw, index) for raw, index in count.parts]
            if count.group is not None:
                saved = result_from_tuple(self._decode(count.group)[0]["result"], app=self._app)
                stock.order = [_shape(child) for child in saved.results]
        except UNREADABLE:
            stock.flaw = FLAW

    def end(self, stock: Stock, metas: Iterable[bytes]) -> None:
        """Take in the results of tasks of ``stock`` that have ended: their parts count, returned or not."""
        try:
            for raw in metas:
                meta, serializer = self._decode(raw)
                if meta["status"] in states.READY_STATES:
                    payload = ensure_bytes(dumps(meta["result"], serializer=serializer)[2])
                    stock.returned.append(Returned(str(meta["task_id"]), meta["status"], payload, None, serializer))
        except UNREADABLE:
            stock.flaw = FLAW

    def returned(self, raw: bytes, index: int | None) -> Returned:
        """A part as Celery's own backend keeps it.

        :raises UNREADABLE: it cannot be decoded.
        """
        (_, task_id, state, value), serializer = self._decode(raw)
        payload = dumps(value, serializer=serializer)[2]
        return Returned(str(task_id), str(state), ensure_bytes(payload), index, serializer)

    def _decode(self, raw: bytes) -> tuple[Any, str]:
        for serializer in self._serializers[:-1]:
            try:
                return self._loads(raw, serializer), serializer
            except (KombuError, ValueError):
                continue
        return self._loads(raw, self._serializers[-1]), self._serializers[-1]

    def _loads(self, raw: bytes, serializer: str) -> Any:
        content_type, encoding, _ = dumps(None, serializer=serializer)
        return loads(raw, content_type, encoding, accept=self._accept)


def names(serializers: Iterable[str]) -> tuple[str, ...]:
    """``serializers`` by name: Celery lets an application say their content types, too."""
    return tuple(dict.fromkeys(registry.type_to_name.get(each, each) for each in serializers))


def body_of(message: Mapping[str, Any]) -> bytes:
    """A message's body as it was given to the broker; decompressed."""
    body = raw_body_of(message)
    compression = (message.get("headers") or {}).get("compression")
    try:
        return bytes(decompress(body, compression)) if compression else body
    except Exception as error:  # each way of compressing raises what it likes
        raise DecodeError(f"{compression} cannot decompress it") from error


def raw_body_of(message: Mapping[str, Any]) -> bytes:
    body = message["body"]
    return b64decode(body) if message["properties"].get("body_encoding") == "base64" else ensure_bytes(body)


def _parts(headers: Mapping[str, Any], embed: Mapping[str, Any]) -> Iterator[Pending]:
    if embed.get("chord") is not None and headers.get("group"):
        yield from _part(headers["group"], headers["id"], headers.get("group_index"), embed["chord"])
    elif embed.get("chain"):
        yield from _of_signature(embed["chain"][0])  # the last task; a chain travels in reverse


def _of_signature(signature: Mapping[str, Any], around: Mapping[str, Any] = _NOTHING) -> Iterator[Pending]:
    """The parts that a signature brings in the end: the last of a chain, the callback of a chord, each of a group.

    :param around: options of the canvas that it ends.
    """
    own = {name: value for name, value in (signature.get("options") or {}).items() if value is not None}
    options = {**own, **around}
    given = {name: options[name] for name in ("chord", "group_id", "group_index") if name in options}
    kwargs = signature.get("kwargs") or {}
    match signature.get("subtask_type"):
        case "chord" if kwargs.get("body"):
            yield from _of_signature(kwargs["body"], given)
        case "group":
            for task in kwargs.get("tasks") or ():
                yield from _of_signature(task)
        case "chain" if kwargs.get("tasks"):
            last = kwargs["tasks"][-1]
            task_id = (last.get("options") or {}).get("task_id") or own.get("task_id")
            yield from _of_signature(last, {**given, "task_id": task_id} if task_id else given)
        case _ if options.keys() >= {"chord", "group_id", "task_id"}:
            yield from _part(options["group_id"], options["task_id"], options.get("group_index"), options["chord"])


def _part(group_id: Any, task_id: Any, index: int | None, callback: Mapping[str, Any]) -> Iterator[Pending]:
    if not callback.get("task") or "\0" in f"{group_id}{task_id}":  # which PostgreSQL could not write down
        return
    yield Pending(str(group_id), str(task_id), index if isinstance(index, int) else None, callback)
    # The callback of a chord within another one's header is a part of that one.
    yield from _of_signature(callback)


def _shape(result: Any) -> Any:
    return [_shape(child) for child in result.results] if isinstance(result, GroupResult) else str(result.id)


def leaves(order: Iterable[Any]) -> Iterator[str]:
    """The task ids of a nested header, in order."""
    for each in order:
        if isinstance(each, list):
            yield from leaves(each)
        else:
            yield str(each)
