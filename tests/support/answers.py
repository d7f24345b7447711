"""Whether an answer of the simulator is one that AWS could give: botocore's own model of it says so."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any

import botocore.session
from botocore.validate import ParamValidator

_KINDS = {"string": str, "integer": int, "boolean": bool, "timestamp": datetime, "double": float}


def problems(operation: str, answer: Mapping[str, Any]) -> list[str]:
    """What of ``answer`` is not as botocore's model says: unknown members, wrong types, values outside an enum."""
    shape = _model().operation_model(operation).output_shape
    said = ParamValidator().validate(answer, shape).generate_report()
    return [*said.splitlines(), *_problems(shape, answer, operation)]


def _problems(shape: Any, value: Any, path: str) -> list[str]:
    if shape.type_name == "structure":
        unknown = [f"{path}.{key}: unknown" for key in value if key not in shape.members]
        known = [(key, inner) for key, inner in value.items() if key in shape.members]
        return unknown + [
            text for key, inner in known for text in _problems(shape.members[key], inner, f"{path}.{key}")
        ]
    if shape.type_name == "list":
        return [text for inner in value for text in _problems(shape.member, inner, f"{path}[]")]
    expected = _KINDS[shape.type_name]
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        return [f"{path}: {value!r} is no {shape.type_name}"]
    if getattr(shape, "enum", None) and value not in shape.enum:
        return [f"{path}: {value!r} is none of {shape.enum}"]
    return []


@cache
def _model() -> Any:
    return botocore.session.get_session().get_service_model("elasticache")
