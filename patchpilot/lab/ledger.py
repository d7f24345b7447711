"""The ground truth of a rehearsal: a file to which every task appends what it did.

It shares no code and no table with patchpilot's own records, and nothing with Valkey: each line is appended in one
write to a local file, so a failover cannot touch it. What it says is what happened.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchpilot.clock import SYSTEM


class Ledger:
    """One ledger file; any number of processes may write to it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, what: str, chord: str, **fields: Any) -> None:
        """Append one line, with the time."""
        line = json.dumps({"at": SYSTEM.now().timestamp(), "what": what, "chord": chord, **fields})
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, Chord]:
        """What is known of each chord, by its name in the workload."""
        chords: dict[str, Chord] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            row = json.loads(line)
            chords.setdefault(row["chord"], Chord(row["chord"])).add(row)
        return chords


@dataclass
class Chord:
    """One chord, as the tasks themselves recorded it. Times are seconds since the epoch."""

    name: str
    employees: tuple[int, ...] = ()
    """Whose hours its header computes: one part each."""
    group_id: str = ""
    sent_at: float | None = None
    raised: str = ""
    """The error that sending it raised in the producer."""
    parts: Counter[int] = field(default_factory=Counter)
    """How often each part ran, by employee."""
    first_ran: dict[int, float] = field(default_factory=dict)
    """When each part ran first, by employee."""
    callbacks: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Callbacks that got other results or another payload than was sent."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one line of the ledger into account."""
        match row["what"]:
            case "sent":
                self.sent_at, self.group_id = row["at"], row["group_id"]
                self.employees = tuple(row["employees"])
            case "raised":
                self.raised = row["error"]
            case "part":
                self.parts[row["part"]] += 1
                self.first_ran[row["part"]] = min(row["at"], self.first_ran.get(row["part"], row["at"]))
            case "callback":
                self.callbacks.append(row["at"])
                if not row["right"]:
                    self.wrong.append(row["got"])

    def open_at(self, moment: float) -> set[int]:
        """The employees whose part had not run by ``moment``."""
        return {each for each in self.employees if self.first_ran.get(each, math.inf) > moment}

    def done_by(self, moment: float) -> bool:
        """Whether its callback had run by ``moment``."""
        return any(at <= moment for at in self.callbacks)
