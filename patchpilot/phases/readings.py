"""Asking: an answer, or in its place the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from patchpilot.elasticache.facts import Group, Node
from patchpilot.errors import Refused, Transient
from patchpilot.phases.desk import Desk
from patchpilot.valkey.nodes import Report

T = TypeVar("T")

UNCONFIGURED = "no endpoint is configured"


def known(ask: Callable[[], T], *, patient: bool = False) -> T | str:
    """What ``ask`` answers, or why it does not: a request that is refused says something about this request alone.

    :param patient: let :class:`~patchpilot.errors.Transient` through, so that somebody tries again later.
    """
    try:
        return ask()
    except Refused as error:
        return str(error)
    except Transient as error:
        if patient:
            raise
        return str(error)


def made_of(nodes: tuple[Node, ...] | str) -> dict[str, Any]:
    """For the report: what each node runs and on what, as far as AWS says."""
    shown = () if isinstance(nodes, str) else nodes
    return {
        "engines": {node.node: node.engine for node in shown},
        "versions": {node.node: node.engine_version for node in shown},
        "node_types": {node.node: node.node_type for node in shown},
    }


def read_endpoint(desk: Desk) -> Report | str:
    """What whoever answers at the primary endpoint says of itself."""
    if desk.nodes is None:
        return UNCONFIGURED
    return known(desk.nodes.endpoint)


def read_members(desk: Desk, group: Group) -> dict[str, Report | str]:
    """What each member says of itself, by node."""
    return {member.node: _read_member(desk, member.host, member.port) for member in group.members if member.host}


def _read_member(desk: Desk, host: str, port: int) -> Report | str:
    nodes = desk.nodes
    return known(lambda: nodes.member(host, port)) if nodes else UNCONFIGURED
