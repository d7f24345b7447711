"""What is claimed at the end, what it rests on, and what happens while a claim does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.elasticache.facts import Group, Member, NodeUpdate, UpdateAction
from patchpilot.engine.journal import Kind, MemoryJournal, RunRecord
from patchpilot.engine.runner import Progress, Runner
from patchpilot.errors import Exit, Transient, VerificationFailed
from patchpilot.phases import RUNBOOK, runbook
from patchpilot.phases.p7_verify import Evidence, claims
from patchpilot.recovery.findings import Remedy
from patchpilot.valkey.nodes import Replica, Report
from tests.crash.world import RUNBOOK as RULES
from tests.crash.world import World, desk, stuck

PRIMARY = Report("primary", 9, replicas=(Replica("b:6379", "online", 9, 0),))
REPLICA = Report("replica", 9, link_up=True, silence=0)
GOOD = Evidence(
    action=UpdateAction("g", "u", "complete", nodes=(NodeUpdate("a", "complete"), NodeUpdate("b", "complete"))),
    group=Group("g", "available", (Member("a", "primary"), Member("b", "replica")), ("available",)),
    endpoint=PRIMARY,
    members={"a": PRIMARY, "b": REPLICA},
    stuck=(),
)


def failing(evidence: Evidence) -> list[str]:
    return [claim.name for claim in claims(evidence) if not claim.holds]


def test_all_claims_hold_when_all_is_well_and_each_has_evidence() -> None:
    assert failing(GOOD) == []
    assert [claim.name for claim in claims(GOOD)] == [
        "update-complete", "group-available", "endpoint-answers", "one-primary", "replicas-follow", "nothing-stuck",
    ]  # fmt: skip
    assert all(claim.evidence for claim in claims(GOOD))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"action": None}, "update-complete"),
        ({"action": replace(GOOD.action, status="in-progress")}, "update-complete"),  # type: ignore[type-var]
        ({"action": UpdateAction("g", "u", "complete")}, "update-complete"),
        ({"group": replace(GOOD.group, status="modifying")}, "group-available"),
        ({"members": {"a": PRIMARY, "b": PRIMARY}}, "one-primary"),
        ({"members": {"a": REPLICA, "b": REPLICA}}, "one-primary"),
        ({"members": {"a": REPLICA, "b": PRIMARY}}, "one-primary"),  # another one than AWS names
        ({"members": {}}, "one-primary"),
        ({"members": {"a": PRIMARY, "b": replace(REPLICA, link_up=False)}}, "replicas-follow"),
        ({"endpoint": Report("primary", 9)}, "replicas-follow"),
        ({"endpoint": Report("primary", 9, replicas=(Replica("b", "send_bulk", 0, 0),))}, "replicas-follow"),
        ({"stuck": (stuck("c"),)}, "nothing-stuck"),
    ],
)
def test_each_claim_can_fail_by_itself(change: dict[str, Any], name: str) -> None:
    assert failing(replace(GOOD, **change)) == [name]


def test_a_silent_endpoint_proves_nothing() -> None:
    assert failing(replace(GOOD, endpoint="does not answer")) == ["endpoint-answers", "replicas-follow"]
    astray = replace(GOOD, endpoint=Report("replica", 9, link_up=True))
    assert "endpoint-answers" in failing(astray)


def test_a_group_without_a_single_primary_proves_nothing() -> None:
    two = replace(GOOD.group, members=(Member("a", "primary"), Member("b", "primary")))
    assert failing(replace(GOOD, group=two)) == ["group-available", "one-primary"]


def test_members_that_cannot_be_reached_directly_do_not_fail_what_the_endpoint_shows() -> None:
    """From outside the VPC only the endpoint may be open; the evidence says who was not asked."""
    hidden = replace(GOOD, members={"a": "no route", "b": "no route"})
    assert failing(hidden) == []
    assert "a: no route" in next(claim.evidence for claim in claims(hidden) if claim.name == "one-primary")
    assert failing(replace(hidden, members={"a": "no route", "b": PRIMARY})) == ["one-primary"]


def test_what_only_a_person_can_judge_does_not_fail_the_run_but_is_told() -> None:
    odd = replace(GOOD, stuck=(stuck("odd", Remedy.NONE),))
    assert failing(odd) == []
    assert "1 that only a person can judge" in claims(odd)[-1].evidence


def test_a_cluster_without_endpoint_or_recovery_claims_less() -> None:
    cache = replace(GOOD, endpoint=None, members={}, stuck=None)
    assert [claim.name for claim in claims(cache)] == ["update-complete", "group-available"]


class Pilot:
    """The whole runbook in the little world."""

    def __init__(self, tmp_path: Path) -> None:
        self.clock = FakeClock()
        self.world = World(self.clock)
        self.journal = MemoryJournal(self.clock)
        self.directory = tmp_path
        self.before: dict[str, Callable[[], None]] = {}
        """What happens when a step begins, once."""

    def run(self) -> RunRecord:
        plan = runbook(desk(self.world, self.journal, self.directory))
        return Runner(plan, self.journal, self.clock, notify=self._notice).run()

    def _notice(self, progress: Progress) -> None:
        if progress.kind == "step" and progress.step in self.before:
            self.before.pop(progress.step)()

    def kinds(self, step: str) -> list[str]:
        return [str(entry.kind) for entry in self.journal.entries() if entry.step == step]


@pytest.fixture
def pilot(tmp_path: Path) -> Pilot:
    return Pilot(tmp_path)


def test_the_runbook_is_eight_phases_in_this_order() -> None:
    assert [phase.__name__ for phase in RUNBOOK] == [
        "Preflight", "Trigger", "Watch", "Grace", "DryRun", "Recover", "Verify", "Report",
    ]  # fmt: skip


def test_a_claim_that_does_not_hold_yet_is_waited_for(pilot: Pilot) -> None:
    def late() -> None:
        pilot.world.stick(stuck("late"))
        pilot.clock.after(120, pilot.world.stuck.clear)

    pilot.before["verify"] = late
    verify = pilot.run().steps["verify"]
    assert verify.intent is not None
    assert verify.reached is not None
    assert timedelta(seconds=120) <= verify.reached.at - verify.intent.at < RULES.verify_timeout


def test_a_failed_verification_has_its_own_exit_code_and_trying_again_recovers_again(pilot: Pilot) -> None:
    pilot.before["verify"] = lambda: pilot.world.stick(stuck("again"))
    with pytest.raises(
        VerificationFailed, match=r"nothing-stuck: 1 stuck for longer than 5m00s, first chord again"
    ) as failure:
        pilot.run()
    assert failure.value.exit_code == Exit.VERIFICATION_FAILED
    *_, seen, last = pilot.journal.entries()
    assert (last.kind, last.data["exit"]) == (Kind.CONTRADICTED, Exit.VERIFICATION_FAILED)
    assert [claim["name"] for claim in seen.data["claims"] if not claim["holds"]] == ["nothing-stuck"]

    assert pilot.run().finished
    assert [remedy.id for _, remedy in pilot.world.remedies].count("again") == 1
    assert pilot.kinds("recover").count("reached") == 2
    assert pilot.kinds("dry-run").count("reached") == 1
    assert len(pilot.world.applied) == 1


def test_after_a_long_absence_the_verification_is_patient_again(pilot: Pilot) -> None:
    pilot.before["verify"] = die
    with pytest.raises(KeyboardInterrupt):
        pilot.run()
    assert pilot.kinds("verify") == ["intended"]
    pilot.clock.sleep(3600)
    pilot.world.group_changes = {"status": "modifying"}
    pilot.clock.after(100, pilot.world.group_changes.clear)
    assert pilot.run().finished


def die() -> None:
    raise KeyboardInterrupt


def test_recovery_gives_up_after_some_rounds_and_leaves_the_verdict_to_the_verification(pilot: Pilot) -> None:
    pilot.world.surprises["recover"] = [Transient("the broker is away")] * 50
    pilot.clock.after(600, lambda: pilot.world.stick(stuck("stubborn")))
    with pytest.raises(VerificationFailed, match="nothing-stuck"):
        pilot.run()
    facts = RunRecord.of(pilot.journal.entries()).facts()
    assert facts["recover"]["rounds"] == 5
    assert "stubborn" in [row["id"] for row in facts["recover"]["left"]]


def test_what_looks_stuck_but_is_too_young_is_waited_for_and_then_cured(pilot: Pilot) -> None:
    def half_stuck() -> None:
        pilot.world.stick(stuck("young"), stuck("well-again"), age=timedelta(minutes=1))
        pilot.clock.after(60, lambda: drop("well-again"))

    def drop(name: str) -> None:
        del pilot.world.stuck[name]

    pilot.before["dry-run"] = half_stuck
    record = pilot.run()
    facts, recover = record.facts(), record.steps["recover"]
    assert [row["id"] for row in facts["dry-run"]["findings"]] == ["chord-0", "odd-0"]
    assert [row["id"] for row in facts["dry-run"]["young"]] == ["young", "well-again"]
    assert [row["id"] for row in facts["recover"]["applied"]] == ["chord-0", "young"]
    assert recover.reached is not None
    assert recover.intent is not None
    waited = recover.reached.at - recover.intent.at
    assert timedelta(minutes=4) <= waited <= timedelta(minutes=4) + RULES.poll_interval


def test_what_only_looks_stuck_for_a_moment_again_and_again_is_not_waited_for_for_ever(pilot: Pilot) -> None:
    def flicker(number: int = 0) -> None:
        """On a broker at work something is always between two hands."""
        pilot.world.stuck.pop(f"moment-{number - 1}", None)
        pilot.world.stick(stuck(f"moment-{number}"), age=timedelta())
        pilot.clock.after(7, lambda: flicker(number + 1))

    pilot.before["recover"] = flicker
    record = pilot.run()
    recover = record.steps["recover"]
    assert recover.reached is not None
    assert recover.intent is not None
    assert recover.reached.at - recover.intent.at <= 2 * RULES.poll_interval


def test_the_dry_run_counts_by_kind_and_diagnosis(pilot: Pilot) -> None:
    fact = pilot.run().facts()["dry-run"]
    assert fact["counts"] == {"chord/callback-lost": 2}
    assert [row["remedy"] for row in fact["findings"]] == ["dispatch-callback", "none"]


def test_callbacks_that_may_have_run_twice_are_on_record(pilot: Pilot) -> None:
    row: dict[str, object] = {"task_id": "t", "group_id": "g", "callback_name": "f", "starts": 2}
    pilot.clock.after(1300, lambda: pilot.world.repeated.append((pilot.clock.now(), row)))
    pilot.world.repeated.append((pilot.clock.now() - timedelta(days=1), {**row, "task_id": "long ago"}))
    assert pilot.run().facts()["verify"]["repeated"] == [row]
