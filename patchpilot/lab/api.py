"""The ElastiCache operations of the simulator: parameters in, answer out, no HTTP.

Parameters and answers are dictionaries in the words of botocore's model. What AWS documents is followed; what it leaves
open (error types of unprocessed actions, the order of events) is chosen here and nobody may rely on it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from patchpilot.lab import modifications, rows
from patchpilot.lab.world import AVAILABLE, NODE, ActionKey, Group, UpdateAction, View, World

Params = Mapping[str, Any]
Answer = dict[str, Any]

_MOST_IDS = 20
_PAGE = range(20, 101)
_SNAPSHOT_PAGE = range(20, 51)
_SNAPSHOT_SOURCES = {"automated": "system", "manual": "user"}
"""What a snapshot says that it is, and what one asks for."""
_EVENTS_KEPT = timedelta(days=14)
_EVENTS_DEFAULT = timedelta(hours=1)
_SOURCE_TYPES = ("cache-cluster", "replication-group")


class Fault(Exception):
    """An error answer.

    :param code: the error code on the wire, as botocore's model has it.
    :param status: the HTTP status; by default what the model says.
    """

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


class Operator(Protocol):
    """Whoever works on the nodes of one group. Both methods return at once and work in the background."""

    def rotate(self, update: str) -> None:
        """Apply an update to the nodes that do not have it yet; the action is `waiting-to-start`."""

    def test_failover(self) -> None:
        """Fail over; the group is `modifying` already."""

    def modify(self, target: modifications.Change) -> None:
        """Make every node what ``target`` says; the group is `modifying` already."""


class Api:
    """The operations.

    :param operators: by replication group id; a group without one can be described and not changed.
    :param most_rows: on one page, however many are asked for.
    """

    def __init__(self, world: World, operators: Mapping[str, Operator], *, most_rows: int | None = None) -> None:
        self._world = world
        self._operators = operators
        self._most_rows = most_rows or _PAGE[-1]
        self._reads: dict[str, Callable[[Params, View], Answer]] = {
            "DescribeReplicationGroups": self._replication_groups,
            "DescribeCacheClusters": self._cache_clusters,
            "DescribeCacheParameters": self._cache_parameters,
            "DescribeSnapshots": self._snapshots,
            "DescribeServiceUpdates": self._service_updates,
            "DescribeUpdateActions": self._update_actions,
            "DescribeEvents": self._events,
            "DescribeCacheEngineVersions": self._engine_versions,
            "ListAllowedNodeTypeModifications": self._node_types,
        }
        self._writes: dict[str, Callable[[Params], Answer]] = {
            "BatchApplyUpdateAction": self._apply,
            "BatchStopUpdateAction": self._stop,
            "TestFailover": self._test_failover,
            "ModifyReplicationGroup": self._modify,
        }

    def answers(self, operation: str) -> bool:
        """Whether this is one of the operations."""
        return operation in self._reads or operation in self._writes

    def answer(self, operation: str, params: Params, view: View | None = None) -> Answer:
        """Perform an operation.

        :param view: what an operation that reads gets to see; by default what is so now.
        :raises Fault: for an error answer.
        """
        if operation in self._reads:
            return self._reads[operation](params, view or self._world.view())
        return self._writes[operation](params)

    def _replication_groups(self, params: Params, view: View) -> Answer:
        wanted = params.get("ReplicationGroupId")
        chosen = [self._group(view.groups, wanted)] if wanted else view.groups.values()
        found = [rows.replication_group(self._world, group) for group in chosen]
        return self._page("ReplicationGroups", found, params)

    def _cache_clusters(self, params: Params, view: View) -> Answer:
        groups = view.groups.values()
        wanted, nodes = params.get("CacheClusterId"), bool(params.get("ShowCacheNodeInfo"))
        found = [
            rows.cache_cluster(self._world, group, member, nodes=nodes)
            for group in groups
            for member in group.members
            if wanted in (None, member.cluster_id)
        ]
        if wanted and not found:
            raise Fault("CacheClusterNotFound", f"CacheCluster not found: {wanted}")
        if params.get("ShowCacheClustersNotInReplicationGroups"):
            found = []
        return self._page("CacheClusters", found, params)

    def _cache_parameters(self, params: Params, view: View) -> Answer:
        wanted, source = params.get("CacheParameterGroupName"), params.get("Source")
        groups = [group for group in view.groups.values() if group.parameter_group == wanted]
        if not groups:
            raise Fault("CacheParameterGroupNotFound", f"CacheParameterGroup {wanted} not found")
        found = [rows.parameter(name, value) for name, value in sorted(groups[0].parameters.items())]
        return self._page("Parameters", [row for row in found if source in (None, row["Source"])], params)

    def _snapshots(self, params: Params, view: View) -> Answer:
        wanted, name, source = (params.get(key) for key in ("ReplicationGroupId", "SnapshotName", "SnapshotSource"))
        found = [
            rows.snapshot(self._world, group, taken)
            for group in view.groups.values()
            for taken in group.snapshots
            # A snapshot of a group is not one of a cache cluster: a filter by that selects none.
            if wanted in (None, group.group_id)
            and name in (None, taken.name)
            and source in (None, _SNAPSHOT_SOURCES.get(taken.source))
            and not params.get("CacheClusterId")
        ]
        if name and not found:
            raise Fault("SnapshotNotFoundFault", f"Snapshot {name} not found")
        return self._page("Snapshots", found, params, _SNAPSHOT_PAGE)

    def _service_updates(self, params: Params, view: View) -> Answer:
        updates = view.updates
        wanted, statuses = params.get("ServiceUpdateName"), params.get("ServiceUpdateStatus")
        if wanted and wanted not in updates:
            raise Fault("ServiceUpdateNotFoundFault", f"Service update {wanted} not found")
        found = [
            rows.service_update(update)
            for name, update in updates.items()
            if wanted in (None, name) and (not statuses or update.status in statuses)
        ]
        return self._page("ServiceUpdates", found, params)

    def _update_actions(self, params: Params, view: View) -> Answer:
        nodes = bool(params.get("ShowNodeLevelUpdateStatus"))
        found = [
            rows.update_action(action, view.updates[action.update], nodes=nodes)
            for action in view.actions.values()
            if _selected(view, action, params)
        ]
        return self._page("UpdateActions", found, params)

    def _events(self, params: Params, view: View) -> Answer:
        begin, end = self._window(params)
        kind, source = params.get("SourceType"), params.get("SourceIdentifier")
        found = [
            rows.event(event)
            for event in view.events
            if begin <= event.date <= end and kind in (None, event.source_type) and source in (None, event.source)
        ]
        return self._page("Events", found, params)

    def _window(self, params: Params) -> tuple[datetime, datetime]:
        now = self._world.clock.now()
        begin, end, minutes = params.get("StartTime"), params.get("EndTime"), params.get("Duration")
        length = timedelta(minutes=minutes) if minutes else _EVENTS_DEFAULT
        if begin is not None:
            begin = _aware(begin)
            upto = _aware(end) if end is not None else begin + length if minutes else now
        else:
            upto = _aware(end) if end is not None else now
            begin = upto - length
        if begin > upto:
            raise Fault("InvalidParameterCombination", "StartTime must not be after EndTime")
        return max(begin, now - _EVENTS_KEPT), upto

    def _apply(self, params: Params) -> Answer:
        def start(key: ActionKey) -> UpdateAction | None:
            update, group_id = key
            possible = group_id in self._operators and not self._over(update)
            started = self._world.start_action(key) if possible else None
            if started is not None:
                self._operators[group_id].rotate(update)
            return started

        return self._batch(params, start, "applied")

    def _over(self, update: str) -> bool:
        """Whether a service update cannot be applied any more, whatever the status of its actions."""
        about = self._world.view().updates[update]
        return about.status != AVAILABLE or about.ends <= self._world.clock.now()

    def _stop(self, params: Params) -> Answer:
        return self._batch(params, self._world.stop_action, "stopped")

    def _batch(self, params: Params, change: Callable[[ActionKey], UpdateAction | None], done: str) -> Answer:
        update = params.get("ServiceUpdateName", "")
        if update not in self._world.view().updates:
            raise Fault("ServiceUpdateNotFoundFault", f"Service update {update} not found")
        groups, clusters = params.get("ReplicationGroupIds") or [], params.get("CacheClusterIds") or []
        if not groups and not clusters:
            raise Fault("InvalidParameterValue", "Give ReplicationGroupIds or CacheClusterIds")
        if len(groups) > _MOST_IDS or len(clusters) > _MOST_IDS:
            raise Fault("InvalidParameterValue", f"At most {_MOST_IDS} ids in one call")
        processed, unprocessed = [], [_unprocessed_cluster(update, cluster) for cluster in clusters]
        for group_id in groups:
            action = self._world.view().actions.get((update, group_id))
            changed = change((update, group_id)) if action else None
            if changed is not None:
                processed.append(
                    {
                        "ReplicationGroupId": group_id,
                        "ServiceUpdateName": update,
                        "UpdateActionStatus": changed.status,
                    }
                )
            else:
                unprocessed.append(self._unprocessed(update, group_id, done))
        return {"ProcessedUpdateActions": processed, "UnprocessedUpdateActions": unprocessed}

    def _unprocessed(self, update: str, group_id: str, done: str) -> Answer:
        view = self._world.view()
        action = view.actions.get((update, group_id))
        if action is not None and done == "applied" and self._over(update):
            kind, text = "ServiceUpdateExpired", f"Service update {update} cannot be applied any more"
        elif action is not None:
            kind = "InvalidUpdateActionState"
            status = view.groups[group_id].status
            text = f"The update action is {action.status} and the group {status}: it cannot be {done} now"
        elif group_id in view.groups:
            kind, text = "UpdateActionNotFound", f"{update} does not apply to replication group {group_id}"
        else:
            kind, text = "ReplicationGroupNotFoundFault", f"ReplicationGroup {group_id} not found."
        row = {"ReplicationGroupId": group_id, "ServiceUpdateName": update}
        return {**row, "ErrorType": kind, "ErrorMessage": text}

    def _test_failover(self, params: Params) -> Answer:
        group = self._group(self._world.view().groups, params.get("ReplicationGroupId"))
        if params.get("NodeGroupId") != NODE:
            raise Fault("NodeGroupNotFoundFault", f"Node group {params.get('NodeGroupId')} not found")
        if group.group_id not in self._operators:
            raise Fault("TestFailoverNotAvailableFault", f"Replication group {group.group_id} has no nodes")
        if not self._world.claim(group.group_id):
            raise Fault("InvalidReplicationGroupState", f"Replication group {group.group_id} is not available")
        self._operators[group.group_id].test_failover()
        changed = self._world.view().groups[group.group_id]
        return {"ReplicationGroup": rows.replication_group(self._world, changed)}

    def _modify(self, params: Params) -> Answer:
        group = self._group(self._world.view().groups, params.get("ReplicationGroupId"))
        wanted = modifications.asked(params)
        try:
            target = modifications.change(group, wanted)
        except modifications.Refusal as refusal:
            raise Fault(refusal.code, refusal.message) from refusal
        if not params.get("ApplyImmediately"):
            self._world.modify_group(group.group_id, pending={**group.pending, **wanted})
        elif wanted or group.pending:
            if group.group_id not in self._operators or not self._world.claim(group.group_id):
                raise Fault("InvalidReplicationGroupState", f"Replication group {group.group_id} is not available")
            self._operators[group.group_id].modify(target)
        changed = self._world.view().groups[group.group_id]
        return {"ReplicationGroup": rows.replication_group(self._world, changed)}

    def _engine_versions(self, params: Params, _view: View) -> Answer:
        wanted = {name: params.get(name) for name in ("Engine", "EngineVersion", "CacheParameterGroupFamily")}
        found = [
            row
            for engine, versions in modifications.VERSIONS.items()
            for version in (versions[-1:] if params.get("DefaultOnly") else versions)
            for row in [rows.engine_version(engine, version)]
            if all(value in (None, row[name]) for name, value in wanted.items())
        ]
        return self._page("CacheEngineVersions", found, params)

    def _node_types(self, params: Params, view: View) -> Answer:
        group = self._group(view.groups, params.get("ReplicationGroupId"))
        larger, smaller = modifications.node_types(group)
        return {"ScaleUpModifications": larger, "ScaleDownModifications": smaller}

    def _page(self, key: str, found: list[rows.Row], params: Params, sizes: range = _PAGE) -> Answer:
        """One page of ``found``. A marker is good for the same question only, whatever was appended since."""
        size = params.get("MaxRecords") or sizes[-1]
        if size not in sizes:
            raise Fault("InvalidParameterValue", f"MaxRecords must be from {sizes[0]} to {sizes[-1]}")
        size = min(size, self._most_rows)
        question = {name: value for name, value in params.items() if name not in ("Marker", "MaxRecords")}
        digest = hashlib.sha256(json.dumps([key, question], sort_keys=True, default=str).encode()).hexdigest()[:16]
        start = _start(params["Marker"], digest) if params.get("Marker") else 0
        answer: Answer = {key: found[start : start + size]}
        if start + size < len(found):
            answer["Marker"] = base64.urlsafe_b64encode(f"{digest}:{start + size}".encode()).decode()
        return answer

    @staticmethod
    def _group(groups: Mapping[str, Group], group_id: str | None) -> Group:
        group = groups.get(group_id or "")
        if group is None:
            raise Fault("ReplicationGroupNotFoundFault", f"ReplicationGroup {group_id} not found.")
        return group


def _selected(view: View, action: UpdateAction, params: Params) -> bool:
    update = view.updates[action.update]
    released: Params = params.get("ServiceUpdateTimeRange") or {}
    begin, end = released.get("StartTime"), released.get("EndTime")
    return all(
        (
            params.get("ServiceUpdateName") in (None, action.update),
            # Every action here is a replication group's; a filter by cache clusters alone selects none.
            _among(action.group_id, params.get("ReplicationGroupIds"))
            and not (params.get("CacheClusterIds") and not params.get("ReplicationGroupIds")),
            params.get("Engine") in (None, update.engine),
            _among(update.status, params.get("ServiceUpdateStatus")),
            _among(action.status, params.get("UpdateActionStatus")),
            begin is None or _aware(begin) <= update.released,
            end is None or update.released <= _aware(end),
        )
    )


def _among(value: str, wanted: Iterable[str] | None) -> bool:
    return not wanted or value in wanted


def _unprocessed_cluster(update: str, cluster_id: str) -> Answer:
    return {
        "CacheClusterId": cluster_id,
        "ServiceUpdateName": update,
        "ErrorType": "InvalidParameterCombination",
        "ErrorMessage": f"{cluster_id} belongs to a replication group: name the group instead",
    }


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _start(marker: str, digest: str) -> int:
    try:
        of, _, start = base64.urlsafe_b64decode(marker).decode().partition(":")
        if of == digest:
            return int(start)
    except (binascii.Error, ValueError):
        pass
    raise Fault("InvalidParameterValue", f"Marker {marker} is not valid for this request")
