"""Which update is chosen, what each check says, and what pre-flight makes of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.elasticache.facts import Node, NodeUpdate, ServiceUpdate, UpdateAction, UpdateStatus
from patchpilot.engine.journal import Kind, MemoryJournal, RunRecord
from patchpilot.engine.plan import View
from patchpilot.engine.runner import Runner
from patchpilot.errors import Blocked, Corrupt, NeedsOperator, NothingToDo, Transient
from patchpilot.phases import Desk, runbook
from patchpilot.phases.checks import CHECKS, Check, Situation, Verdict, blocking, judge
from patchpilot.phases.checks.data import MOST_LAG
from patchpilot.phases.choice import Choice, choose
from patchpilot.phases.p1_preflight import read
from patchpilot.recovery.findings import Remedy
from patchpilot.settings import Role
from patchpilot.valkey.nodes import Replica, Report
from tests.crash.world import GROUP, NAMES, UPDATE, World, desk, stuck

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def update(name: str, *, released: int = 10, ends: int = 30, status: str = "available") -> ServiceUpdate:
    """An update released so many days ago, which can be applied for so many more."""
    return ServiceUpdate(
        name, status, released=NOON - timedelta(days=released), ends=NOON + timedelta(days=ends),
        recommended_by=NOON + timedelta(days=5),
    )  # fmt: skip


def action(name: str, status: str = UpdateStatus.NOT_APPLIED, **more: Any) -> UpdateAction:
    return UpdateAction(GROUP, name, status, update_status="available", **more)


class TestChoice:
    def test_the_newest_that_applies(self) -> None:
        updates = [update("old", released=20), update("new", released=2), update("older", released=30)]
        chosen = choose([action(each.name) for each in updates], updates, NOON, None)
        assert (chosen.action.update, chosen.adopted) == ("new", False)

    @pytest.mark.parametrize("status", ["not-applied", "stopped", "scheduled"])
    def test_it_applies_from_three_statuses(self, status: str) -> None:
        assert choose([action("u", status)], [update("u")], NOON, None).action.status == status

    @pytest.mark.parametrize(
        "status", ["complete", "not-applicable", "scheduling", "a word that AWS has just invented"]
    )
    def test_and_from_no_other(self, status: str) -> None:
        with pytest.raises(NothingToDo, match=f"u is {status}"):
            choose([action("u", status)], [update("u")], NOON, None)

    @pytest.mark.parametrize("status", ["waiting-to-start", "in-progress", "stopping"])
    def test_one_that_runs_is_adopted_before_any_other(self, status: str) -> None:
        updates = [update("newer", released=1), update("runs", released=9)]
        chosen = choose([action("newer"), action("runs", status)], updates, NOON, None)
        assert (chosen.action.update, chosen.adopted) == ("runs", True)

    def test_not_after_its_end_date(self) -> None:
        with pytest.raises(NothingToDo, match="its end date was 2026-02-28"):
            choose([action("u")], [update("u", ends=-1)], NOON, None)

    @pytest.mark.parametrize("status", ["cancelled", "expired"])
    def test_not_once_it_was_withdrawn(self, status: str) -> None:
        with pytest.raises(NothingToDo, match=rf"u is not-applied \({status}\)"):
            choose([action("u")], [update("u", status=status)], NOON, None)

    def test_an_update_whose_dates_are_unknown_may_be_chosen_but_not_before_one_whose_are_known(self) -> None:
        chosen = choose([action("unlisted"), action("listed")], [update("listed")], NOON, None)
        assert chosen.action.update == "listed"
        assert choose([action("unlisted")], [], NOON, None).update is None

    def test_the_one_asked_for_wins(self) -> None:
        updates = [update("a", released=1), update("b")]
        assert choose([action("a"), action("b")], updates, NOON, "b").action.update == "b"

    @pytest.mark.parametrize("asked", [None, "a"])
    def test_one_that_this_run_had_chosen_is_followed_if_it_is_complete_meanwhile(self, asked: str | None) -> None:
        chosen = choose([action("a", "complete"), action("b")], [], NOON, asked, "a")
        assert chosen.action.update == "a"
        assert chosen.adopted
        with pytest.raises(NothingToDo):
            choose([action("a", "complete")], [], NOON, asked)

    def test_the_one_asked_for_goes_before_one_that_was_chosen_once(self) -> None:
        assert choose([action("a", "complete"), action("b")], [], NOON, "b", "a").action.update == "b"

    def test_one_asked_for_that_is_not_listed_is_a_persons_mistake(self) -> None:
        with pytest.raises(NeedsOperator, match=r"'c'.*listed: a, b"):
            choose([action("b"), action("a")], [], NOON, "c")

    def test_one_asked_for_that_is_complete_is_nothing_to_do(self) -> None:
        with pytest.raises(NothingToDo, match="a is complete"):
            choose([action("a", "complete"), action("b")], [update("a"), update("b")], NOON, "a")

    def test_no_update_at_all(self) -> None:
        with pytest.raises(NothingToDo, match="AWS lists none"):
            choose([], [], NOON, None)


@pytest.fixture
def situation(tmp_path: Path) -> Situation:
    """Everything is well."""
    clock = FakeClock(NOON)
    place = desk(World(clock), MemoryJournal(clock), tmp_path)
    return read(place, View("run", NOON, {}, NOON))


def verdicts(situation: Situation) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in judge(situation)}


def only(situation: Situation, name: str) -> Check:
    """The check called ``name``, the only one that does not pass."""
    assert {each for each, verdict in verdicts(situation).items() if verdict is not Verdict.PASS} == {name}
    return next(check for check in judge(situation) if check.name == name)


def named(situation: Situation, name: str) -> Check:
    return next(check for check in judge(situation) if check.name == name)


def test_everything_passes_when_everything_is_well(situation: Situation) -> None:
    assert set(verdicts(situation).values()) == {Verdict.PASS}
    assert all(check.evidence and check.why and not check.mend for check in judge(situation))


GROUP_CASES: list[tuple[str, dict[str, Any], Verdict, str]] = [
    ("group-available", {"status": "snapshotting"}, Verdict.BLOCK, "group snapshotting"),
    ("group-available", {"node_groups": ("modifying",)}, Verdict.BLOCK, "shards modifying"),
    ("nothing-pending", {"pending": ("AuthTokenStatus",)}, Verdict.BLOCK, f"{GROUP}: AuthTokenStatus"),
    ("automatic-failover", {"automatic_failover": "enabling"}, Verdict.BLOCK, "enabling"),
    ("automatic-failover", {"automatic_failover": ""}, Verdict.BLOCK, "not reported"),
    ("multi-az", {"multi_az": "disabled"}, Verdict.WARN, "disabled (zone-0, zone-1, zone-2)"),
    ("one-shard", {"cluster_enabled": True}, Verdict.BLOCK, "1 shard(s), cluster mode enabled"),
    ("one-shard", {"node_groups": ("available", "available")}, Verdict.BLOCK, "2 shard(s), cluster mode disabled"),
    ("no-global-datastore", {"global_datastore": "ldgnf-shop"}, Verdict.BLOCK, "ldgnf-shop"),
]


@pytest.mark.parametrize(("name", "change", "verdict", "evidence"), GROUP_CASES)
def test_what_is_wrong_with_the_group(
    situation: Situation, name: str, change: dict[str, Any], verdict: Verdict, evidence: str
) -> None:
    check = only(replace(situation, group=replace(situation.group, **change)), name)
    assert check.verdict is verdict
    assert evidence in check.evidence
    assert check.mend


def test_a_group_without_a_replica(situation: Situation) -> None:
    alone = replace(situation.group, members=situation.group.members[:1])
    assert only(replace(situation, group=alone), "replica").verdict is Verdict.BLOCK


def test_nodes_that_are_down_or_wait_for_a_change(situation: Situation) -> None:
    down = replace(situation, nodes=(*situation.nodes[1:], Node(NAMES[0], "rebooting cluster nodes")))
    assert only(down, "nodes-available").verdict is Verdict.BLOCK
    assert only(replace(situation, nodes=()), "nodes-available").evidence == "AWS lists no node"
    pending = replace(situation, nodes=(*situation.nodes[1:], Node(NAMES[0], "available", pending=("EngineVersion",))))
    assert only(pending, "nothing-pending").evidence == f"{NAMES[0]}: EngineVersion"


def test_the_three_dates_are_kept_apart(situation: Situation) -> None:
    dates = ServiceUpdate(
        UPDATE, "available", "critical", recommended_by=NOON + timedelta(days=1), ends=NOON + timedelta(days=2),
        automatic=True,
    )  # fmt: skip

    def at(now: datetime, known: ServiceUpdate | None = dates) -> Situation:
        return replace(situation, now=now, choice=replace(situation.choice, update=known))

    assert verdicts(at(NOON))["update-dates"] is Verdict.PASS
    late = named(at(NOON + timedelta(days=1)), "update-dates")
    assert late.verdict is Verdict.WARN
    for part in ("recommended by 2026-03-02", "cannot be applied after 2026-03-03", "by AWS itself", ": yes"):
        assert part in late.evidence
    assert named(at(NOON + timedelta(days=2)), "update-dates").verdict is Verdict.BLOCK
    assert only(at(NOON, None), "update-dates").verdict is Verdict.UNKNOWN


def test_another_update_in_flight(situation: Situation) -> None:
    two = replace(situation, actions=(*situation.actions, action("other", UpdateStatus.STOPPING)))
    assert only(two, "update-alone").evidence == "other stopping"


def test_whoever_answers_at_the_endpoint_has_to_be_the_primary(situation: Situation) -> None:
    astray = replace(situation, endpoint=Report("replica", 1, link_up=True))
    assert verdicts(astray)["endpoint"] is Verdict.BLOCK


@pytest.mark.parametrize(("role", "verdict"), [("broker", Verdict.BLOCK), ("cache", Verdict.UNKNOWN)])
def test_an_endpoint_that_does_not_answer(situation: Situation, role: Role, verdict: Verdict) -> None:
    silent = replace(situation, role=role, endpoint="broker.test:6379 does not answer")
    assert verdicts(silent)["endpoint"] is verdict
    assert verdicts(silent)["replication"] is Verdict.UNKNOWN
    assert {check.name for check in blocking(judge(silent), "broker")} == {"endpoint", "replication"}


def replicas(**change: Any) -> Report:
    """A primary of two replicas, of which the second one is not as it should be."""
    good = Replica("b:6379", "online", 10 * MOST_LAG, 0)
    return Report("primary", 10 * MOST_LAG, replicas=(good, replace(good, address="c:6379", **change)))


@pytest.mark.parametrize(
    ("endpoint", "verdict"),
    [
        (replicas(), Verdict.PASS),
        (replicas(offset=9 * MOST_LAG), Verdict.PASS),
        (replicas(offset=9 * MOST_LAG - 1), Verdict.WARN),
        (replicas(silence=11), Verdict.WARN),
        (replicas(state="send_bulk"), Verdict.BLOCK),
        (Report("primary", 0, replicas=(Replica("b:6379", "online", 0, 0),)), Verdict.BLOCK),
        (Report("primary", 0), Verdict.BLOCK),
    ],
)
def test_replication_as_the_primary_sees_it(situation: Situation, endpoint: Report, verdict: Verdict) -> None:
    assert verdicts(replace(situation, endpoint=endpoint))["replication"] is verdict


def test_replication_as_a_replica_sees_it(situation: Situation) -> None:
    broken = {**situation.members, NAMES[1]: Report("replica", 1, link_up=False)}
    check = only(replace(situation, members=broken), "replication")
    assert check.verdict is Verdict.BLOCK
    assert f"{NAMES[1]} says its link is down" in check.evidence
    silent: dict[str, Report | str] = {**situation.members, NAMES[1]: "does not answer"}
    assert verdicts(replace(situation, members=silent))["replication"] is Verdict.PASS


def test_which_replica_is_missing_is_said_by_name_if_aws_knows_the_address(situation: Situation) -> None:
    def evidence(*addresses: str, **change: Any) -> str:
        listed = tuple(Replica(address, "online", 0, 0) for address in addresses)
        check = only(replace(situation, endpoint=Report("primary", 0, replicas=listed), **change), "replication")
        assert check.verdict is Verdict.BLOCK
        return check.evidence

    one, two, three = NAMES
    assert evidence(f"{two}.test:6379") == (
        f"1 of 2 replicas online; {two}.test:6379 online, 0 bytes behind, silent for 0 s; "
        f"{three} is missing: the primary does not list it"
    )
    assert evidence() == "0 of 2 replicas online; " + "; ".join(
        f"{name} is missing: the primary does not list it" for name in (two, three)
    )
    inside = "10.0.0.2:6379"  # which AWS does not tell
    assert evidence(inside).endswith("silent for 0 s")
    silent = {**situation.members, two: "no route"}
    assert evidence(inside, members=silent).endswith(f"; {two} cannot be asked: no route")
    unheard = dict.fromkeys(NAMES, "no route")
    assert one not in evidence(f"{two}.test:6379", members=unheard)


def test_a_schema_that_is_out_of_date(situation: Situation) -> None:
    check = only(replace(situation, schema="at migration 0001, needs 0002"), "schema")
    assert (check.verdict, check.mend) == (Verdict.BLOCK, "patchpilot db migrate")


def test_for_an_update_that_runs_already_it_is_too_late_to_block(situation: Situation) -> None:
    running = Choice(replace(situation.choice.action, status="in-progress"), situation.choice.update)
    busy = replace(situation, choice=running, group=replace(situation.group, status="modifying"), endpoint="silent")
    checks = judge(busy)
    assert blocking(checks, "broker") == ()
    assert {c.name for c in checks if c.verdict is Verdict.WARN} == {"group-available", "endpoint", "replication"}
    assert all("already runs" in c.evidence for c in checks if c.verdict is Verdict.WARN)
    assert next(c for c in checks if c.name == "update").evidence == f"{UPDATE} is in-progress and is adopted"


def test_what_is_unknown_blocks_a_broker_and_nothing_else(situation: Situation) -> None:
    unlisted = judge(replace(situation, choice=Choice(situation.choice.action, None)))
    assert [check.name for check in blocking(unlisted, "broker")] == ["update-dates"]
    assert blocking(unlisted, "cache") == ()


class Pilot:
    """The first phases in the little world."""

    def __init__(self, tmp_path: Path) -> None:
        self.clock = FakeClock()
        self.world = World(self.clock)
        self.journal = MemoryJournal(self.clock)
        self.directory = tmp_path

    def run(self, **more: Any) -> RunRecord:
        place = desk(self.world, self.journal, self.directory, **more)
        return Runner(runbook(place), self.journal, self.clock).run()


@pytest.fixture
def pilot(tmp_path: Path) -> Pilot:
    return Pilot(tmp_path)


def test_a_refusal_names_every_failed_check_and_touches_nothing(pilot: Pilot) -> None:
    pilot.world.group_changes = {"automatic_failover": "disabled", "global_datastore": "ldgnf-shop"}
    with pytest.raises(Blocked, match=r"automatic-failover: disabled \(aws .*; no-global-datastore: ldgnf-shop"):
        pilot.run()
    assert pilot.world.applied == []
    seen = next(entry for entry in pilot.journal.entries() if entry.kind is Kind.OBSERVED)
    assert len(seen.data["checks"]) == len([row for row in CHECKS if not row.of_upgrades])

    pilot.world.group_changes = {}
    assert pilot.run().finished
    assert len(pilot.world.applied) == 1


def test_an_outdated_schema_blocks(pilot: Pilot) -> None:
    with pytest.raises(Blocked, match="patchpilot db migrate"):
        pilot.run(schema="too old")


def test_no_applicable_update_ends_the_run(pilot: Pilot) -> None:
    pilot.world.change(update=UpdateStatus.COMPLETE)
    with pytest.raises(NothingToDo, match=f"{UPDATE} is complete"):
        pilot.run()
    assert pilot.journal.entries()[-1].data["outcome"] == "nothing-to-do"


def test_an_unknown_update_is_refused_before_anything_else(pilot: Pilot) -> None:
    with pytest.raises(NeedsOperator, match="'elsewhere'"):
        pilot.run(update="elsewhere")
    assert pilot.world.applied == []


def test_aws_out_of_reach_for_a_while_is_waited_for(pilot: Pilot) -> None:
    pilot.world.surprises["group"] = [Transient("throttled"), Transient("throttled")]
    assert pilot.run().finished


def test_what_is_stuck_before_the_patch_is_recovered_before_it(pilot: Pilot) -> None:
    pilot.world.stick(stuck("old"), stuck("odd", Remedy.NONE))
    fact = pilot.run().facts()["recover-beforehand"]
    assert [row["id"] for row in fact["applied"]] == ["old"]
    assert [row["id"] for row in fact["left"]] == ["odd"]
    acts = [entry.step for entry in pilot.journal.entries() if entry.kind is Kind.ACTED]
    assert acts[:2] == ["recover-beforehand", "trigger"]


@pytest.mark.parametrize("role", ["cache", "volatile"])
def test_a_cluster_that_is_no_broker_is_patched_without_recovery_and_says_why(pilot: Pilot, role: Role) -> None:
    pilot.world.stick(stuck("not ours"))
    facts = pilot.run(role=role).facts()
    for step in ("recover-beforehand", "dry-run", "recover"):
        assert facts[step] == {"skipped": f"cluster broker is a {role}: it holds no tasks to recover"}
    assert pilot.world.remedies == []
    claimed = [claim["name"] for claim in facts["verify"]["claims"]]
    assert claimed == ["update-complete", "group-available", "alarms-quiet"]


def test_a_broker_cannot_be_patched_without_recovery(pilot: Pilot) -> None:
    place = desk(pilot.world, pilot.journal, pilot.directory)
    with pytest.raises(Corrupt, match="is a broker"):
        replace(place, recovery=None)
    with pytest.raises(Corrupt, match="is a broker"):
        replace(place, nodes=None)
    with pytest.raises(Corrupt, match="is a broker"):
        replace(place, workers=None)
    assert isinstance(replace(place, role="cache", nodes=None, recovery=None, workers=None), Desk)


def test_an_update_that_somebody_else_started_is_adopted(pilot: Pilot) -> None:
    pilot.world.initiator = "system"
    pilot.world.start()
    pilot.clock.sleep(120)
    facts = pilot.run().facts()
    assert pilot.world.applied == []
    assert (facts["readiness"]["adopted"], facts["trigger"]["how"]) == (True, "adopted")
    assert facts["trigger"]["initiated_by"] == ["system"]
    assert facts["watch"]["nodes"][NAMES[0]]["initiated_by"] == "system"


def test_node_rows_are_kept_with_the_choice(pilot: Pilot) -> None:
    facts = pilot.run().facts()
    assert facts["readiness"]["action"]["nodes"][0] == {
        "node": NodeUpdate(NAMES[0], "not-applied").node, "status": "not-applied", "started": None, "ended": None,
        "initiated_by": "", "initiated": None,
    }  # fmt: skip
    assert facts["readiness"]["versions"] == dict.fromkeys(NAMES, "8.0.1")
