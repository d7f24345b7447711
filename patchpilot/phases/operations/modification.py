"""Engine version and node type: ``ModifyReplicationGroup``, applied at once, followed by what the nodes have become.

``ApplyImmediately`` applies every other modification that is pending as well, so nothing may be pending.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import replace
from datetime import datetime

from patchpilot.elasticache.facts import Application, Modification, Node
from patchpilot.engine.plan import Data
from patchpilot.errors import Blocked, NeedsOperator, NothingToDo
from patchpilot.phases.choice import Choice, Offer
from patchpilot.phases.operations.base import Operation, Sign, Standing, node_rows
from patchpilot.phases.order import Kind
from patchpilot.phases.sight import Sight


class _Modification(Operation):
    """Give every node something that it can be seen to have."""

    pending_as: str
    """What AWS calls it while it is pending on a node."""

    @abstractmethod
    def has(self, aim: Data, node: Node) -> bool:
        """Whether ``node`` has what is aimed at."""

    @abstractmethod
    def change(self, aim: Data) -> Modification:
        """The request, in AWS's words."""

    def baseline(self, aim: Data, sight: Sight) -> Data:
        return {
            "versions": {node.node: node.engine_version for node in sight.nodes},
            "types": {node.node: node.node_type for node in sight.nodes},
            "done": sorted(node.node for node in sight.nodes if self.has(aim, node)),
        }

    def standing(self, baseline: Data, sight: Sight, *, tried: bool) -> Standing:
        done = {node.node for node in sight.nodes if self.has(baseline["aim"], node)}
        doubtful = baseline.get("uncertain", False)
        sign, why = self._sign(set(baseline["done"]), done, sight, tried=tried, doubtful=doubtful)
        pending = _pending(sight)
        error = _flushed(pending) if sign is Sign.IMPOSSIBLE else None
        return Standing(sign, sight.group.status, why, rows=node_rows(sight.nodes, done), error=error)

    def _sign(self, before: set[str], done: set[str], sight: Sight, *, tried: bool, doubtful: bool) -> tuple[Sign, str]:
        """What ``sight`` means.

        :param doubtful: whether nobody knows if our request took effect: then it may be something else that makes the
            group busy, which is told apart when a node has what is aimed at, or all is calm again.
        """
        members = {member.node for member in sight.group.members}
        if not members or not members <= {node.node for node in sight.nodes}:
            return Sign.UNKNOWN, "AWS does not list every node at the moment"
        ours = any(self.pending_as in node.pending for node in sight.nodes)
        if members <= done and sight.calm and not ours:
            return Sign.OVER, ""
        if done - before or (tried and (ours or not (sight.calm or doubtful))):
            return Sign.RUNNING, ""
        if _pending(sight) and not tried:
            return Sign.IMPOSSIBLE, ""
        if not sight.calm:
            what = "the interrupted request or something else" if doubtful else "something else"
            return Sign.BUSY, f"{what} is under way: the group is {sight.group.status}"
        return Sign.READY, ""

    def start(self, baseline: Data) -> Application:
        return self.desk.cloud.modify(self.desk.group, self.change(baseline["aim"]))

    def _chosen(self, aim: dict[str, str], offer: Offer) -> Choice:
        """``aim``, unless every node has it. Somebody else is at it if some have, and the group is being modified."""
        group, nodes = offer.group, offer.nodes
        done = [node for node in nodes if self.has(aim, node)]
        ours = any(self.pending_as in node.pending for node in nodes)
        choice = Choice(operation=self.kind, aim=aim, running=not group.available and (bool(done) or ours))
        if nodes and len(done) == len(nodes) and group.available and not ours:
            if aim == offer.meant:
                return replace(choice, running=True)
            raise NothingToDo(f"every node of {group.id} has it already: {choice.what}")
        return choice


class EngineUpgrade(_Modification):
    """Another engine version, or Valkey in place of Redis."""

    kind = Kind.ENGINE_UPGRADE
    begins = "upgrade the engine, unless that runs already"
    pending_as = "EngineVersion"

    def choose(self, offer: Offer, now: datetime) -> Choice:
        order, group, nodes = self.desk.order, offer.group, offer.nodes
        engine = order.engine or group.engine
        aim = {"engine": engine, "engine_version": order.engine_version or ""}
        if order.parameter_group:
            aim["parameter_group"] = order.parameter_group
        choice = self._chosen(aim, offer)
        if (group.engine, engine) == ("valkey", "redis"):
            raise Blocked("a group cannot go back from valkey to redis: check --engine")
        newer = [n for n in nodes if n.engine == engine and _number(n.engine_version) > _number(aim["engine_version"])]
        newer = [node for node in newer if not self.has(aim, node)]
        if newer:
            raise Blocked(
                f"{newer[0].node} has {engine} {newer[0].engine_version} already, and an engine cannot be downgraded: "
                "check --engine-version"
            )
        return choice

    def has(self, aim: Data, node: Node) -> bool:
        wanted = aim["engine_version"]
        return node.engine == aim["engine"] and f"{node.engine_version}.".startswith(f"{wanted}.")

    def change(self, aim: Data) -> Modification:
        return Modification(
            engine=aim["engine"], engine_version=aim["engine_version"], parameter_group=aim.get("parameter_group", "")
        )


class NodeType(_Modification):
    """Another node type: larger, smaller or of another family."""

    kind = Kind.NODE_TYPE
    begins = "change the node type, unless that runs already"
    pending_as = "CacheNodeType"

    def choose(self, offer: Offer, now: datetime) -> Choice:
        aim = {"node_type": self.desk.order.node_type or ""}
        choice = self._chosen(aim, offer)
        if choice.adopted:
            return choice
        allowed = self.desk.cloud.node_types(self.desk.group)
        if aim["node_type"] not in allowed:
            raise Blocked(
                f"AWS does not allow {offer.group.id} to become {aim['node_type']} "
                f"(it allows: {', '.join(allowed) or 'nothing'}): check --node-type"
            )
        return choice

    def has(self, aim: Data, node: Node) -> bool:
        return bool(node.node_type == aim["node_type"])

    def change(self, aim: Data) -> Modification:
        return Modification(node_type=aim["node_type"])


def _pending(sight: Sight) -> list[str]:
    found = [f"{sight.group.id}: {', '.join(sight.group.pending)}"] if sight.group.pending else []
    return found + [f"{node.node}: {', '.join(node.pending)}" for node in sight.nodes if node.pending]


def _flushed(pending: list[str]) -> NeedsOperator:
    return NeedsOperator(
        f"a modification is pending ({'; '.join(pending)}), and this request would apply it as well: apply it or take "
        "it back first"
    )


def _number(version: str) -> tuple[int, ...]:
    """``8.0.1`` as numbers, to compare; what is no number counts as none."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
