"""ModifyReplicationGroup and ListAllowedNodeTypeModifications: what may be asked for, and what it comes to.

Only what rotates the nodes is modelled: engine, engine version, parameter group and node type. A change that is not
applied immediately is pending on every node, and the next one that is applied immediately applies it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchpilot.lab.world import Group

VERSIONS = {
    "redis": ("6.2", "7.0", "7.1"),
    "valkey": ("7.2", "8.0", "8.1", "8.2", "9.0", "9.1", "9.2"),
}
"""What the lab's account offers. What runs is always the Valkey that the lab has installed."""

NODE_TYPES = ("cache.m7g.large", "cache.m7g.xlarge", "cache.r7g.large", "cache.r7g.xlarge", "cache.r7g.2xlarge")

_WORDS = {"Engine": "engine", "EngineVersion": "engine_version", "CacheNodeType": "node_type"}


class Refusal(Exception):
    """AWS would not do it.

    :param code: the error code on the wire.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Change:
    """What every node is to become."""

    engine: str
    engine_version: str
    node_type: str


def asked(params: Mapping[str, Any]) -> dict[str, str]:
    """What a request wants changed, by the names of :class:`Change`."""
    return {name: params[word] for word, name in _WORDS.items() if params.get(word)}


def change(group: Group, wanted: Mapping[str, str]) -> Change:
    """What becomes of ``group`` when ``wanted`` is applied, with what is pending.

    :raises Refusal: the account does not offer it, or it would be a step back.
    """
    now = {"engine": group.engine, "engine_version": group.engine_version, "node_type": group.node_type}
    target = Change(**{**now, **group.pending, **wanted})
    if target.engine_version not in VERSIONS.get(target.engine, ()):
        raise Refusal("InvalidParameterCombination", f"Cannot find version {target.engine_version} for {target.engine}")
    if target.node_type not in {*NODE_TYPES, group.node_type}:
        raise Refusal("InvalidParameterValue", f"The node type {target.node_type} is not available")
    if (group.engine, target.engine) == ("valkey", "redis"):
        raise Refusal("InvalidParameterCombination", "An upgrade from valkey to redis is not supported")
    if target.engine == group.engine and _number(target.engine_version) < _number(group.engine_version):
        raise Refusal("InvalidParameterCombination", "An engine version cannot be downgraded")
    return target


def node_types(group: Group) -> tuple[list[str], list[str]]:
    """The larger and the smaller types that ``group`` may be given."""
    order = sorted({*NODE_TYPES, group.node_type}, key=_size)
    at = order.index(group.node_type)
    return order[at + 1 :], order[:at]


def _size(node_type: str) -> tuple[int, str]:
    sizes = ("large", "xlarge", "2xlarge")
    family, _, size = node_type.rpartition(".")
    return (sizes.index(size) if size in sizes else -1, family)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
