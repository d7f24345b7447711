"""Storing callbacks: whether a chord's callback survives being written down, found out when the chord is sent.

A callback is a canvas: many messages may come of it, each with a serialiser of its own. The record takes all of it in
the one that can store the most; but a message that goes out in JSON must carry everything that follows it, however that
is sent itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from celery.canvas import Signature
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, loads
from kombu.utils.encoding import ensure_bytes
from kombu.utils.functional import maybe_list

from patchpilot.backend.routes import maybe_tasks


@dataclass(frozen=True)
class Stored:
    """A callback as it can be stored."""

    payload: bytes | None = None
    """None if it cannot be."""
    content_type: str | None = None
    encoding: str | None = None
    flaw: str | None = None
    """Why it cannot be stored, or what becomes of it, and where in the callback. None if it comes back as it was."""


class Carried(NamedTuple):
    """A signature that one or more messages of a canvas carry."""

    place: str
    signature: Mapping[str, Any]
    serializer: str
    """Of those messages."""


def stored(callback: Signature, routes: Mapping[str, Mapping[str, Any]], default: str) -> Stored:
    """Serialise ``callback``, and look whether it, and everything its messages carry, comes back as it was.

    :param routes: how its tasks are published, by name.
    :param default: the serialiser of those that are not there.
    :raises EncodeError: if it cannot be read again at all: no worker could read it either.
    """
    messages = list(_carried(callback, lambda name: (routes.get(name) or {}).get("serializer") or default))
    serializers = sorted({message.serializer for message in messages})
    whole = store(callback, "pickle" if "pickle" in serializers else (*serializers, default)[0])
    if len(serializers) < 2 or whole.payload is None:
        return whole
    for message in messages:
        part = store(message.signature, message.serializer, message.place)
        if part.payload is None:
            return part
        whole = replace(whole, flaw=whole.flaw or part.flaw)
    return whole


def store(callback: Mapping[str, Any], serializer: str, place: str = "") -> Stored:
    """Serialise ``callback`` by ``serializer``, and look whether it comes back as it was.

    :param place: where it stands, if it is only a part of a callback.
    :raises EncodeError: if it cannot be read again at all: no worker could read it either.
    """
    try:
        content_type, encoding, payload = _dumped(callback, serializer)
    except Exception as error:  # noqa: BLE001 - a serialiser raises what it likes
        offender = _offender(callback, serializer, place) or place or "the callback"
        return Stored(flaw=f"{serializer} cannot store {offender}: {' '.join(str(error).split())}")
    try:
        again = loads(payload, content_type, encoding, force=True)
    except Exception as error:
        if serializer == "pickle":  # an exception whose constructor wants more than its arguments, for example
            return Stored(flaw=f"pickle cannot read what it wrote: {' '.join(str(error).split())}")
        raise EncodeError(f"{serializer} cannot read what it wrote of {callback['task']}: {callback!r}") from error
    if serializer == "pickle":  # gives back what it was given
        return Stored(ensure_bytes(payload), content_type, encoding)
    found = _difference(callback, again, place)
    return Stored(ensure_bytes(payload), content_type, encoding, found and f"{serializer} changes {found}")


def _dumped(value: Any, serializer: str) -> tuple[str, str, Any]:
    """A signature is a dict, but some serialisers take no dict that is more than one."""
    try:
        found: tuple[str, str, Any] = dumps(value, serializer=serializer)
    except Exception:  # noqa: BLE001 - as above
        found = dumps(_plain(value), serializer=serializer)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _carried(
    signature: Any,
    route: Callable[[str], str],
    place: str = "",
    before: frozenset[str] = frozenset(),
    given: str | None = None,
) -> Iterator[Carried]:
    """Each task of a canvas, once for each serialiser of a message that carries it: its own, and those before it.

    :param route: the serialiser of a task by its name.
    :param before: the serialisers of the messages that the canvas is a later part of.
    :param given: the serialiser that the canvas around it was given for all its tasks.
    """
    given = given or signature["options"].get("serializer")
    steps = _steps(signature)
    if not steps:
        for serializer in sorted({given or route(signature["task"]), *before}):
            yield Carried(place, signature, serializer)
    inside = before
    for where, task, follows in steps:
        its = None if follows and signature["subtask_type"] == "chain" else given  # only its first task is given it
        found = list(_carried(task, route, place + where, inside if follows else before, its))
        yield from found
        inside |= {each.serializer for each in found}
    for option in ("link", "link_error"):
        # One signature may stand without a list around it, and a signature is a dict.
        for number, link in enumerate(maybe_list(signature["options"].get(option)) or ()):
            where = f"{place}['options']['{option}'][{number}]"
            yield from _carried(link, route, where, inside if steps else frozenset())


def _steps(signature: Any) -> list[tuple[str, Any, bool]]:
    """What a canvas is made of: where it stands, and whether it follows what is before it. Nothing for a task."""
    kwargs = signature["kwargs"] or {}
    match signature.get("subtask_type"):
        case "group" | "chain" as kind:
            tasks = enumerate(kwargs.get("tasks") or ())
            return [(f"['kwargs']['tasks'][{at}]", task, kind == "chain" and at > 0) for at, task in tasks]
        case "chord":
            header, body = kwargs.get("header"), kwargs.get("body")
            inside = "['kwargs']['tasks']" if isinstance(header, Mapping) else ""
            tasks = enumerate(maybe_tasks(header))
            found = [(f"['kwargs']['header']{inside}[{at}]", task, False) for at, task in tasks]
            return found + ([("['kwargs']['body']", body, True)] if body else [])
        case _:
            return []


def _offender(value: Any, serializer: str, place: str = "", around: frozenset[int] = frozenset()) -> str | None:
    """The innermost part of ``value`` that cannot be serialised.

    :param around: what ``value`` is in.
    """
    around |= {id(value)}
    for name, part in _parts(value):
        if id(part) in around:
            return f"{place}{name} (which contains itself)"
        try:
            _dumped(part, serializer)
        except Exception:  # noqa: BLE001 - as above
            return _offender(part, serializer, f"{place}{name}", around) or f"{place}{name} ({type(part).__name__})"
    return None


def _difference(before: Any, after: Any, place: str = "") -> str | None:
    """The first part of ``before`` that came back as something else. Lists for tuples are no difference: Celery's own
    messages make them too."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        lost = [key for key in before if key not in after]
        if lost:
            return f"the key {lost[0]!r} ({type(lost[0]).__name__}) at {place or 'the top'}"
        pairs: Collection[tuple[str, Any, Any]] = [(f"[{key!r}]", before[key], after[key]) for key in before]
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = [(f"[{number}]", *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        same = before == after or (before != before and after != after)
        return None if same else f"{place} ({type(before).__name__}, comes back as {type(after).__name__})"
    found = (_difference(one, other, f"{place}{name}") for name, one, other in pairs)
    return next(filter(None, found), None)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    return [(f"[{number}]", part) for number, part in enumerate(value)] if isinstance(value, list | tuple) else []
