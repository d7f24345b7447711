"""Settings from the environment: which variable a value came from, and those that would be ignored."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from patchpilot.errors import Usage


def refuse_unknown(prefix: str, sections: Collection[str]) -> None:
    """See to it that no variable is meant for a section that does not exist.

    :raises Usage: one is.
    """
    for name in sorted(os.environ):
        section, below, _ = name.upper().removeprefix(prefix).lower().partition("__")
        if name.upper().startswith(prefix) and below and section not in sections:
            raise Usage(f"{name}: there is no section {section!r} (sections: {', '.join(sorted(sections))})")


def source(prefix: str, key: Sequence[object]) -> str:
    """The variable that the setting ``key`` comes from; empty if it comes from none."""
    names = {name.upper(): name for name in os.environ}
    name = prefix + "__".join(map(str, key)).upper()
    return names.get(name, "")


def unreadable(prefix: str, error: Exception) -> str:
    """What to say of a variable that pydantic cannot read: one for a whole section, which it takes for JSON."""
    found = re.search(r'field "(\w+)"', str(error))
    if found is None:
        return f"environment: {error}"
    name = f"{prefix}{found[1].upper()}"
    return f"{name}: write one variable for each setting of {found[1]!r}, like {name}__NAME"


class without:  # noqa: N801 - reads as a statement where it is used
    """The environment with one variable less, for a while."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._value = os.environ.pop(self._name, None)

    def __exit__(self, *_: object) -> None:
        if self._value is not None:
            os.environ[self._name] = self._value
