"""What is claimed at the end, what it rests on, and what happens while a claim does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.elasticache.cloudwatch import Alarm
from patchpilot.elasticache.facts import Group, Member, NodeUpdate, UpdateAction
from patchpilot.engine.journal import Kind, MemoryJournal, RunRecord
from patchpilot.engine.runner import Progress, Runner
from patchpilot.errors import Exit, Transient, VerificationFailed
from patchpilot.phases import RUNBOOK, runbook
from patchpilot.phases.p7_verify import FLIGHT, Evidence, claims
from patchpilot.phases.proofs import Workplace
from patchpilot.recovery.findings import Remedy
from patchpilot.valkey.nodes import Replica, Report
from patchpilot.workers import Depth, Fleet
from tests.crash.world import RUNBOOK as RULES
from tests.crash.world import World, desk, stuck, worker

PRIMARY = Report("primary", 9, replicas=(Replica("b:6379", "online", 9, 0),))
REPLICA = Report("replica", 9, link_up=True, silence=0)
GOOD = Evidence(
    action=UpdateAction("g", "u", "complete", nodes=(NodeUpdate("a", "complete"), NodeUpdate("b", "complete"))),
    group=Group("g", "available", (Member("a", "primary"), Member("b", "replica")), ("available",)),
    endpoint=PRIMARY,
    members={"a": PRIMARY, "b": REPLICA},
    stuck=(),
    workplace=Workplace(
        Fleet((worker("w", proof={"task": "t", "chord": "t"}),), (Depth("celery", 0),)), sent={"instance of w": "t"}
    ),
    alarms=(Alarm("memory", "OK", tells=True),),
)


def failing(evidence: Evidence) -> list[str]:
    return [claim.name for claim in claims(evidence) if not claim.holds]


def test_all_claims_hold_when_all_is_well_and_each_has_evidence() -> None:
    assert failing(GOOD) == []
    assert [claim.name for claim in claims(GOOD)] == [
        "update-complete", "group-available", "endpoint-answers", "one-primary", "replicas-follow", "nothing-stuck",
        "workers-answer", "workers-consume", "queues-drain", "alarms-quiet",
    ]  # fmt: skip
    assert all(claim.evidence for claim in claims(GOOD))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"action": None}, "update-complete"),
        ({"action": replace(GOOD.action, status="in-progress")}, "update-complete"),  # type: ignore[type-var]
        ({"action": UpdateAction("g", "u", "complete")}, "update-complete"),
        ({"action": replace(GOOD.action, nodes=GOOD.action.nodes[:1])}, "update-complete"),  # type: ignore[union-attr]
        ({"action": replace(GOOD.action, nodes_updated="1/2")}, "update-complete"),  # type: ignore[type-var]
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


@pytest.mark.parametrize(
    "changes",
    [
        {"stuck": (stuck("odd", Remedy.NONE),), "earlier": frozenset({"odd"})},
        {"stuck": (stuck("odd", Remedy.NONE, "half-published"),)},
        {"stuck": (replace(stuck("odd", Remedy.NONE), kind="task"),)},
        {"stuck": (stuck("odd", Remedy.NONE),), "waived": "sent again by hand"},
    ],
)
def test_what_only_a_person_can_judge_is_told(changes: dict[str, Any]) -> None:
    odd = replace(GOOD, **changes)
    assert failing(odd) == []
    evidence = next(claim.evidence for claim in claims(odd) if claim.name == "nothing-stuck")
    assert "1 that only a person can judge" in evidence
    assert odd.waived in evidence


def test_a_chord_that_only_a_person_can_judge_and_that_was_well_before_the_patch_proves_nothing() -> None:
    odd = replace(GOOD, stuck=tuple(stuck(name, Remedy.NONE) for name in ("old", "odd")), earlier=frozenset({"old"}))
    assert failing(odd) == ["nothing-stuck"]
    evidence = next(claim.evidence for claim in claims(odd) if claim.name == "nothing-stuck")
    assert "2 that only a person can judge, 1 of them chords that were not stuck before the patch" in evidence
    assert "first chord odd: " in evidence


def test_what_was_left_to_a_person_before_the_patch_is_known_at_its_end(pilot: Pilot) -> None:
    pilot.world.stick(stuck("old", Remedy.NONE))
    pilot.before["verify"] = lambda: pilot.world.stick(stuck("odd", Remedy.NONE))
    with pytest.raises(VerificationFailed, match=r"nothing-stuck: .* first chord odd"):
        pilot.run()
    pilot.world.stuck.pop("odd")
    assert pilot.run().finished


def test_a_cluster_without_endpoint_or_recovery_claims_less() -> None:
    cache = replace(GOOD, endpoint=None, members={}, stuck=None, workplace=None)
    assert [claim.name for claim in claims(cache)] == ["update-complete", "group-available", "alarms-quiet"]


class Pilot:
    """The whole runbook in the little world."""

    def __init__(self, tmp_path: Path) -> None:
        self.clock = FakeClock()
        self.world = World(self.clock)
        self.journal = MemoryJournal(self.clock)
        self.directory = tmp_path
        self.before: dict[str, Callable[[], None]] = {}
        """What happens when a step begins, once."""

    def run(self, **more: Any) -> RunRecord:
        plan = runbook(desk(self.world, self.journal, self.directory, **more))
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
    assert fact["counts"] == {"chord/callback-lost": 1, "chord/half-published": 1}
    assert [row["remedy"] for row in fact["findings"]] == ["dispatch-callback", "none"]


def test_callbacks_that_may_have_run_twice_are_on_record(pilot: Pilot) -> None:
    row: dict[str, object] = {"task_id": "t", "group_id": "g", "callback_name": "f", "starts": 2}
    pilot.clock.after(1300, lambda: pilot.world.repeated.append((pilot.clock.now(), row)))
    pilot.world.repeated.append((pilot.clock.now() - timedelta(days=1), {**row, "task_id": "long ago"}))
    assert pilot.run().facts()["verify"]["repeated"] == [row]


def sent(pilot: Pilot) -> list[list[str]]:
    """The workers that canaries were sent to, round by round."""
    acted = [entry.data for entry in pilot.journal.entries() if (entry.step, entry.kind) == ("verify", Kind.ACTED)]
    return [sorted(data["sent"]) for data in acted if "sent" in data]


def test_a_canary_goes_to_every_worker_once_and_its_return_is_the_proof(pilot: Pilot) -> None:
    claims = {claim["name"]: claim for claim in pilot.run().facts()["verify"]["claims"]}
    assert sent(pilot) == [["instance of celery@one", "instance of celery@two"]]
    assert claims["workers-answer"]["evidence"] == "2 of 2 workers answer"
    assert claims["workers-consume"]["evidence"] == (
        "the canary task came back from 2 of 2 workers, the canary chord came back from 2 of 2 workers"
    )
    assert claims["queues-drain"]["evidence"] == "1 queue(s) looked at twice"
    assert pilot.world.caught == 0


def test_a_worker_that_answers_but_consumes_nothing_fails_the_verification_and_leaves_no_canary(pilot: Pilot) -> None:
    def block(busy: dict[str, int]) -> None:
        pilot.world.fleet[1] = replace(pilot.world.fleet[1], running=busy)

    pilot.before["verify"] = lambda: block({"shop.hold": 2})
    with pytest.raises(VerificationFailed, match=(
        r"workers-consume: .*celery@two did not run the canary task and chord \(2 of 2 processes busy: shop.hold x2\)"
    )) as failure:  # fmt: skip
        pilot.run()
    assert failure.value.exit_code == Exit.VERIFICATION_FAILED
    assert "celery@one" not in str(failure.value)
    assert (pilot.world.canaries, pilot.world.caught) == ({}, 1)
    assert len(sent(pilot)) == 1

    pilot.world.fleet[1] = replace(pilot.world.fleet[1], running={})
    assert pilot.run().finished
    assert sent(pilot)[1:] == [["instance of celery@one", "instance of celery@two"]]
    assert len(pilot.world.applied) == 1


def test_a_worker_that_lives_and_does_not_answer_fails_the_verification_and_may_answer_late(pilot: Pilot) -> None:
    def hang() -> None:
        pilot.world.fleet[0] = replace(pilot.world.fleet[0], answers=False)

    def wake() -> None:
        pilot.world.fleet[0] = replace(pilot.world.fleet[0], answers=True)

    pilot.before["verify"] = hang
    with pytest.raises(VerificationFailed, match="workers-answer: 1 of 2 workers answer; celery@one is alive and does"):
        pilot.run()
    pilot.before["verify"] = lambda: pilot.clock.after(60, wake)
    assert pilot.run().finished
    assert sent(pilot)[1:] == [["instance of celery@two"], ["instance of celery@one"]]


def test_a_worker_that_was_started_meanwhile_gets_a_canary_of_its_own(pilot: Pilot) -> None:
    def grow() -> None:
        pilot.world.stick(stuck("late"))
        pilot.clock.after(60, lambda: pilot.world.fleet.append(worker("celery@three")))
        pilot.clock.after(90, pilot.world.stuck.clear)

    pilot.before["verify"] = grow
    assert pilot.run().finished
    assert sent(pilot)[1:] == [["instance of celery@three"]]


def test_a_canary_that_was_lost_is_sent_again(pilot: Pilot) -> None:
    pilot.before["verify"] = lambda: pilot.clock.after(1, pilot.world.canaries.clear)
    verify = pilot.run(runbook=RULES.model_copy(update={"verify_timeout": 3 * FLIGHT})).steps["verify"]
    assert len(sent(pilot)) == 2
    assert verify.reached is not None
    assert verify.reached.at - verify.attempts[0].at < FLIGHT + 2 * RULES.poll_interval


@pytest.mark.parametrize("moment", ["release", "released"])
def test_a_pilot_that_dies_while_it_sends_canaries_sends_them_again(pilot: Pilot, moment: str) -> None:
    pilot.world.surprises[moment] = [die]
    with pytest.raises(KeyboardInterrupt):
        pilot.run()
    assert pilot.run().finished
    assert len(sent(pilot)) == 1
    assert pilot.world.canaries == {}


def test_a_pilot_that_stands_still_before_it_has_sent_a_canary_gives_it_its_time(pilot: Pilot) -> None:
    pilot.before["verify"] = lambda: pilot.clock.sleep(2 * RULES.verify_timeout.total_seconds())
    assert pilot.run().finished
    assert len(sent(pilot)) == 1


def test_canaries_that_a_dying_pilot_may_have_tidied_away_are_not_waited_for(pilot: Pilot) -> None:
    pilot.before["verify"] = lambda: pilot.world.stick(stuck("again"))
    pilot.world.surprises["tidy"] = [die]
    with pytest.raises(KeyboardInterrupt):
        pilot.run()
    pilot.world.canaries.clear()
    pilot.world.stuck.clear()
    pilot.before.clear()
    assert pilot.run().finished
    assert len(sent(pilot)) == 2


def test_canaries_that_cannot_be_tidied_away_yet_are_tidied_away_later(pilot: Pilot) -> None:
    pilot.before["verify"] = lambda: pilot.world.stick(stuck("again"))
    pilot.world.surprises["tidy"] = [Transient("the broker is away")]
    with pytest.raises(VerificationFailed):
        pilot.run()
    assert pilot.world.caught == 1


def test_an_alarm_that_fires_after_the_patch_fails_it_and_one_that_was_waived_before_does_not(pilot: Pilot) -> None:
    memory, lag = pilot.world.alarms_now
    pilot.world.alarms_now = [replace(memory, state="ALARM", reason="known"), lag]
    pilot.before["verify"] = lambda: pilot.world.alarms_now.__setitem__(1, replace(lag, state="ALARM", reason="new"))
    waivers = {"alarms": "a known leak"}
    with pytest.raises(VerificationFailed, match=r"alarms-quiet: 2 of 2 alarms fire; .*ReplicationLag is firing: new;"):
        pilot.run(waivers=waivers)
    pilot.world.alarms_now[1] = lag
    claims = {claim["name"]: claim for claim in pilot.run(waivers=waivers).facts()["verify"]["claims"]}
    assert claims["alarms-quiet"]["evidence"].endswith("fired before the patch already")
