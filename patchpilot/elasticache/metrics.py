"""What CloudWatch measures: the newest values of one metric."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from botocore.config import Config
from botocore.exceptions import ClientError

from patchpilot import __version__
from patchpilot.elasticache.calls import CONNECT_TIMEOUT, READ_TIMEOUT, session
from patchpilot.elasticache.faults import EXPIRED, code_of, translated
from patchpilot.settings import Aws, Metric

REACH = 10
"""How many periods to look back for each value that is asked for: CloudWatch publishes late, and not every period."""


class Metrics:
    """One metric of one account and region. Errors as for :class:`~patchpilot.elasticache.ElastiCache`."""

    def __init__(self, aws: Aws, region: str | None, metric: Metric, *, session_name: str = "patchpilot") -> None:
        self._aws, self._region, self._session_name = aws, region or aws.region, session_name
        self._metric = metric
        self._client: Any = None

    def newest(self, now: datetime, since: datetime | None = None) -> tuple[float, ...]:
        """The newest values, newest first; fewer than ``metric.points`` if CloudWatch has no more.

        :param since: count only values of periods that began no earlier than this.
        """
        query = {
            "Id": "m",
            "MetricStat": {
                "Metric": {
                    "Namespace": self._metric.namespace,
                    "MetricName": self._metric.name,
                    "Dimensions": [{"Name": key, "Value": value} for key, value in self._metric.dimensions.items()],
                },
                "Period": int(self._metric.period.total_seconds()),
                "Stat": self._metric.statistic,
            },
        }
        begin = now - REACH * self._metric.points * self._metric.period
        asked = {"MetricDataQueries": [query], "StartTime": begin, "EndTime": now, "ScanBy": "TimestampDescending"}
        with translated("GetMetricData", lambda: self._region, renewable=self._client is not None):
            [answer] = self._ask(asked)["MetricDataResults"]
        rows = zip(answer.get("Timestamps", ()), answer.get("Values", ()), strict=True)
        values = [value for at, value in rows if since is None or at >= since]
        return tuple(values[: self._metric.points])

    def _ask(self, asked: dict[str, Any]) -> Any:
        self._client = self._client or self._fresh()
        try:
            return self._client.get_metric_data(**asked)
        except ClientError as error:
            if code_of(error) not in EXPIRED:
                raise
        self._client = self._fresh()
        return self._client.get_metric_data(**asked)

    def _fresh(self) -> Any:
        config = Config(
            connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT, retries={"mode": "standard"},
            user_agent_extra=f"patchpilot/{__version__}",
        )  # fmt: skip
        where = {"region_name": self._region, "endpoint_url": self._aws.endpoint_url}
        return session(self._aws, self._session_name).client("cloudwatch", config=config, **where)  # type: ignore[call-overload]
