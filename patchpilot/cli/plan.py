"""``patchpilot plan``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from patchpilot.cli.console import Output, emit, emit_json, say
from patchpilot.cli.desk import Outfit
from patchpilot.cli.orders import Command, GraceOption, ordering
from patchpilot.clock import SYSTEM
from patchpilot.durations import ago
from patchpilot.phases.notes import clock_time, moment
from patchpilot.phases.proposal import digest, propose
from patchpilot.postgres import requests
from patchpilot.postgres.record import Record


@ordering
def plan(command: Command, grace: GraceOption = None) -> None:
    """Say what `patchpilot run` with the same options would do now. Changes nothing.

    The digest stands for exactly this plan. `patchpilot run --plan DIGEST`, on any host, refuses if the world has
    changed since: another primary, another member, another engine version, another status of the update, other
    waivers. Exit code 3 if there is nothing to do.
    """
    command = command.with_grace(grace)
    order, settings, cluster = command.order, command.settings, command.cluster
    with Record(settings.postgres_dsn()) as database, Outfit.of(command, database) as outfit:
        content = propose(outfit.look(order, "plan"), SYSTEM.now())
        key = digest(content)
        requests.keep_plan(database, settings.environment, cluster, key, content)
    if command.output is Output.JSON:
        emit_json({"digest": key, **content})
        return
    for title, value in _lines(content):
        emit(f"{title:24} {value}")
    emit(f"{'digest':24} {key}")
    say(f"to do exactly this: patchpilot run --cluster {cluster} --plan {key}")


def _date(note: str | None) -> str:
    return clock_time(moment(note)) if note else "AWS does not say"


def _lines(content: dict[str, Any]) -> list[tuple[str, str]]:
    dates = content["dates"] or {}
    automatic = {True: "yes", False: "no", None: "AWS does not say"}[dates.get("automatic")]
    lines = [
        ("cluster", f"{content['cluster']} ({content['environment']}), replication group {content['group']}"),
        ("operation", content["what"]),
        ("status", content["status"] + (": it runs already and would be adopted" if content["adopted"] else "")),
        ("severity", content["severity"]),
        ("AWS's estimate", content["estimate"]),
        ("primary", content["primary"]),
        ("order", " -> ".join(content["order"]) + " (the primary last, after the failover)"),
        ("versions", ", ".join(f"{node} {version}" for node, version in content["versions"].items())),
        ("node types", ", ".join(sorted(set(content["node_types"].values())))),
        ("grace", ago(timedelta(seconds=content["grace"]))),
        ("waived", ", ".join(content["waived"])),
    ]
    if content["dates"]:
        lines += [
            ("recommended by", _date(dates["recommended_by"])),
            ("cannot be applied after", _date(dates["ends"])),
            ("applied by AWS itself", f"{automatic} (after the recommended date)"),
        ]
    return [(title, str(value)) for title, value in lines if value]
