"""Storing callbacks: whether a chord's callback survives being written down, found out when the chord is sent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from celery.canvas import Signature
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, loads
from kombu.utils.encoding import ensure_bytes


@dataclass(frozen=True)
class Stored:
    """A callback as it can be stored."""

    payload: bytes | None = None
    """None if it cannot be."""
    content_type: str | None = None
    encoding: str | None = None
    flaw: str | None = None
    """Why it cannot be stored, or what becomes of it, and where in the callback. None if it comes back as it was."""


def store(callback: Signature, serializer: str) -> Stored:
    """Serialise ``callback`` as its own message will be, and look whether it comes back as it was.

    :raises EncodeError: if it cannot be read again at all: no worker could read it either.
    """
    try:
        content_type, encoding, payload = dumps(callback, serializer=serializer)
    except Exception as error:  # noqa: BLE001 - a serialiser raises what it likes
        place = _offender(callback, serializer) or "the callback"
        return Stored(flaw=f"{serializer} cannot store {place}: {' '.join(str(error).split())}")
    try:
        again = loads(payload, content_type, encoding, force=True)
    except Exception as error:
        if serializer == "pickle":  # an exception whose constructor wants more than its arguments, for example
            return Stored(flaw=f"pickle cannot read what it wrote: {' '.join(str(error).split())}")
        raise EncodeError(f"{serializer} cannot read what it wrote of {callback.name}: {callback!r}") from error
    if serializer == "pickle":  # gives back what it was given
        return Stored(ensure_bytes(payload), content_type, encoding)
    found = _difference(callback, again)
    return Stored(ensure_bytes(payload), content_type, encoding, found and f"{serializer} changes {found}")


def serializer_of(routes: Mapping[str, Mapping[str, Any]], callback: Signature, default: str) -> str:
    """The serialiser that the callback's messages will use; of several the one that can store the most."""
    explicit = callback.options.get("serializer")
    found = {explicit} if explicit else {route.get("serializer") or default for route in routes.values()}
    return "pickle" if "pickle" in found else next(iter(sorted(found)), default)


def _offender(value: Any, serializer: str, place: str = "") -> str | None:
    """The innermost part of ``value`` that cannot be serialised."""
    for name, part in _parts(value):
        try:
            dumps(part, serializer=serializer)
        except Exception:  # noqa: BLE001 - as above
            return _offender(part, serializer, f"{place}{name}") or f"{place}{name} ({type(part).__name__})"
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
