"""CloudWatch of a lab: two alarms that watch the group, as its owner would have made them, and some data points.

moto answers CloudWatch at the simulator's own address. Nothing evaluates the alarms: they are quiet until a rehearsal
sets them off with SetAlarmState.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import boto3

from patchpilot.clock import Clock

_NAMESPACE = "AWS/ElastiCache"
_MEGABYTE = 1024 * 1024


def watch(url: str, region: str, account: str, group: str, nodes: Sequence[str], clock: Clock) -> None:
    """Make the alarms of a group, and one data point for each metric of its nodes."""
    client: Any = boto3.client(
        "cloudwatch", endpoint_url=url, region_name=region,
        aws_access_key_id="lab", aws_secret_access_key="lab",  # noqa: S106 - the simulator's
    )  # fmt: skip
    with closing(client):
        for metric, above in (("DatabaseMemoryUsagePercentage", 80.0), ("ReplicationLag", 5.0)):
            client.put_metric_alarm(
                AlarmName=f"{group}-{metric}", Namespace=_NAMESPACE, MetricName=metric, Statistic="Maximum",
                Dimensions=[_node(nodes[-1])], Period=60, EvaluationPeriods=1, Threshold=above,
                ComparisonOperator="GreaterThanThreshold", AlarmActions=[f"arn:aws:sns:{region}:{account}:on-call"],
            )  # fmt: skip
        client.put_metric_data(Namespace=_NAMESPACE, MetricData=[
            {"MetricName": name, "Dimensions": [_node(node)], "Timestamp": clock.now(), "Value": value}
            for node in nodes
            for name, value in (
                ("DatabaseMemoryUsagePercentage", 1.0), ("ReplicationLag", 0.0), ("FreeableMemory", 500.0 * _MEGABYTE),
            )
        ])  # fmt: skip


def _node(name: str) -> dict[str, str]:
    return {"Name": "CacheClusterId", "Value": name}
