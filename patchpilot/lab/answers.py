"""What botocore's model says of operations and their answers; and putting other values into answers."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import botocore.session

_KINDS = {"string": str, "integer": int, "boolean": bool, "double": float, "timestamp": datetime}


def operations(pattern: str) -> Collection[str]:
    """The operations of ElastiCache that ``pattern`` means; `*` and `?` as in file names.

    :raises ValueError: if there is none; in one line.
    """
    found = _named(pattern, "elasticache")
    if not found:
        raise ValueError(f"ElastiCache has no operation {pattern!r}")
    return found


def is_of_cloudwatch(pattern: str) -> bool:
    """Whether ``pattern`` means operations of CloudWatch: it means none of ElastiCache."""
    return not _named(pattern, "elasticache") and bool(_named(pattern, "cloudwatch"))


def _named(pattern: str, service: str) -> list[str]:
    return [name for name in _model(service).operation_names if fnmatchcase(name, pattern)]


def check(operation: str, path: str, value: object) -> None:
    """See whether an answer of ``operation`` may have ``value`` at ``path``.

    Words outside of an enum are let through: AWS adds to its enums without notice.

    :raises ValueError: if it may not; in one line.
    """
    if operations(operation) != [operation]:
        raise ValueError(f"an override is about one operation, not {operation!r}")
    shape = _model("elasticache").operation_model(operation).output_shape
    for name in path.split("."):
        shape = _item(shape)
        if shape.type_name != "structure" or name not in shape.members:
            raise ValueError(f"an answer of {operation} has no {path!r} ({name!r} is unknown there)")
        shape = shape.members[name]
    kind = _KINDS.get(shape.type_name)
    if kind is None:
        raise ValueError(f"{path!r} in an answer of {operation} is a {shape.type_name}: name a member of it")
    if type(value) is not kind:
        raise ValueError(f"{path!r} in an answer of {operation} is a {shape.type_name}, not {value!r}")


def override(answer: dict[str, Any], path: str, value: object) -> None:
    """Put ``value`` at ``path`` of an answer, in every item of the lists on the way."""
    name, _, rest = path.partition(".")
    if not rest:
        answer[name] = value
        return
    inner = answer.setdefault(name, {})
    for each in inner if isinstance(inner, list) else [inner]:
        override(each, rest, value)


def _item(shape: Any) -> Any:
    while shape is not None and shape.type_name == "list":
        shape = shape.member
    return shape


@cache
def _model(service: str) -> Any:
    return botocore.session.get_session().get_service_model(service)
