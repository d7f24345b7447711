"""What CloudWatch says of a replication group's nodes: alarms and metrics, as frozen facts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from patchpilot.elasticache.calls import Calls, clients
from patchpilot.settings import Aws

if TYPE_CHECKING:
    from mypy_boto3_cloudwatch import CloudWatchClient

NAMESPACE = "AWS/ElastiCache"

MEMORY = "DatabaseMemoryUsagePercentage"
LAG = "ReplicationLag"
FREEABLE = "FreeableMemory"
METRICS: Mapping[str, str] = {MEMORY: "Maximum", LAG: "Maximum", FREEABLE: "Minimum"}
"""What is read of each node, and which statistic is the worst."""

RECENT = timedelta(minutes=15)
"""How far back metrics are read. ElastiCache publishes one data point a minute, some minutes late."""

_PERIOD = 60
_PAGE = 100
_MOST_QUERIES = 500
_DIMENSIONS = frozenset({"CacheClusterId", "ReplicationGroupId"})


class AlarmState(StrEnum):
    """``StateValue`` of an alarm."""

    OK = "OK"
    ALARM = "ALARM"
    INSUFFICIENT_DATA = "INSUFFICIENT_DATA"


@dataclass(frozen=True, order=True)
class Alarm:
    """One metric alarm."""

    name: str
    state: str
    """See :class:`AlarmState`; anything else is kept verbatim."""
    tells: bool
    """Whether anybody hears of it when it fires: its actions are enabled, and there are some."""
    reason: str = ""
    """AWS's own words."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Alarm:
        return cls(
            name=row.get("AlarmName", ""),
            state=row.get("StateValue", ""),
            tells=bool(row.get("ActionsEnabled") and row.get("AlarmActions")),
            reason=row.get("StateReason", ""),
        )


@dataclass(frozen=True)
class Metric:
    """The worst value of one metric of one node in the last while."""

    name: str
    node: str
    worst: float
    at: datetime
    """When the newest data point was taken."""


class CloudWatch(Calls["CloudWatchClient"]):
    """The CloudWatch API of one account and region. Errors as for :class:`~patchpilot.elasticache.calls.Calls`."""

    def alarms(self, about: Collection[str]) -> tuple[Alarm, ...]:
        """The metric alarms that watch a replication group or a node of these names.

        AWS selects alarms by name only, so all of them are read. Composite alarms are left out: what they are about
        is in the alarms that they are made of.
        """

        def ask(client: CloudWatchClient) -> list[Any]:
            pages: Any = client.get_paginator("describe_alarms").paginate(
                AlarmTypes=["MetricAlarm"], PaginationConfig={"PageSize": _PAGE}
            )
            return [row for page in pages for row in page.get("MetricAlarms", ())]

        rows = self._call("DescribeAlarms", ask)
        return tuple(sorted(Alarm.of(row) for row in rows if not set(about).isdisjoint(_watched(row))))

    def metrics(self, nodes: Collection[str], until: datetime) -> tuple[Metric, ...]:
        """The worst of each of :data:`METRICS` for each of ``nodes`` in the last 15 minutes.

        A metric without a data point is left out.
        """
        asked = [(name, node) for node in sorted(nodes) for name in METRICS]

        def ask(client: CloudWatchClient) -> list[Any]:
            found: list[Any] = []
            for start in range(0, len(asked), _MOST_QUERIES):
                queries: Any = [
                    _query(f"m{number}", *asked[number])
                    for number in range(start, min(start + _MOST_QUERIES, len(asked)))
                ]
                pages: Any = client.get_paginator("get_metric_data").paginate(
                    MetricDataQueries=queries, StartTime=until - RECENT, EndTime=until + timedelta(minutes=1)
                )
                found += [row for page in pages for row in page.get("MetricDataResults", ())]
            return found

        return tuple(
            _metric(row, *asked[int(row["Id"][1:])]) for row in self._call("GetMetricData", ask) if row.get("Values")
        )


def connect(aws: Aws, region: str | None = None, *, session_name: str = "patchpilot") -> CloudWatch:
    """Reach CloudWatch as ``aws`` says. Nothing is asked yet. Parameters as for
    :func:`~patchpilot.elasticache.calls.clients`."""
    return CloudWatch(clients("cloudwatch", aws, region, session_name))


def _watched(alarm: Mapping[str, Any]) -> Iterator[str]:
    """The names of what an alarm is about; one on a metric expression may be about many."""
    metrics = [alarm, *(query.get("MetricStat", {}).get("Metric", {}) for query in alarm.get("Metrics", ()))]
    for metric in metrics:
        yield from (each["Value"] for each in metric.get("Dimensions", ()) if each.get("Name") in _DIMENSIONS)


def _query(key: str, name: str, node: str) -> dict[str, Any]:
    dimensions = [{"Name": "CacheClusterId", "Value": node}]
    metric = {"Namespace": NAMESPACE, "MetricName": name, "Dimensions": dimensions}
    return {"Id": key, "MetricStat": {"Metric": metric, "Period": _PERIOD, "Stat": METRICS[name]}}


def _metric(row: Mapping[str, Any], name: str, node: str) -> Metric:
    worst = min(row["Values"]) if METRICS[name] == "Minimum" else max(row["Values"])
    return Metric(name, node, float(worst), max(row["Timestamps"]).astimezone(UTC))
