"""A task message, kept as exactly as is needed to publish it again, identical but for its delivery tag."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid4, uuid5

from celery._state import get_current_worker_task
from celery.app import amqp
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.compression import get_encoder
from kombu.serialization import dumps, loads
from kombu.utils import json

from patchpilot.backend.config import CALLBACK_OF, CANARY, FOLLOWS, MESSAGE_ID, ORIGIN, TO_ALL

# Options of Producer.publish that steer this publish and are not part of the message.
_STEERING = frozenset({
    "exchange", "routing_key", "serializer", "retry", "retry_policy", "declare", "headers", "timeout",
    "confirm_timeout",
})  # fmt: skip

UNROLLED = ("chain", "group")
"""The signatures that are published as some of the tasks within."""

PICKLE = "application/x-python-serialize"

_COLUMNS = (
    "message_id", "task_id", "task_name", "group_id", "callback_of", "scope", "attempt", "exchange", "routing_key",
    "queue", "headers", "properties", "body", "content_type", "content_encoding", "eta", "expires", "broker",
)  # fmt: skip


class Part(NamedTuple):
    """One part of a chord's header."""

    group_id: str
    task_id: str
    position: int
    """Its place in the header, as Celery numbers it."""


@dataclass(frozen=True)
class Message:
    """One task message that is ready to be pushed."""

    id: str
    headers: dict[str, Any]
    group_id: str | None
    """The chord that waits for this message, or for the end of the chain that it starts."""
    part: Part | None
    """The part of that chord which it will bring, if one plain task does."""
    payload: bytes
    content: tuple[str, str]
    """Content type and encoding."""
    options: dict[str, Any]
    """How it is published."""
    broker: str | None = None
    """Where to."""
    callback_of: str | None = None
    """The chord whose callback it is."""
    to_all: bool = False
    """To all who listen at that moment, by a fanout exchange: it is in no queue, and nobody can say who missed it."""
    flaw: str | None = None
    """Why no worker will be able to read it."""

    @property
    def name(self) -> str:
        return str(self.headers["task"])

    def __str__(self) -> str:
        return f"{self.name}[{self.headers['id']}]"

    def push(self, producer: Any) -> None:
        """Give it to the broker."""
        producer.publish(self.payload, content_type=self.content[0], content_encoding=self.content[1], **self.options)

    def row(self) -> tuple[Any, ...]:
        """As a row of the outbox, in the order of its columns."""
        exchange, declared = self.options.get("exchange") or "", self.options.get("declare") or []
        properties = {key: value for key, value in self.options.items() if key not in _STEERING}
        return (
            self.id,
            str(self.headers["id"]),
            self.name,
            self.group_id,
            self.callback_of,
            scope_of(self.headers, everything=True),
            attempt_of(self.headers),
            getattr(exchange, "name", exchange),
            self.options.get("routing_key") or "",
            getattr(declared[0], "name", None) if declared else None,
            json.dumps(self.headers).encode(),
            json.dumps(properties).encode(),
            self.payload,
            *self.content,
            moment(self.headers.get("eta")),
            moment(self.headers.get("expires")),
            self.broker,
        )


def scope_of(headers: Mapping[str, Any], *, everything: bool) -> str | None:
    """What the start of this message's task belongs to, for the fence.

    :param everything: whether a task that follows from no other one has a scope too: its message.
    """
    scope = headers.get(CALLBACK_OF) or headers.get(FOLLOWS) or (headers.get(MESSAGE_ID) if everything else None)
    return _text(scope)


def attempt_of(headers: Mapping[str, Any]) -> str:
    """Retries and replacements: a retry is a start of its own."""
    return f"{headers.get('retries') or 0}/{headers.get('replaced_task_nesting') or 0}"


def columns(messages: Sequence[Message]) -> dict[str, list[Any]]:
    """The rows of ``messages``, column by column."""
    rows = [message.row() for message in messages]
    return {name: [row[number] for row in rows] for number, name in enumerate(_COLUMNS)}


def prepare(
    body: Any, options: dict[str, Any], callback_of: str | None, message_id: str | None, broker: str | None = None,
    *, to_all: bool = False,
) -> Message:  # fmt: skip
    """The message that ``Producer.publish(body, **options)`` would send.

    :param callback_of: the chord whose callback it is.
    :param message_id: its id, if it was prepared before.
    :param broker: where to, as the record calls it.
    :param to_all: to an exchange of which the connection knows that it is a fanout exchange.
    :raises EncodeError: if the body cannot be serialised.
    :raises KeyError: if there is no such compression here.
    """
    options = dict(options)
    headers = options["headers"]
    message_id = message_id or str(uuid4())
    to_all = to_all or _declares_fanout(options)
    if to_all:
        _unmark(headers)
    elif headers["task"] != CANARY:
        headers.update(_marks(headers, message_id, callback_of))
    if options.get("compression"):
        get_encoder(options["compression"])  # raises here, where nothing is on record, and not in the push
    content_type, encoding, payload = dumps(body, serializer=options.pop("serializer", None))
    if _is_retried_by_celery():
        options["retry"] = True  # once it is held back, or on record, nobody else would
    return Message(
        id=message_id,
        headers=headers,
        group_id=_chord_of(headers, body),
        part=_part_of(headers, body),
        payload=payload.encode(encoding) if isinstance(payload, str) else payload,
        content=(content_type, encoding),
        options=options,
        broker=broker,
        callback_of=callback_of or headers.get(CALLBACK_OF),
        to_all=to_all,
        flaw=_flaw(payload, content_type, encoding),
    )


def _flaw(payload: Any, content_type: str, encoding: str) -> str | None:
    """Why what was serialised cannot be read again: an exception whose constructor wants more than its arguments, say,
    which pickle writes and does not read. Other serialisers refuse to write what they could not read."""
    if content_type != PICKLE:
        return None
    try:
        loads(payload, content_type, encoding, force=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, a worker would meet it too
        return f"pickle cannot read what it wrote: {' '.join(str(error).split())}"
    return None


def _marks(headers: Mapping[str, Any], message_id: str, callback_of: str | None) -> dict[str, str]:
    """The headers that make a message ours: by them its end is recorded, and its start is fenced."""
    if callback_of is not None:
        return {MESSAGE_ID: message_id, CALLBACK_OF: callback_of}
    task = get_current_worker_task()
    marks = {} if task is None else _continued(headers, task.request) or _followed(headers["id"], task.request)
    return {**marks, MESSAGE_ID: message_id}


def _declares_fanout(options: Mapping[str, Any]) -> bool:
    """Whether the exchange that a message goes to will be declared with it, as a fanout exchange."""
    name = getattr(options.get("exchange"), "name", options.get("exchange"))
    exchanges = (getattr(each, "exchange", None) for each in options.get("declare") or ())
    return any(each is not None and each.name == name and each.type == "fanout" for each in exchanges)


def _unmark(headers: dict[str, Any]) -> None:
    """Each who has it runs it: by our marks it would be one execution. A retry brings those of the message before."""
    for mark in (MESSAGE_ID, CALLBACK_OF, FOLLOWS, ORIGIN):
        headers.pop(mark, None)
    headers[TO_ALL] = True


def _continued(headers: Mapping[str, Any], request: Any) -> dict[str, str]:
    """What the message of a retry or a replacement takes over from the task that runs here and now."""
    retried = headers["id"] == request.id and (headers.get("retries") or 0) > (request.retries or 0)
    nesting, current = headers.get("replaced_task_nesting") or 0, request.get("replaced_task_nesting") or 0
    # A group in place of a task is a new chord, and a header task of that is no callback.
    replaced = nesting > current and headers.get("group") == request.group
    if not (retried or replaced):
        return {}
    taken = {ORIGIN: origin(request), **{name: request.get(name) for name in (CALLBACK_OF, FOLLOWS)}}
    return {name: value for name, value in taken.items() if value is not None}


def _followed(task_id: str, request: Any) -> dict[str, str]:
    """Which message the task of a message follows, if that is next in the chain of the one that runs here, or its link.

    Should that one run a second time, it will publish the same task id once more, even if it has retried since. If its
    message went to all, so will each who has it, and those are no repetitions.
    """
    if request.get(TO_ALL):
        return {}
    noted = request.get("patchpilot_following")
    follows = task_id in (following(request) if noted is None else noted)
    return {FOLLOWS: origin(request) or str(request.id)} if follows else {}


def _is_retried_by_celery() -> bool:
    """Since Celery 5.7 a worker that publishes what follows a task tries again by itself, around ``publish``."""
    retrying = getattr(amqp, "_callback_publish_retry", None)
    return retrying is not None and bool(retrying.get())


def origin(request: Any) -> str | None:
    """The message by which a task began, before it retried or replaced itself; None if it is none of ours."""
    return _text(request.get(ORIGIN) or request.get(MESSAGE_ID))


def name_links(request: Any) -> None:
    """Give the links of a task the ids that they will get again, should it run a second time: those that have none.
    Celery would name them anew each time."""
    message_id = origin(request)
    if message_id is None:  # sent anew under the same id, it would be taken for the same
        return
    for place, link in enumerate(_first(request.callbacks or ())):
        if not link.get("subtask_type") and not link["options"].get("task_id"):
            link["options"]["task_id"] = str(uuid5(NAMESPACE_OID, f"{message_id}/{place}"))


def following(request: Any) -> frozenset[str]:
    """The ids of the tasks that follow a task: the next one of its chain, or those of the group there, and its links.
    To be noted when it starts: before 5.7 Celery takes the next one away before it publishes it."""
    signatures = _first([*(request.chain or ())[-1:], *(request.callbacks or ())])
    ids = ((each.get("options") or {}).get("task_id") for each in signatures)
    return frozenset(each for each in ids if each is not None)


def _first(signatures: Iterable[Any]) -> Iterator[Any]:
    """The tasks of some signatures that are published first, where some are: of a group, each of its own."""
    for each in signatures:
        tasks = each["kwargs"]["tasks"] if isinstance(each, Mapping) and each.get("subtask_type") in UNROLLED else ()
        if tasks:
            yield from _first(tasks if each["subtask_type"] == "group" else tasks[:1])
        elif isinstance(each, Mapping):
            yield each


def _chord_of(headers: Mapping[str, Any], body: Any) -> str | None:
    """The chord that waits for this message, or for the end of the chain that it starts."""
    embed = body[2]
    if embed.get("chord") is not None:
        return _text(headers.get("group"))
    options = _last(embed).get("options") or {}
    return _text(options.get("group_id")) if options.get("chord") is not None else None


def _text(task_id: Any) -> str | None:
    """An id as text: to Celery a UUID is as good."""
    return None if task_id is None else str(task_id)


def _part_of(headers: Mapping[str, Any], body: Any) -> Part | None:
    group_id = _chord_of(headers, body)
    if group_id is None:
        return None
    if body[2].get("chord") is not None:
        return Part(group_id, str(headers["id"]), headers.get("group_index") or 0)
    last = _last(body[2])
    options = last["options"]
    if last.get("subtask_type") or not options.get("task_id"):
        return None
    return Part(group_id, str(options["task_id"]), options.get("group_index") or 0)


def _last(embed: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last task of the chain that a message starts; it travels in reverse."""
    chain = embed.get("chain") or [{}]
    last: Mapping[str, Any] = chain[0]
    return last


def moment(text: str | None) -> datetime | None:
    """A time of a message's headers, as Celery's workers read it: one without an offset is in UTC, whatever
    ``enable_utc`` and ``timezone`` say."""
    return maybe_make_aware(maybe_iso8601(text)) if text else None
