"""What lies on the pilot's desk, as the settings say. For every command that looks at a cluster as a run does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from patchpilot import elasticache
from patchpilot.cli.orders import Command
from patchpilot.cli.recover import complain, site
from patchpilot.elasticache import cloudwatch
from patchpilot.elasticache.metrics import Metrics
from patchpilot.phases.desk import Desk, Reports
from patchpilot.phases.order import Order
from patchpilot.postgres import journal as journals
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from patchpilot.settings import Settings
from patchpilot.valkey import nodes
from patchpilot.workers import Workers


class NoReports(Reports):
    """Who only looks writes no report."""

    def current(self) -> None:
        return None

    def write(self) -> dict[str, str]:
        return {}


class Outfit:
    """What the desk of one cluster is laid with. As a context manager it closes what it opened.

    :param waivers: the checks that somebody answers for, and why.
    """

    def __init__(self, settings: Settings, cluster: str, database: Database, waivers: Mapping[str, str]) -> None:
        self._settings = settings
        self._cluster = cluster
        self._database = database
        self._waivers = waivers
        self._stack = ExitStack()

    @classmethod
    def of(cls, command: Command, database: Database) -> Self:
        """What a command needs that was told what to do to which cluster."""
        return cls(command.settings, command.cluster, database, command.waivers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self, order: Order, purpose: str) -> Desk:
        """The desk of who only looks. Nothing is asked yet.

        :param purpose: what CloudTrail shows, after ``patchpilot-``.
        """
        return self._desk(order, NoReports(), f"patchpilot-{purpose}")

    def desk(self, order: Order, reports: Reports, run_id: str) -> Desk:
        """The desk of a run. Nothing is asked yet."""
        desk = self._desk(order, reports, f"patchpilot-{run_id}")
        return replace(desk, requests=lambda: requests.requests(self._database, run_id))

    def _desk(self, order: Order, reports: Reports, session: str) -> Desk:
        settings, cluster = self._settings, self._settings.cluster(self._cluster)
        is_broker = cluster.role == "broker"
        cloud = elasticache.connect(settings.aws, cluster.region, session_name=session)
        monitoring = cloudwatch.connect(settings.aws, cluster.region, session_name=session)
        metric = settings.runbook.abort_metric
        place = site(settings, self._cluster) if is_broker else None
        return Desk(
            cluster=self._cluster,
            group=cluster.replication_group,
            role=cluster.role,
            cloud=self._stack.enter_context(cloud),
            monitoring=self._stack.enter_context(monitoring),
            nodes=nodes.connect(settings.endpoint(self._cluster)) if is_broker or cluster.endpoint else None,
            recovery=self._stack.enter_context(Recovery(place, complain=complain)) if place else None,
            workers=self._stack.enter_context(Workers(place)) if place else None,
            reports=reports,
            schema=lambda: journals.outdated(self._database),
            runbook=settings.runbook,
            window=Window(settings.recovery.min_age, settings.recovery.max_age),
            order=order,
            environment=settings.environment,
            recall=lambda digest: requests.plan(self._database, settings.environment, self._cluster, digest),
            gauge=Metrics(settings.aws, cluster.region, metric, session_name=session) if metric else None,
            metrics=settings.aws.metrics,
            waivers=self._waivers,
        )
