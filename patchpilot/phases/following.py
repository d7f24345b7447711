"""What is remembered from one look at a rotation to the next, and when waiting on would be wrong. Pure.

All lengths of time are measured by our own clock, from when something was first seen: AWS's clock may be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from patchpilot.elasticache.facts import AVAILABLE, UpdateStatus
from patchpilot.engine.plan import Data, View
from patchpilot.errors import PatchpilotError, Unsafe
from patchpilot.phases.notes import length, moment, noted
from patchpilot.phases.operations import GIVE_UP, Sign, Standing
from patchpilot.phases.rotation import Rotation
from patchpilot.phases.sight import Sight
from patchpilot.settings import Runbook
from patchpilot.valkey.nodes import Report

_AT_REST = frozenset({
    "complete", AVAILABLE, UpdateStatus.NOT_APPLIED, UpdateStatus.WAITING_TO_START, UpdateStatus.STOPPED,
})  # fmt: skip
"""Statuses of a node that nobody works on at the moment."""

ELSEWHERE = "somebody else"
"""Who stopped an operation that no request of this run stopped: what they do with it afterwards is theirs as well."""


@dataclass(frozen=True)
class Followed:
    """Everything that is known of a rotation so far."""

    rotation: Rotation
    status: str | None = None
    group: str = ""
    rows: Mapping[str, Any] = field(default_factory=dict)
    """How far each node is; what was last seen, if AWS does not say at the moment."""
    update: str | None = None
    """The service update it turned out to be."""
    reports: Mapping[str, Any] = field(default_factory=dict)
    """What each node said of itself; its offset as it was when the rest last changed."""
    working: Mapping[str, datetime] = field(default_factory=dict)
    """The nodes that are being worked on, and when that was first seen."""
    sign: str = ""
    sign_since: datetime | None = None
    """Since when each look has meant the same."""

    @classmethod
    def of(cls, note: Data, last: Rotation | None = None) -> Followed:
        """Read what :meth:`note` wrote.

        :param last: the rotation as this process last knew it: it may know more than is on record.
        """
        rotation = Rotation.of(note["rotation"])
        return cls(
            rotation=last if last == rotation else rotation,
            status=note.get("status"),
            group=note.get("group", ""),
            rows=note.get("nodes", {}),
            update=note.get("update"),
            reports=note.get("reports", {}),
            working={node: moment(at) for node, at in note.get("working", {}).items()},
            sign=note.get("sign", ""),
            sign_since=moment(note["sign_since"]) if note.get("sign_since") else None,
        )

    def note(self) -> Data:
        """As the journal stores it."""
        return {
            "status": self.status,
            "group": self.group,
            "nodes": dict(self.rows),
            "rotation": self.rotation.note(),
            "update": self.update,
            "reports": dict(self.reports),
            "working": noted(dict(self.working)),
            "sign": self.sign,
            "sign_since": noted(self.sign_since),
        }

    def follow(self, at: Standing, sight: Sight) -> Followed:
        """Take a further look into account."""
        rotation = self.rotation.follow(sight.group.primary, sight.events, sight.now, sight.said, sight.behind)
        rows = at.rows or self.rows
        busy = [node for node, row in rows.items() if row["status"] not in _AT_REST]
        sign = f"{at.sign}: {at.why} after {len(rotation.failovers)} failovers"
        return Followed(
            rotation=rotation,
            status=at.status,
            group=sight.group.status,
            rows=rows,
            update=at.update or self.update,
            reports=_heard(self.reports, sight.reports),
            working={node: self.working.get(node, sight.now) for node in busy},
            sign=sign,
            sign_since=self.sign_since if sign == self.sign else sight.now,
        )

    def since(self, now: datetime) -> datetime:
        """Since when each look has meant the same."""
        return self.sign_since or now

    def line(self, at: Standing) -> str:
        """How far it is, for a person."""
        number = len(self.rotation.failovers)
        failovers = f"; failovers so far: {number}" if number else ""
        group = "" if f"the group is {self.group}" in at.line else f"; group {self.group}"
        return f"{at.line}{group}{failovers}"


def stopped_elsewhere(view: View, at: Standing, followed: Followed, runbook: Runbook) -> Data | None:
    """That somebody has stopped the operation; once that is sure, for one answer may be an old one."""
    if at.sign is not Sign.STOPPED or not _is_sure(view, followed, runbook):
        return None
    number = at.detail.get("nodes_updated") or "an unknown number of"
    return {"why": f"somebody stopped {at.update} ({number} nodes are updated)", "by": ELSEWHERE}


def ceased(view: View, at: Standing, followed: Followed, runbook: Runbook) -> PatchpilotError | None:
    """That the operation does not apply any more; once that is sure."""
    if at.sign is not Sign.IMPOSSIBLE or not _is_sure(view, followed, runbook):
        return None
    return Unsafe(f"the operation ceased to apply while it ran ({at.error or at.why}): {GIVE_UP}")


def _is_sure(view: View, followed: Followed, runbook: Runbook) -> bool:
    return view.now >= followed.since(view.now) + runbook.settle


def stalled(view: View, at: Standing, followed: Followed, runbook: Runbook) -> PatchpilotError | None:
    """That one node, or the whole, takes longer than it may."""
    slow = _slow(view, followed, runbook.node_stall)
    if slow:
        return Unsafe(
            f"{slow} has been worked on for more than {length(runbook.node_stall)}: look for its events, and open a "
            "case with AWS; do not reboot it. The same command goes on watching"
        )
    if view.now >= bound(view, runbook):
        instead = f"; or, {GIVE_UP}" if at.update or at.calm else ""
        return Unsafe(
            f"the rotation has not come to its end within {length(runbook.stall)} ({followed.line(at)}): look at the "
            f"group in the console; the same command goes on watching{instead}"
        )
    return None


def bound(view: View, runbook: Runbook) -> datetime:
    """Until when the whole may take."""
    return _patience_from(view, view.intended_at) + runbook.stall


def _slow(view: View, followed: Followed, most: timedelta) -> str:
    late = [node for node, since in followed.working.items() if view.now >= _patience_from(view, since) + most]
    return ", ".join(sorted(late))


def _patience_from(view: View, since: datetime | None) -> datetime:
    """Whoever starts the run again after it gave up gets as long again."""
    return max(filter(None, (since, view.contradicted_at)), default=view.since)


def _heard(before: Mapping[str, Any], reports: Mapping[str, Report | str]) -> Mapping[str, Any]:
    """What the nodes said, changed only where more than an offset has: each change goes into the journal."""
    heard = {node: _row(said) for node, said in reports.items()}
    return {node: before[node] if _same(before.get(node), row) else row for node, row in heard.items()}


def _row(said: Report | str) -> dict[str, Any]:
    if isinstance(said, str):
        return {"role": None}
    return {"role": said.role, "link_up": said.link_up, "replid": said.replid, "offset": said.offset}


def _same(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    return one is not None and {**one, "offset": None} == {**other, "offset": None}
