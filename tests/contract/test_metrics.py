"""The metric that can stop a rotation, read over real HTTP from the simulator's CloudWatch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from patchpilot.clock import SYSTEM
from patchpilot.elasticache import cloudwatch
from patchpilot.elasticache.metrics import Metrics
from patchpilot.errors import NeedsOperator, Refused
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.scenario import Scenario
from patchpilot.lab.world import World
from patchpilot.phases.abort import judge
from patchpilot.settings import Aws, Metric

REGION = "eu-central-1"
METRIC = Metric(namespace="Shop", name="Errors", dimensions={"Service": "checkout"}, points=2, above=100)


@pytest.fixture(autouse=True)
def own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Credentials in a file of the test's own, and none from wherever this machine keeps some."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = FIRST\naws_secret_access_key = secret\n")
    return file


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(World(region=REGION), {}, calls=tmp_path / "calls.jsonl") as cloud:
        yield cloud


def publish(cloud: Cloud, *values: tuple[datetime, float], service: str = "checkout") -> None:
    client: Any = boto3.client(  # type: ignore[call-overload]
        "cloudwatch", endpoint_url=cloud.url, region_name=REGION, aws_access_key_id="x", aws_secret_access_key="x"
    )
    with closing(client):
        rows = [
            {"MetricName": "Errors", "Dimensions": [{"Name": "Service", "Value": service}], "Timestamp": at, "Value": v}
            for at, v in values
        ]
        client.put_metric_data(Namespace="Shop", MetricData=rows)


def test_the_newest_values_newest_first_and_no_more_than_count(cloud: Cloud, own_credentials: Path) -> None:
    now = SYSTEM.now()
    aws = Aws(region=REGION, endpoint_url=cloud.url, credentials_file=own_credentials)
    metrics = Metrics(aws, None, METRIC)
    assert metrics.newest(now) == ()
    publish(cloud, *((now - timedelta(minutes=age), 100.0 + age) for age in (1, 2, 3)))
    publish(cloud, (now, 999.0), service="search")
    values = metrics.newest(now)
    assert values == (101.0, 102.0)
    assert metrics.newest(now, now - timedelta(minutes=1.5)) == (101.0,)
    assert metrics.newest(now, now - timedelta(minutes=0.5)) == ()
    assert judge(METRIC, values) == "Shop Errors is above 100: 101, 102"


def test_missing_credentials_are_a_persons_to_mend(cloud: Cloud, tmp_path: Path) -> None:
    aws = Aws(region=REGION, endpoint_url=cloud.url, credentials_file=tmp_path / "nothing")
    with pytest.raises(NeedsOperator, match="no complete AWS credentials"):
        Metrics(aws, None, METRIC).newest(SYSTEM.now())


def test_a_scenario_may_have_cloudwatch_fail(tmp_path: Path, own_credentials: Path) -> None:
    """By its operations' names; what is said of all operations is said of ElastiCache's."""
    failing = [
        {"operation": "GetMetric*", "code": "AccessDenied", "status": 403, "calls": 1},
        {"operation": "Describe*", "code": "InternalFailure", "status": 500},
        {"operation": "*", "code": "InternalFailure", "status": 500},
    ]
    scenario = Scenario.model_validate({"title": "t", "failing": failing})
    with Cloud(World(region=REGION), {}, calls=tmp_path / "calls.jsonl", scenario=scenario) as cloud:
        aws = Aws(region=REGION, endpoint_url=cloud.url, credentials_file=own_credentials)
        metrics = Metrics(aws, None, METRIC)
        with pytest.raises(Refused, match=r"denies access: .*GetMetricData: AccessDenied: The scenario wants it so"):
            metrics.newest(SYSTEM.now())
        metrics.newest(SYSTEM.now())  # moto keeps one CloudWatch for the whole process: whatever it says
        with cloudwatch.connect(aws) as monitoring:
            assert monitoring.alarms(["x"]) == ()


@pytest.mark.parametrize(
    ("limit", "values", "stops"),
    [
        ({"above": 100.0}, (101.0, 100.5), True),
        ({"above": 100.0}, (101.0, 100.0), False),
        ({"above": 100.0}, (101.0,), False),  # too few to be sure
        ({"below": 10.0}, (9.0, 0.0), True),
        ({"below": 10.0}, (9.0, 10.0), False),
    ],
)
def test_only_so_many_values_in_a_row_past_the_limit_stop_a_rotation(
    limit: dict[str, float], values: tuple[float, ...], stops: bool
) -> None:
    assert bool(judge(Metric(namespace="n", name="m", points=2, **limit), values)) is stops  # type: ignore[arg-type]
