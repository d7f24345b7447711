"""The policies that we ship: each action exists, and every call that we make is allowed by one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore import xform_name

import patchpilot.elasticache

POLICIES = Path(__file__).parents[2] / "docs" / "iam"
SOURCES = Path(patchpilot.elasticache.__file__).parent


def actions(name: str) -> set[str]:
    policy: dict[str, Any] = json.loads((POLICIES / f"{name}.json").read_text())
    assert policy["Version"] == "2012-10-17"
    assert all(statement["Effect"] == "Allow" and statement["Resource"] for statement in policy["Statement"])
    return {action for statement in policy["Statement"] for action in statement["Action"]}


def operations(service: str) -> dict[str, str]:
    """Method name -> action."""
    model = botocore.session.get_session().get_service_model(service)
    return {xform_name(name): f"{service}:{name}" for name in model.operation_names}


@pytest.mark.parametrize("name", ["read", "apply", "optional"])
def test_every_action_exists(name: str) -> None:
    known = {*operations("elasticache").values(), *operations("cloudwatch").values()}
    assert actions(name) <= known


def changes(action: str) -> bool:
    return not re.match(r"\w+:(Describe|Get|List)", action)


def test_reading_changes_nothing_and_no_group_is_changed_that_is_not_tagged() -> None:
    assert not any(map(changes, actions("read")))
    for name in ("apply", "optional"):
        for statement in json.loads((POLICIES / f"{name}.json").read_text())["Statement"]:
            limited = statement.get("Condition") == {"StringEquals": {"aws:ResourceTag/patchpilot": "may-patch"}}
            of_groups = re.search(r'replicationgroup:|cluster:|"\*"', json.dumps(statement["Resource"]))
            assert limited or not of_groups or not any(map(changes, statement["Action"])), statement["Sid"]


def test_every_call_is_allowed() -> None:
    known = {**operations("elasticache"), **operations("cloudwatch")}
    words = {word for path in SOURCES.glob("*.py") for word in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", path.read_text())}
    called = {known[word] for word in words & known.keys()}
    assert "elasticache:BatchApplyUpdateAction" in called
    assert "cloudwatch:DescribeAlarms" in called
    reads = {action for action in called if not changes(action)}
    assert reads <= actions("read") | actions("optional")
    assert called - reads <= actions("apply") | actions("optional")
    assert actions("read") <= called, "what is not called any more need not be allowed"
