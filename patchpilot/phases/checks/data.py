"""Checks of where the data is: the endpoint, replication, memory and the parameters that decide about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from patchpilot.elasticache.cloudwatch import MEMORY
from patchpilot.phases.checks.situation import Judgement, Row, Situation, Verdict, prefer, unknown
from patchpilot.valkey.nodes import Report

MOST_LAG = 1024 * 1024
"""Bytes a replica may be behind. What it lacks at the failover is lost, so more than this is worth a warning."""

MOST_SILENCE = 10
"""Seconds since a replica last acknowledged; replicas do so every second."""

BUSY, FULL = 75, 90
"""Per cent of a node's memory: worth a warning, and too much for a full synchronisation beside the traffic."""

RESERVED = 25
"""Per cent that AWS keeps free for synchronisation and snapshots unless it is told otherwise."""


def _endpoint(at: Situation) -> Judgement:
    if isinstance(at.endpoint, str):
        return (Verdict.BLOCK if at.role == "broker" else Verdict.UNKNOWN), at.endpoint
    if at.endpoint.role != "primary":
        return Verdict.BLOCK, f"a {at.endpoint.role} answers at the primary endpoint"
    node = node_at(at, at.address)
    if node:
        return (
            Verdict.BLOCK,
            f"the endpoint is the address of node {node} itself: a replica, after the failover",
        )
    return Verdict.PASS, "a primary answers at the primary endpoint"


def node_at(at: Situation, address: tuple[str, int] | None) -> str | None:
    """The node whose own address this is; None for the primary endpoint, and for what AWS does not know."""
    if address is None or address == at.group.endpoint:
        return None
    return next((member.node for member in at.group.members if (member.host, member.port) == address), None)


def _replication(at: Situation) -> Judgement:
    """The primary's own list of its replicas, and what each of them says of its link."""
    if isinstance(at.endpoint, str):
        return unknown(at.endpoint)
    lagging = [
        f"{replica.address} {replica.state}, {max(at.endpoint.offset - replica.offset, 0)} bytes behind, "
        f"silent for {replica.silence} s"
        for replica in at.endpoint.replicas
    ]
    broken = [f"{node} says its link is down" for node, said in at.members.items() if _link_down(said)]
    online = [replica for replica in at.endpoint.replicas if replica.state == "online"]
    wanted = len(at.group.members) - 1
    missing = _missing(at, {replica.address for replica in at.endpoint.replicas}) if len(online) < wanted else []
    evidence = "; ".join([f"{len(online)} of {wanted} replicas online", *lagging, *missing, *broken])
    if broken or len(online) < wanted:
        return Verdict.BLOCK, evidence
    slow = [r for r in online if at.endpoint.offset - r.offset > MOST_LAG or r.silence > MOST_SILENCE]
    return prefer(not slow, evidence)


def _missing(at: Situation, listed: set[str]) -> list[str]:
    """The replicas that the primary does not list, by name; or, where it lists addresses that AWS does not know, those
    that cannot be asked."""
    silent = {node: f"{node} cannot be asked: {said}" for node, said in at.members.items() if isinstance(said, str)}
    known = {f"{member.host}:{member.port}": member.node for member in at.group.members}
    if listed and not listed & known.keys():
        return list(silent.values())
    primaries = [node for node, said in at.members.items() if isinstance(said, Report) and said.role == "primary"]
    absent = {node for address, node in known.items() if address not in listed}
    absent.difference_update(primaries or filter(None, [at.group.primary]))
    return [f"{node} is missing: the primary does not list it" for node in sorted(absent)]


def _link_down(said: Report | str) -> bool:
    return isinstance(said, Report) and said.role == "replica" and not said.link_up


def _memory(at: Situation) -> Judgement:
    """How full each node is, as it says itself; else as CloudWatch says."""
    used = dict(_used(at))
    silent = [f"{node}: {said}" for node, said in at.members.items() if isinstance(said, str) and node not in used]
    if not used:
        return unknown("; ".join(silent) or "no node says how much memory it uses")
    evidence = "; ".join([*(f"{node} uses {percent:.0f} %" for node, percent in sorted(used.items())), *silent])
    worst = max(used.values())
    return (Verdict.BLOCK, evidence) if worst >= FULL else prefer(worst < BUSY, evidence)


def _used(at: Situation) -> Iterator[tuple[str, float]]:
    if at.metrics and not isinstance(at.metrics, str):
        yield from ((metric.node, metric.worst) for metric in at.metrics if metric.name == MEMORY)
    for node, said in {"the primary": at.endpoint, **at.members}.items():
        # Behind the endpoint is one of the members: it counts by itself only where that one cannot be asked.
        if node == "the primary" and any(_is_primary(member) for member in at.members.values()):
            continue
        if isinstance(said, Report) and said.memory and said.memory.limit:
            yield node, 100 * said.memory.used / said.memory.limit


def _is_primary(said: Report | str) -> bool:
    return isinstance(said, Report) and said.role == "primary" and said.memory is not None and said.memory.limit > 0


def _eviction(at: Situation) -> Judgement:
    """What the parameter group says, and what the nodes say, which may not have it yet."""
    policies = {node: said.memory.policy for node, said in _reports(at) if said.memory and said.memory.policy}
    if not isinstance(at.parameters, str) and at.parameters.get("maxmemory-policy"):
        policies["parameter group"] = at.parameters["maxmemory-policy"]
    if not policies:
        return unknown(at.parameters if isinstance(at.parameters, str) else "no maxmemory-policy is reported")
    told_by = {policy: sorted(name for name in policies if policies[name] == policy) for policy in policies.values()}
    evidence = "; ".join(f"{policy} ({', '.join(names)})" for policy, names in sorted(told_by.items()))
    if at.role != "broker" or set(policies.values()) == {"noeviction"}:
        return Verdict.PASS, evidence
    if any(policy.startswith("allkeys") for policy in policies.values()):
        return Verdict.BLOCK, f"{evidence}: under memory pressure whole queues are thrown away"
    return Verdict.WARN, f"{evidence}: under memory pressure the counts of chords are thrown away; queues are not"


def _reports(at: Situation) -> Iterator[tuple[str, Report]]:
    for node, said in {"endpoint": at.endpoint, **at.members}.items():
        if isinstance(said, Report):
            yield node, said


def _reserved(at: Situation) -> Judgement:
    if isinstance(at.parameters, str):
        return unknown(at.parameters)
    value = at.parameters.get("reserved-memory-percent", "")
    return prefer(value.isdecimal() and int(value) >= RESERVED, f"{value} %" if value else "not reported")


def _closes(at: Situation) -> Judgement:
    if isinstance(at.parameters, str):
        return unknown(at.parameters)
    value = at.parameters.get("close-on-replica-write", "")
    return prefer(value == "yes", value or "not reported")


ROWS: tuple[Row, ...] = (
    Row("endpoint", _endpoint, "recovery and the proof at the end go through the primary endpoint",
        "check clusters.*.endpoint, the network path and the login"),
    Row("replication", _replication, "what a replica lacks at the failover is lost",
        "wait until every replica is online and close behind"),
    Row("memory", _memory, "each node is synchronised in full, for which its primary needs room",
        "wait for a quieter hour, take a larger node type, or remove what is not needed", waivable=True),
    Row("maxmemory-policy", _eviction, "a broker that evicts keys loses messages without a failover",
        "set maxmemory-policy to noeviction in a parameter group of your own", waivable=True),
    Row("reserved-memory", _reserved, "a full synchronisation takes memory beside the data",
        f"set reserved-memory-percent to {RESERVED} or more in a parameter group of your own"),
    Row("close-on-replica-write", _closes, "else clients that are still connected to the demoted node hang on to it",
        "set close-on-replica-write to yes in a parameter group of your own"),
)  # fmt: skip
