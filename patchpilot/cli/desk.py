"""What lies on the pilot's desk, as the settings say. For every command that looks at a cluster as a run does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from patchpilot import elasticache
from patchpilot.cli.recover import complain, site
from patchpilot.elasticache import cloudwatch
from patchpilot.phases.desk import Desk, Reports
from patchpilot.postgres import journal as journals
from patchpilot.postgres.connection import Database
from patchpilot.recovery import Recovery, Window
from patchpilot.settings import Settings
from patchpilot.valkey import nodes
from patchpilot.workers import Workers


def desk_of(
    settings: Settings,
    name: str,
    database: Database,
    stack: ExitStack,
    *,
    session_name: str,
    reports: Reports,
    update: str | None = None,
    waivers: Mapping[str, str] | None = None,
) -> Desk:
    """The desk for the cluster called ``name``. Nothing is asked yet.

    :param stack: closes the connections.
    :param session_name: what CloudTrail shows.
    """
    cluster = settings.cluster(name)
    is_broker = cluster.role == "broker"
    cloud = elasticache.connect(settings.aws, cluster.region, session_name=session_name)
    monitoring = cloudwatch.connect(settings.aws, cluster.region, session_name=session_name)
    place = site(settings, name) if is_broker else None
    return Desk(
        cluster=name,
        group=cluster.replication_group,
        role=cluster.role,
        cloud=stack.enter_context(cloud),
        monitoring=stack.enter_context(monitoring),
        nodes=nodes.connect(settings.endpoint(name)) if is_broker or cluster.endpoint else None,
        recovery=stack.enter_context(Recovery(place, complain=complain)) if place else None,
        workers=stack.enter_context(Workers(place)) if place else None,
        reports=reports,
        schema=lambda: journals.outdated(database),
        runbook=settings.runbook,
        window=Window(settings.recovery.min_age, settings.recovery.max_age),
        update=update,
        metrics=settings.aws.metrics,
        waivers=waivers or {},
    )
