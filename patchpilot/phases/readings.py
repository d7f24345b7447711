"""Asking the nodes: an answer, or in its place the reason why there is none."""

from __future__ import annotations

from patchpilot.elasticache.facts import Group
from patchpilot.errors import Transient
from patchpilot.phases.desk import Desk
from patchpilot.valkey.nodes import Report

UNCONFIGURED = "no endpoint is configured"


def read_endpoint(desk: Desk) -> Report | str:
    """What whoever answers at the primary endpoint says of itself."""
    if desk.nodes is None:
        return UNCONFIGURED
    try:
        return desk.nodes.endpoint()
    except Transient as error:
        return str(error)


def read_members(desk: Desk, group: Group) -> dict[str, Report | str]:
    """What each member says of itself, by node."""
    return {member.node: _read_member(desk, member.host, member.port) for member in group.members if member.host}


def _read_member(desk: Desk, host: str, port: int) -> Report | str:
    if desk.nodes is None:
        return UNCONFIGURED
    try:
        return desk.nodes.member(host, port)
    except Transient as error:
        return str(error)
