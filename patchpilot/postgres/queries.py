"""SQL by name: ``sql/<file>.sql`` holds statements, each under a line ``-- name: <name>``."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import LiteralString, cast

_NAME = re.compile(r"^-- name: (\w+)[^\n]*$", re.MULTILINE)


@cache
def queries(file: str) -> dict[str, LiteralString]:
    """The statements of ``sql/<file>.sql``, by name.

    :raises KeyError: when looking up a statement that is not there.
    """
    text = (files(__package__) / "sql" / f"{file}.sql").read_text(encoding="utf-8")
    parts = _NAME.split(text)[1:]
    # The text comes from our own package, never from input: a literal in all but type.
    return {name: cast("LiteralString", sql.strip()) for name, sql in zip(parts[::2], parts[1::2], strict=True)}
