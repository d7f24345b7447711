"""The calls that patchpilot makes of ElastiCache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

from patchpilot.clock import SYSTEM
from patchpilot.elasticache.calls import Calls, clients
from patchpilot.elasticache.facts import (
    IN_FLIGHT,
    Application,
    Event,
    Group,
    Modification,
    Node,
    ServiceUpdate,
    Snapshot,
    Unprocessed,
    UpdateAction,
)
from patchpilot.errors import Corrupt, Transient
from patchpilot.settings import Aws

if TYPE_CHECKING:
    from mypy_boto3_elasticache import ElastiCacheClient

EVENTS_KEPT = timedelta(days=14)
"""How far back AWS documents that DescribeEvents reaches."""

_PAGE = 100
_PAGE_OF_SNAPSHOTS = 50
"""What AWS allows at most."""

_EVENTS_MARGIN = timedelta(minutes=1)


class ElastiCache(Calls["ElastiCacheClient"]):
    """The ElastiCache API of one account and region. Errors as for :class:`~patchpilot.elasticache.calls.Calls`."""

    _answered: datetime | None = None  # when AWS last did, by its own clock

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

    def in_flight(self) -> tuple[UpdateAction, ...]:
        """The update actions that are under way in this region, of whatever group or cluster."""
        rows = self._pages("describe_update_actions", "UpdateActions", UpdateActionStatus=sorted(map(str, IN_FLIGHT)))
        return tuple(UpdateAction.of(row) for row in rows)

    def group(self, group: str) -> Group:
        """Replication group ``group``."""
        rows = self._pages("describe_replication_groups", "ReplicationGroups", ReplicationGroupId=group)
        if len(rows) != 1:
            raise Corrupt(f"AWS returned {len(rows)} replication groups called {group!r}")
        return replace(Group.of(rows[0]), answered=self._answered, heard=SYSTEM.now())

    def nodes(self, group: Group) -> tuple[Node, ...]:
        """The nodes of ``group`` as cache clusters of their own."""
        rows = [
            row
            for member in group.members
            for row in self._pages("describe_cache_clusters", "CacheClusters", CacheClusterId=member.node)
        ]
        return tuple(Node.of(row) for row in rows)

    def parameters(self, parameter_group: str) -> Mapping[str, str]:
        """The parameters of a parameter group and their values; those without a value are left out."""
        rows = self._pages("describe_cache_parameters", "Parameters", CacheParameterGroupName=parameter_group)
        return {row["ParameterName"]: row["ParameterValue"] for row in rows if row.get("ParameterValue")}

    def snapshots(self, group: str) -> tuple[Snapshot, ...]:
        """The snapshots of replication group ``group``: those that AWS took, those by hand, and those under way."""
        rows = self._pages("describe_snapshots", "Snapshots", ReplicationGroupId=group)
        return tuple(Snapshot.of(row) for row in rows)

    def events(self, sources: Collection[str], since: datetime, until: datetime) -> tuple[Event, ...]:
        """The events of ``sources`` (a replication group and its nodes), oldest first, each once.

        AWS publishes no bound on how late an event appears: ask for overlapping windows. Windows that begin more than
        14 days ago are cut, because AWS keeps no events for longer.
        """
        begin = max(since, until - EVENTS_KEPT + _EVENTS_MARGIN)
        rows = self._pages("describe_events", "Events", StartTime=begin, EndTime=until)
        return tuple(sorted({Event.of(row) for row in rows if row.get("SourceIdentifier") in sources}))

    def history(self, group: Group, until: datetime) -> tuple[Event, ...]:
        """All events that AWS still has of ``group`` and its nodes, oldest first, each once.

        Asked for source by source: two weeks of everybody's events are many pages.
        """
        begin = until - EVENTS_KEPT + _EVENTS_MARGIN
        sources = [("replication-group", group.id), *(("cache-cluster", member.node) for member in group.members)]
        rows = [
            row
            for kind, name in sources
            for row in self._pages(
                "describe_events", "Events", SourceType=kind, SourceIdentifier=name, StartTime=begin, EndTime=until
            )
        ]
        return tuple(sorted({Event.of(row) for row in rows}))

    def apply(self, update: str, group: str) -> Application:
        """Start ``update`` on replication group ``group``: one request, never repeated by the SDK.

        There is no idempotency token and AWS does not say what a second request does.

        :raises Transient: it may have taken effect or not.
        :raises Throttled: it did not.
        """
        return self._batch(
            "BatchApplyUpdateAction",
            lambda client: client.batch_apply_update_action(ServiceUpdateName=update, ReplicationGroupIds=[group]),
            group,
        )

    def stop(self, update: str, group: str) -> Application:
        """Stop ``update`` on replication group ``group``: nodes in progress are finished, nothing is rolled back.

        Errors as for :meth:`apply`.
        """
        return self._batch(
            "BatchStopUpdateAction",
            lambda client: client.batch_stop_update_action(ServiceUpdateName=update, ReplicationGroupIds=[group]),
            group,
        )

    def modify(self, group: str, change: Modification) -> Application:
        """Change replication group ``group`` at once: one request, never repeated by the SDK.

        ``ApplyImmediately`` applies every other modification that is pending as well: see first that there is none.

        Errors as for :meth:`apply`.

        :raises Corrupt: nothing is to be changed; such a request would only apply what is pending.
        """
        words = {
            "Engine": change.engine,
            "EngineVersion": change.engine_version,
            "CacheParameterGroupName": change.parameter_group,
            "CacheNodeType": change.node_type,
        }
        asked: dict[str, Any] = {name: value for name, value in words.items() if value}
        if not asked:
            raise Corrupt(f"asked to modify {group} without a change")
        answer = self._call(
            "ModifyReplicationGroup",
            lambda client: client.modify_replication_group(ReplicationGroupId=group, ApplyImmediately=True, **asked),
            once=True,
        )
        return Application(answer.get("ReplicationGroup", {}).get("Status", ""))

    def test_failover(self, group: str, node_group: str) -> Application:
        """Fail the primary of ``node_group`` over, as AWS does in a rotation: one request. Errors as for :meth:`apply`.

        AWS allows 15 node groups in 24 hours, and throttles after that.
        """
        answer = self._call(
            "TestFailover",
            lambda client: client.test_failover(ReplicationGroupId=group, NodeGroupId=node_group),
            once=True,
        )
        return Application(answer.get("ReplicationGroup", {}).get("Status", ""))

    def node_types(self, group: str) -> tuple[str, ...]:
        """The node types that ``group`` may be given, larger and smaller ones."""
        answer = self._call(
            "ListAllowedNodeTypeModifications",
            lambda client: client.list_allowed_node_type_modifications(ReplicationGroupId=group),
        )
        return tuple(sorted({*answer.get("ScaleUpModifications", ()), *answer.get("ScaleDownModifications", ())}))

    def engine_versions(self, engine: str) -> tuple[str, ...]:
        """The versions of ``engine`` that AWS offers in this region."""
        rows = self._pages("describe_cache_engine_versions", "CacheEngineVersions", Engine=engine)
        return tuple(row["EngineVersion"] for row in rows if row.get("EngineVersion"))

    def _batch(self, action: str, ask: Callable[[ElastiCacheClient], Any], group: str) -> Application:
        """The part of the answer that is about ``group``; both lists may hold something at once."""
        answer = self._call(action, ask, once=True)
        for row in answer.get("ProcessedUpdateActions", ()):
            if row.get("ReplicationGroupId") == group:
                return Application(row.get("UpdateActionStatus", ""))
        for row in answer.get("UnprocessedUpdateActions", ()):
            if row.get("ReplicationGroupId") == group:
                return Application(None, Unprocessed(row.get("ErrorType", ""), row.get("ErrorMessage", "")))
        raise Transient(f"{action}: the answer does not mention {group}")

    def _pages(
        self,
        operation: Literal[
            "describe_service_updates",
            "describe_update_actions",
            "describe_replication_groups",
            "describe_cache_clusters",
            "describe_cache_parameters",
            "describe_snapshots",
            "describe_events",
            "describe_cache_engine_versions",
        ],
        key: str,
        **params: Any,
    ) -> list[Any]:
        """All pages of an answer in one list."""

        def ask(client: ElastiCacheClient) -> list[Any]:
            size = _PAGE_OF_SNAPSHOTS if operation == "describe_snapshots" else _PAGE
            pages: Any = client.get_paginator(operation).paginate(PaginationConfig={"PageSize": size}, **params)
            rows: list[Any] = []
            for page in pages:
                rows += page.get(key, ())
                self._answered = _date(page)
            return rows

        return self._call("".join(word.capitalize() for word in operation.split("_")), ask)


def _date(page: Mapping[str, Any]) -> datetime | None:
    """When AWS made this answer, by its own clock."""
    header = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        return parsedate_to_datetime(header).astimezone(UTC) if header else None
    except ValueError:
        return None


def connect(aws: Aws, region: str | None = None, *, session_name: str = "patchpilot") -> ElastiCache:
    """Reach ElastiCache as ``aws`` says. Nothing is asked yet. Parameters as for
    :func:`~patchpilot.elasticache.calls.clients`."""
    return ElastiCache(clients("elasticache", aws, region, session_name))
