"""Checks of the replication group and its nodes. Pure."""

from __future__ import annotations

from patchpilot.elasticache.facts import AVAILABLE
from patchpilot.phases.checks.situation import Judgement, Row, Situation, Verdict, prefer, require, unknown

SYNC = "sync"
"""The ``EffectiveDurability`` that loses no acknowledged write."""


def _group_available(at: Situation) -> Judgement:
    return require(at.group.available, f"group {at.group.status}, shards {', '.join(at.group.node_groups) or 'none'}")


def _nodes_available(at: Situation) -> Judgement:
    if isinstance(at.nodes, str):
        return unknown(at.nodes)
    ok = bool(at.nodes) and all(node.status == AVAILABLE for node in at.nodes)
    return require(ok, ", ".join(f"{node.node} {node.status}" for node in at.nodes) or "AWS lists no node")


def _nothing_pending(at: Situation) -> Judgement:
    pending = [f"{at.group.id}: {', '.join(at.group.pending)}"] if at.group.pending else []
    if isinstance(at.nodes, str):
        return require(False, pending[0]) if pending else unknown(at.nodes)
    pending += [f"{node.node}: {', '.join(node.pending)}" for node in at.nodes if node.pending]
    return require(not pending, "; ".join(pending) or "no pending modification")


def _automatic_failover(at: Situation) -> Judgement:
    return require(at.group.automatic_failover == "enabled", at.group.automatic_failover or "not reported")


def _multi_az(at: Situation) -> Judgement:
    zones = ", ".join(sorted({member.zone for member in at.group.members if member.zone})) or "no zone reported"
    return prefer(at.group.multi_az == "enabled", f"{at.group.multi_az or 'not reported'} ({zones})")


def _zones(at: Situation) -> Judgement:
    """Some replica is in another zone than the primary; while no node is called the primary, than some other node."""
    members = at.group.members
    if len(members) < 2:
        return Verdict.PASS, "there is no replica to be elsewhere"
    homes = {member.zone for member in members if member.node == at.group.primary} or {members[0].zone}
    evidence = ", ".join(f"{member.node} in {member.zone or 'a zone that AWS does not name'}" for member in members)
    return prefer(any(member.zone and member.zone not in homes for member in members) and "" not in homes, evidence)


def _has_replica(at: Situation) -> Judgement:
    return require(len(at.group.members) >= 2, f"{len(at.group.members)} nodes")


def _one_shard(at: Situation) -> Judgement:
    shards = len(at.group.node_groups)
    mode = {True: "enabled", False: "disabled", None: "not reported"}[at.group.cluster_enabled]
    return require(shards == 1 and not at.group.cluster_enabled, f"{shards} shard(s), cluster mode {mode}")


def _no_global_datastore(at: Situation) -> Judgement:
    return require(not at.group.global_datastore, at.group.global_datastore or "no member of a Global Datastore")


def _durability(at: Situation) -> Judgement:
    """Never a reason to stop: a broker of Celery's cannot be durable, because durability needs cluster mode."""
    effective = at.group.effective_durability
    if effective == SYNC:
        return Verdict.PASS, "sync: no acknowledged write is lost"
    rest = {
        "broker": "what is lost, recovery re-creates from PostgreSQL",
        "volatile": "nothing re-creates what is lost",
        "cache": "what is lost is filled again",
    }[at.role]
    return Verdict.PASS, f"{effective or 'not reported'}: lossy, the last writes before a failover may be lost; {rest}"


ROWS: tuple[Row, ...] = (
    Row("group-available", _group_available, "AWS applies updates to available groups only",
        "wait until the group is available; look for a modification or a snapshot under way"),
    Row("nodes-available", _nodes_available, "a node that is already down leaves nothing to fail over to",
        "wait for it, or open a case with AWS"),
    Row("nothing-pending", _nothing_pending, "a pending modification could be flushed by the update",
        "apply it or take it back first"),
    Row("automatic-failover", _automatic_failover, "without it the primary is patched with no primary left",
        "aws elasticache modify-replication-group --automatic-failover-enabled --apply-immediately"),
    Row("multi-az", _multi_az, "with all nodes in one zone a failure of that zone takes the last copy",
        "aws elasticache modify-replication-group --multi-az-enabled --apply-immediately"),
    Row("zones", _zones, "a replica beside the primary is lost with it if their zone fails during the patch",
        "aws elasticache increase-replica-count, in another zone"),
    Row("replica", _has_replica, "without a replica the data is gone while the node is patched",
        "aws elasticache increase-replica-count"),
    Row("one-shard", _one_shard, "this runbook follows one primary; Celery's transport speaks no cluster mode",
        "patch groups with several shards by hand"),
    Row("no-global-datastore", _no_global_datastore, "in a Global Datastore another region takes part in a failover",
        "patch it by hand, region by region"),
    Row("durability", _durability, "it says whether a failover can lose writes", ""),
)  # fmt: skip
