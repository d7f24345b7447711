"""The calls that patchpilot makes, and how it reaches AWS."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

from patchpilot import __version__
from patchpilot.elasticache.facts import Application, Event, Group, Node, ServiceUpdate, Unprocessed, UpdateAction
from patchpilot.elasticache.faults import EXPIRED, code_of, translated
from patchpilot.errors import Corrupt
from patchpilot.settings import Aws

if TYPE_CHECKING:
    from mypy_boto3_elasticache import ElastiCacheClient

T = TypeVar("T")

CONNECT_TIMEOUT = 5
READ_TIMEOUT = 20
"""Seconds. botocore's own defaults of 60 each would make one look longer than the lease on the run lasts."""

EVENTS_KEPT = timedelta(days=14)
"""How far back AWS documents that DescribeEvents reaches."""

_PAGE = 100


class ElastiCache:
    """The ElastiCache API of one account and region.

    Every method raises :class:`~patchpilot.errors.Transient` when AWS cannot be reached or throttles, and
    :class:`~patchpilot.errors.NeedsOperator` when a person has to change something first.

    :param fresh: makes a client, from credentials read anew; with true, one whose calls are never repeated.
    """

    def __init__(self, fresh: Callable[[bool], ElastiCacheClient]) -> None:
        self._fresh = fresh
        self._clients: dict[bool, ElastiCacheClient] = {}

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def service_updates(self) -> tuple[ServiceUpdate, ...]:
        """All service updates, whatever became of them: one that was applied may be cancelled or expired since."""
        return tuple(ServiceUpdate.of(row) for row in self._pages("describe_service_updates", "ServiceUpdates"))

    def update_actions(self, group: str) -> tuple[UpdateAction, ...]:
        """Every update action of replication group ``group``, with the status of its nodes.

        One that is not listed is unknown, not done: AWS's answers are eventually consistent.
        """
        rows = self._pages(
            "describe_update_actions", "UpdateActions", ReplicationGroupIds=[group], ShowNodeLevelUpdateStatus=True
        )
        return tuple(UpdateAction.of(row) for row in rows if row.get("ReplicationGroupId") == group)

    def group(self, group: str) -> Group:
        """Replication group ``group``."""
        rows = self._pages("describe_replication_groups", "ReplicationGroups", ReplicationGroupId=group)
        if len(rows) != 1:
            raise Corrupt(f"AWS returned {len(rows)} replication groups called {group!r}")
        return Group.of(rows[0])

    def nodes(self, group: Group) -> tuple[Node, ...]:
        """The nodes of ``group`` as cache clusters of their own."""
        rows = [
            row
            for member in group.members
            for row in self._pages("describe_cache_clusters", "CacheClusters", CacheClusterId=member.node)
        ]
        return tuple(Node.of(row) for row in rows)

    def events(self, sources: Collection[str], since: datetime, until: datetime) -> tuple[Event, ...]:
        """The events of ``sources`` (a replication group and its nodes), oldest first, each once.

        AWS publishes no bound on how late an event appears: ask for overlapping windows. Windows that begin more than
        14 days ago are cut, because AWS keeps no events for longer.
        """
        begin = max(since, until - EVENTS_KEPT + timedelta(minutes=1))
        rows = self._pages("describe_events", "Events", StartTime=begin, EndTime=until)
        return tuple(sorted({Event.of(row) for row in rows if row.get("SourceIdentifier") in sources}))

    def apply(self, update: str, group: str) -> Application:
        """Start ``update`` on replication group ``group``: one request, never repeated by the SDK.

        There is no idempotency token and AWS does not say what a second request does.

        :raises Transient: it may have taken effect or not.
        """
        answer = self._call(
            "BatchApplyUpdateAction",
            lambda client: client.batch_apply_update_action(ServiceUpdateName=update, ReplicationGroupIds=[group]),
            once=True,
        )
        refused = [row for row in answer.get("UnprocessedUpdateActions", ()) if row.get("ReplicationGroupId") == group]
        started = [row for row in answer.get("ProcessedUpdateActions", ()) if row.get("ReplicationGroupId") == group]
        if refused and not started:
            return Application(None, Unprocessed(refused[0].get("ErrorType", ""), refused[0].get("ErrorMessage", "")))
        return Application(started[0].get("UpdateActionStatus", "") if started else None)

    def _pages(
        self,
        operation: Literal[
            "describe_service_updates",
            "describe_update_actions",
            "describe_replication_groups",
            "describe_cache_clusters",
            "describe_events",
        ],
        key: str,
        **params: Any,
    ) -> list[Any]:
        """All pages of an answer in one list."""

        def ask(client: ElastiCacheClient) -> list[Any]:
            pages: Any = client.get_paginator(operation).paginate(PaginationConfig={"PageSize": _PAGE}, **params)
            return [row for page in pages for row in page.get(key, ())]

        return self._call("".join(word.capitalize() for word in operation.split("_")), ask)

    def _call(self, action: str, ask: Callable[[ElastiCacheClient], T], *, once: bool = False) -> T:
        with translated(action, self._region):
            try:
                return ask(self._client(once))
            except ClientError as error:
                if code_of(error) not in EXPIRED:
                    raise
            # Whoever renews credentials in a file or a cache does so without telling us. AWS did nothing: ask again.
            self.close()
            return ask(self._client(once))

    def _region(self) -> str | None:
        return next((client.meta.region_name for client in self._clients.values()), None)

    def _client(self, once: bool) -> ElastiCacheClient:
        if once not in self._clients:
            self._clients[once] = self._fresh(once)
        return self._clients[once]


def connect(aws: Aws, region: str | None = None, *, session_name: str = "patchpilot") -> ElastiCache:
    """Reach ElastiCache as ``aws`` says. Nothing is asked yet.

    :param region: the cluster's own region, if it has one; else ``aws.region``, else boto3's own rules.
    :param session_name: what CloudTrail shows when a profile assumes a role: ``patchpilot-<run id>``.
    """

    def fresh(once: bool) -> ElastiCacheClient:
        return session(aws, session_name).client(
            "elasticache",
            region_name=region or aws.region,
            endpoint_url=aws.endpoint_url,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                retries={"mode": "standard", "total_max_attempts": 1 if once else 3},
                user_agent_extra=f"patchpilot/{__version__}",
            ),
        )

    return ElastiCache(fresh)


def session(aws: Aws, session_name: str) -> boto3.Session:
    """Credentials as ``aws`` says, read anew. Roles are assumed as ``session_name``, of which 64 characters count."""
    core = botocore.session.Session(profile=aws.profile)
    if aws.credentials_file:
        core.set_config_variable("credentials_file", str(aws.credentials_file))
    for profile in core.full_config.get("profiles", {}).values():
        if "role_arn" in profile:
            profile.setdefault("role_session_name", session_name[:64])
    return boto3.Session(botocore_session=core)
