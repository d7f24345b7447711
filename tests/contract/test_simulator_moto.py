"""The seams of moto that the simulator uses, and that moto promises to nobody. If one is gone: see lab/cloud.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
from botocore.exceptions import ClientError
from moto.core.responses import ActionResult, BaseResponse
from moto.elasticache import urls
from moto.elasticache.exceptions import ElastiCacheException
from moto.elasticache.responses import ElastiCacheResponse

from patchpilot.lab.cloud import Cloud, LabResponse
from patchpilot.lab.world import World

OURS = (
    "describe_cache_parameters",
    "describe_service_updates",
    "describe_update_actions",
    "describe_events",
    "batch_apply_update_action",
    "batch_stop_update_action",
    "test_failover",
)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A simulator of an empty account."""
    with Cloud(World(), {}, calls=tmp_path / "calls.jsonl") as cloud:
        yield cloud


def test_moto_is_the_one_that_was_read() -> None:
    assert version("moto") == "5.2.5"


def test_moto_has_the_seams() -> None:
    assert list(urls.url_paths) == ["{0}/$"]
    assert ElastiCacheResponse().automated_parameter_parsing
    for name in ("dispatch", "call_action", "serialized", "_get_action", "setup_class"):
        assert callable(getattr(BaseResponse, name)), name
    error = ElastiCacheException("SomeCode", "some message")
    assert (error.code, error.message) == ("SomeCode", "some message")
    assert ActionResult({"Events": []}).result == {"Events": []}


@pytest.mark.parametrize("operation", OURS)
def test_moto_still_lacks_what_the_lab_adds(operation: str) -> None:
    assert not hasattr(ElastiCacheResponse, operation)
    assert hasattr(LabResponse, operation)


def test_a_server_of_ours_dispatches_to_us_and_logs_the_call(cloud: Cloud, elasticache: Callable[..., Any]) -> None:
    client = elasticache(cloud.url)
    assert client.describe_events(Duration=5)["Events"] == []
    (call,) = map(json.loads, cloud.calls.read_text(encoding="utf-8").splitlines())
    assert (call["action"], call["parameters"]) == ("DescribeEvents", {"Duration": 5})
    assert call["time"].endswith("+00:00")


def test_two_servers_in_one_process_are_two_accounts(
    cloud: Cloud, tmp_path: Path, elasticache: Callable[..., Any]
) -> None:
    with Cloud(World(), {}, calls=tmp_path / "other.jsonl") as other:
        other.world.publish("replication-group", "somebody", "something")
        assert len(elasticache(other.url).describe_events()["Events"]) == 1
        assert elasticache(cloud.url).describe_events()["Events"] == []


def test_another_region_is_empty(cloud: Cloud, elasticache: Callable[..., Any]) -> None:
    cloud.world.publish("replication-group", "somebody", "something")
    assert elasticache(cloud.url, region="us-west-2").describe_events()["Events"] == []


def test_what_nobody_models_is_an_error_and_no_html(cloud: Cloud, elasticache: Callable[..., Any]) -> None:
    with pytest.raises(ClientError) as caught:
        elasticache(cloud.url).describe_reserved_cache_nodes()
    assert caught.value.response["Error"]["Code"] == "InvalidParameterValue"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert caught.value.response["ResponseMetadata"]["RetryAttempts"] == 0


def test_what_moto_models_is_still_answered_by_moto(cloud: Cloud, elasticache: Callable[..., Any]) -> None:
    users = elasticache(cloud.url).describe_users()["Users"]
    assert [user["UserId"] for user in users] == ["default"]
    with closing(
        boto3.client(
            "sts",
            endpoint_url=cloud.url,
            region_name="eu-central-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
    ) as sts:
        assert sts.get_caller_identity()["Account"] == cloud.world.account


def test_motos_own_mock_is_left_as_it_was(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with moto.mock_aws(), closing(boto3.client("elasticache", region_name="eu-central-1")) as client:
        assert client.describe_replication_groups()["ReplicationGroups"] == []
        with pytest.raises(NotImplementedError):
            client.describe_events()
    assert not cloud.calls.exists()
