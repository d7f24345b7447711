"""``patchpilot plan``."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from patchpilot.cli.console import (
    ConfigOption,
    Output,
    OutputOption,
    duration,
    emit,
    emit_json,
    read_settings,
    say,
)
from patchpilot.cli.desk import Outfit
from patchpilot.cli.orders import (
    ClusterNameOption,
    EngineOption,
    EngineVersionOption,
    NodeTypeOption,
    OperationOption,
    ParameterGroupOption,
    UpdateOption,
)
from patchpilot.cli.preflight import ReasonOption, WaiveOption, read_waivers
from patchpilot.clock import SYSTEM
from patchpilot.durations import ago
from patchpilot.phases.notes import clock_time, moment
from patchpilot.phases.order import settle
from patchpilot.phases.proposal import digest, propose
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database


def plan(
    cluster: ClusterNameOption,
    config: ConfigOption = None,
    operation: OperationOption = None,
    update: UpdateOption = None,
    engine: EngineOption = None,
    engine_version: EngineVersionOption = None,
    parameter_group: ParameterGroupOption = None,
    node_type: NodeTypeOption = None,
    grace: Annotated[
        str | None,
        typer.Option("--grace", metavar="DURATION", help="How long to wait after the last failover [default: 5m]."),
    ] = None,
    waive: WaiveOption = None,
    reason: ReasonOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Say what `patchpilot run` with the same options would do now. Changes nothing.

    The digest stands for exactly this plan. `patchpilot run --plan DIGEST`, on any host, refuses if the world has
    changed since: another primary, another member, another engine version, another status of the update, other
    waivers. Exit code 3 if there is nothing to do.
    """
    settings = read_settings(config)
    settings = settings.with_grace(duration(grace, settings.runbook.grace, "--grace"))
    settings.cluster(cluster)
    asked = {
        "operation": operation, "update": update, "engine": engine, "engine_version": engine_version,
        "parameter_group": parameter_group, "node_type": node_type,
    }  # fmt: skip
    order, waivers = settle(asked, None, begun=False), read_waivers(waive, reason)
    with Database(settings.postgres_dsn()) as database, Outfit(settings, cluster, database, waivers) as outfit:
        content = propose(outfit.look(order, "plan"), SYSTEM.now())
        key = digest(content)
        requests.keep_plan(database, settings.environment, cluster, key, content)
    if output is Output.JSON:
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
