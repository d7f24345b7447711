"""A journal that kills whoever writes to it, just before or just after a chosen entry is committed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from patchpilot.engine.journal import Entry, Journal, Kind
from patchpilot.engine.plan import Data


class Kill(BaseException):
    """Like ``kill -9``: no ``except Exception`` on the way may stop it."""


class Side(StrEnum):
    """Where to die."""

    BEFORE = "before"
    AFTER = "after"


class KillingJournal:
    """Counts the entries written through it, and dies at the chosen one.

    :param at: which entry, counted from 1, or the first one of this kind and step; 0 for none.
    :param fate: what to raise.
    """

    def __init__(
        self,
        inner: Journal,
        at: int | tuple[Kind, str] = 0,
        side: Side = Side.BEFORE,
        fate: type[BaseException] = Kill,
    ) -> None:
        self._inner = inner
        self._at, self._side, self._fate = at, side, fate
        self.written = 0

    @property
    def run_id(self) -> str:
        return self._inner.run_id

    def entries(self) -> Sequence[Entry]:
        return self._inner.entries()

    def append(self, kind: Kind, phase: str = "", step: str = "", data: Data | None = None) -> Entry:
        due = self._at in (self.written + 1, (kind, step))
        if due and self._side is Side.BEFORE:
            raise self._fate(f"before {kind} in {phase}/{step}")
        entry = self._inner.append(kind, phase, step, data)
        self.written += 1
        if due:
            raise self._fate(f"after {kind} in {phase}/{step}")
        return entry

    def renew(self) -> None:
        self._inner.renew()
