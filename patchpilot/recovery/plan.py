"""A dry run as a plan: what was found, with a digest, so that exactly that can be applied later, and nothing else.

The world moves on between the two. Each finding of the plan is looked for again; one that is as it was is applied under
its usual guard, and of the others the plan's reader is told what became of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from patchpilot.broker_name import name_of_url, named
from patchpilot.dsn import masked
from patchpilot.durations import LONGEST
from patchpilot.errors import Usage
from patchpilot.recovery.findings import KINDS, Finding, Kind, Window
from patchpilot.workers.application import Site

LARGEST = 64 * 1024 * 1024
"""Bytes of a plan's file."""

Item = tuple[str, str, str, str]
"""Kind, id, diagnosis and remedy. What has one id may have several: of two messages of one task, say."""


@dataclass(frozen=True)
class Plan:
    """What a dry run found, in order."""

    items: Mapping[Item, frozenset[str]]
    """Each with the outbox ids of its messages."""
    window: Window
    """Which the dry run looked at."""
    place: Mapping[str, str]
    """Where it looked, as :func:`place_of` calls it."""
    digest: str


@dataclass(frozen=True)
class Change:
    """A finding of the plan that is not as it was."""

    kind: str
    id: str
    planned: str
    now: str
    """Its diagnosis now; ``gone`` if there is nothing to find any more."""


def place_of(site: Site) -> dict[str, str]:
    """What the broker and the database of ``site`` are called, without any secret."""
    defaults = {option.keyword.decode(): (option.val or b"").decode() for option in Conninfo.get_defaults()}
    parts = {**defaults, **{key: str(value) for key, value in conninfo_to_dict(site.dsn).items() if value}}
    database = named(parts["host"] or parts["hostaddr"], parts["port"], parts["dbname"] or parts["user"])
    service = f" (service {parts['service']})" if parts["service"] else ""
    broker = site.broker or name_of_url(site.endpoint, site.key_prefix)
    return {"broker": masked(broker or "?"), "database": masked(database + service)}


def as_data(findings: Iterable[Finding], window: Window, site: Site) -> dict[str, Any]:
    """Findings as a dry run prints them: a plan."""
    rows = masked([{**finding.as_dict(), "messages": sorted(finding.messages)} for finding in findings])
    span = {
        "min_age_seconds": window.min_age.total_seconds(),
        "max_age_seconds": window.max_age.total_seconds(),
    }
    place = place_of(site)
    return {"findings": rows, "window": span, "site": place, "digest": _digest(rows, span, place)}


def read(path: Path) -> Plan:
    """The plan in ``path``: what ``patchpilot recover --dry-run --output json`` printed.

    :raises Usage: it is none, or somebody changed it.
    """
    try:
        content = json.loads(_text(path))
        found, span, stated = content["findings"], content["window"], content["digest"]
        if "site" not in content:
            raise Usage(f"--plan: {path} was made by an older version: make a new dry run")
        items = {_item(it): frozenset(_texts(it["messages"])) for it in found}
        window = Window(_age(span["min_age_seconds"]), _age(span["max_age_seconds"]))
        broker, database = _texts([content["site"][name] for name in ("broker", "database")])
        place = {"broker": broker, "database": database}
        fits = _digest(found, span, place) == stated
    except OSError as error:
        raise Usage(f"--plan: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Usage(f"--plan: {path} is no plan: make one with `patchpilot recover --dry-run --output json`") from None
    if not fits:
        raise Usage(f"--plan: {path} is not as it was printed: its digest does not fit; make a new plan")
    return Plan(items, window, place, stated)


def hold_to(plan: Plan, site: Site) -> None:
    """See to it that ``plan`` was made for ``site``.

    :raises Usage: it was made for another broker or another database.
    """
    for what, here in place_of(site).items():
        if (there := plan.place[what]) != here:
            raise Usage(f"--plan: it was made for the {what} {there}, and this is {here}: make a new dry run here")


def _text(path: Path) -> str:
    """:raises Usage: there is more of it than any plan is long."""
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        most = LARGEST // 1024**2
        raise Usage(f"--plan: {path} is larger than {most} MB: no plan, or of too much: make one with --only")
    return content.decode()


def compare(
    plan: Plan, findings: Sequence[Finding], only: Collection[Kind] = KINDS
) -> tuple[tuple[Finding, ...], tuple[Change, ...]]:
    """Those of ``findings`` that are as planned, with no other messages than the plan's, and what became of the rest.

    :param only: the rest of the plan is left alone, and not compared.
    """
    now: dict[Item, Finding] = {(it.kind, it.id, it.diagnosis, str(it.remedy)): it for it in findings}
    instead: dict[tuple[str, str], str] = {(it.kind, it.id): it.diagnosis for it in findings}
    agreed, changes = [], []
    for item, planned in plan.items.items():
        kind, subject, was, _ = item
        finding = now.get(item)
        if kind not in only:
            continue
        if finding is None:
            changes.append(Change(kind, subject, was, instead.get((kind, subject), "gone")))
            continue
        both = planned.intersection(finding.messages)
        others = len(finding.messages) - len(both)
        if both != planned or others:
            words = f"{was}, of {len(both)} of its {len(planned)} messages and of {others} others"
            changes.append(Change(kind, subject, was, words))
        if both or not (planned or others):
            agreed.append(_only(finding, both) if others else finding)
    return tuple(agreed), tuple(changes)


def _only(finding: Finding, messages: Collection[str]) -> Finding:
    """``finding``, of these messages only."""
    kept = tuple(it for it in finding.messages if it in messages)
    return replace(finding, messages=kept, reason=f"{finding.reason}; of these, the {len(kept)} of the plan")


def _digest(findings: Iterable[Mapping[str, Any]], span: Mapping[str, Any], place: Mapping[str, str]) -> str:
    """Of all that a person reads of each, but its age; of its messages, and of where and when it was looked for."""
    rows = sorted([*_item(it), json.dumps(_read(it)), *sorted(_texts(it["messages"]))] for it in findings)
    window = [_age(span[name]).total_seconds() for name in ("min_age_seconds", "max_age_seconds")]
    return hashlib.sha256(json.dumps([rows, window, place], sort_keys=True).encode()).hexdigest()


def _read(finding: Mapping[str, Any]) -> list[Any]:
    return [finding[name] for name in ("callback", "reason", "returned", "total")]


def _item(finding: Mapping[str, Any]) -> Item:
    kind, subject, diagnosis, remedy = _texts([finding[name] for name in ("kind", "id", "diagnosis", "remedy")])
    return kind, subject, diagnosis, remedy


def _texts(values: Any) -> list[str]:
    """:raises ValueError: ``values`` is no list of texts that can be printed."""
    if not isinstance(values, list) or not all(isinstance(it, str) for it in values):
        raise ValueError("texts are expected")
    for it in values:
        it.encode()
    return values


def _age(seconds: Any) -> timedelta:
    """:raises ValueError: ``seconds`` is no age."""
    if not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST.total_seconds():
        raise ValueError("an age is expected")
    return timedelta(seconds=seconds)
