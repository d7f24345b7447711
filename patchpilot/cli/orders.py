"""The options that say what to do, and the desk that is laid for it: what `run` and `plan` have in common."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Self

import typer

from patchpilot import elasticache
from patchpilot.cli.recover import complain, site
from patchpilot.elasticache.metrics import Metrics
from patchpilot.phases.desk import Desk, Reports
from patchpilot.phases.order import Kind, Order
from patchpilot.postgres import journal as journals
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from patchpilot.settings import Settings
from patchpilot.valkey import nodes

POSTGRES_BUDGET = 60.0
"""Seconds for which PostgreSQL may be away, failing over itself perhaps, before the run stops with "resume later"."""

OperationOption = Annotated[
    str | None,
    typer.Option(
        "--operation", metavar="KIND", help=f"What to do: {', '.join(Kind)} [default: {Kind.SERVICE_UPDATE}]."
    ),
]
UpdateOption = Annotated[
    str | None,
    typer.Option("--update", metavar="NAME", help="The service update to apply [default: the newest applicable]."),
]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", metavar="ENGINE", help="With engine-upgrade: valkey or redis [default: as it is]."),
]
EngineVersionOption = Annotated[
    str | None, typer.Option("--engine-version", metavar="VERSION", help="With engine-upgrade: the version to go to.")
]
ParameterGroupOption = Annotated[
    str | None,
    typer.Option(
        "--parameter-group", metavar="NAME", help="With engine-upgrade: the parameter group that goes with it."
    ),
]
NodeTypeOption = Annotated[
    str | None, typer.Option("--node-type", metavar="TYPE", help="With node-type: the type to go to.")
]
ClusterNameOption = Annotated[
    str, typer.Option("--cluster", metavar="NAME", help="The cluster's name in the configuration.")
]


class Outfit:
    """What the desk of one cluster is laid with. As a context manager it closes what it opened."""

    def __init__(self, settings: Settings, cluster: str, database: Database) -> None:
        self._settings = settings
        self._cluster = cluster
        self._database = database
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def desk(self, order: Order, reports: Reports, run_id: str | None = None) -> Desk:
        """The desk.

        :param run_id: the run it is for; None to look only.
        """
        settings, cluster = self._settings, self._settings.cluster(self._cluster)
        is_broker = cluster.role == "broker"
        session = f"patchpilot-{run_id}" if run_id else "patchpilot-plan"
        cloud = elasticache.connect(settings.aws, cluster.region, session_name=session)
        metric = settings.runbook.abort_metric
        desk = Desk(
            cluster=self._cluster,
            group=cluster.replication_group,
            role=cluster.role,
            cloud=self._stack.enter_context(cloud),
            nodes=nodes.connect(settings.endpoint(self._cluster)) if is_broker or cluster.endpoint else None,
            recovery=self._recovery() if is_broker else None,
            reports=reports,
            schema=lambda: journals.outdated(self._database),
            runbook=settings.runbook,
            window=Window(settings.recovery.min_age, settings.recovery.max_age),
            order=order,
            environment=settings.environment,
            recall=lambda digest: requests.plan(self._database, settings.environment, self._cluster, digest),
            gauge=Metrics(settings.aws, cluster.region, metric, session_name=session) if metric else None,
        )
        return replace(desk, requests=lambda: requests.requests(self._database, run_id)) if run_id else desk

    def _recovery(self) -> Recovery:
        return self._stack.enter_context(Recovery(site(self._settings, self._cluster), complain=complain))
