"""A dry run as a plan: what was found, with a digest, so that exactly that can be applied later, and nothing else.

The world moves on between the two. Each finding of the plan is looked for again; one that is as it was is applied under
its usual guard, and of the others the plan's reader is told what became of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchpilot.errors import Usage
from patchpilot.recovery.findings import Finding

Item = tuple[str, str, str, str]
"""Kind, id, diagnosis and remedy. What has one id may have several: of two messages of one task, say."""


@dataclass(frozen=True)
class Plan:
    """What a dry run found, in order."""

    items: tuple[Item, ...]
    digest: str


@dataclass(frozen=True)
class Change:
    """A finding of the plan that is not as it was."""

    kind: str
    id: str
    planned: str
    now: str
    """Its diagnosis now; ``gone`` if there is nothing to find any more."""


def digest(findings: Iterable[dict[str, Any]]) -> str:
    """The digest of findings as a dry run prints them: of what each is and what would be done, not of its age."""
    rows = sorted(_item(it) for it in findings)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read(path: Path) -> Plan:
    """The plan in ``path``: what ``patchpilot recover --dry-run --output json`` printed.

    :raises Usage: it is none, or somebody changed it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, stated = content["findings"], content["digest"]
        items = tuple(_item(it) for it in found)
    except OSError as error:
        raise Usage(f"--plan: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Usage(f"--plan: {path} is no plan: make one with `patchpilot recover --dry-run --output json`") from None
    if digest(found) != stated:
        raise Usage(f"--plan: {path} is not as it was printed: its digest does not fit; make a new plan")
    return Plan(items, stated)


def compare(plan: Plan, findings: Sequence[Finding]) -> tuple[tuple[Finding, ...], tuple[Change, ...]]:
    """Those of ``findings`` that are as planned, and what became of the rest of the plan."""
    now = {(it.kind, it.id, it.diagnosis, str(it.remedy)): it for it in findings}
    instead: dict[tuple[str, str], str] = {(it.kind, it.id): it.diagnosis for it in findings}
    gone = [item for item in plan.items if item not in now]
    changes = [Change(kind, subject, was, instead.get((kind, subject), "gone")) for kind, subject, was, _ in gone]
    return tuple(now[item] for item in plan.items if item in now), tuple(changes)


def _item(finding: Mapping[str, Any]) -> Item:
    return finding["kind"], finding["id"], finding["diagnosis"], finding["remedy"]
