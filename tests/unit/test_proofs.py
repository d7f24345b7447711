"""What is claimed of workers, queues and alarms, measured by what was so before the patch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from patchpilot.elasticache.cloudwatch import Alarm
from patchpilot.phases.proofs import Before, Workplace, alarm_claim, worker_claims
from patchpilot.workers import Depth, Fleet, Worker
from tests.crash.world import worker

PROOF = {"task": "t", "chord": "t"}
ONE, TWO = worker("one", proof=PROOF), worker("two", queues=("reports",), proof=PROOF)
SENT = {"instance of one": "t", "instance of two": "t"}


def place(*workers: Worker, queues: dict[str, int] | None = None, **more: Any) -> Workplace:
    depths = tuple(Depth(name, length, f"{name} {length}") for name, length in (queues or {}).items())
    return Workplace(Fleet(workers or (ONE, TWO), depths), sent=SENT, **more)


def said(at: Workplace, name: str) -> tuple[bool, str]:
    claim = next(claim for claim in worker_claims(at) if claim.name == name)
    return claim.holds, claim.evidence


def test_all_hold_when_all_is_well() -> None:
    assert [(claim.name, claim.holds) for claim in worker_claims(place())] == [
        ("workers-answer", True), ("workers-consume", True), ("queues-drain", True),
    ]  # fmt: skip


def test_without_a_worker_before_and_after_there_is_nothing_to_prove() -> None:
    nobody = Workplace(Fleet())
    assert all(claim.holds for claim in worker_claims(nobody))
    left = Workplace(Fleet(), Before(workers={"x": "one"}))
    assert said(left, "workers-answer") == (
        False,
        (
            "0 of 0 workers answer; none of the workers from before the patch is left; "
            "of 1 from before the patch these are gone: one"
        ),
    )


def test_a_worker_that_is_gone_is_told_and_one_that_was_restarted_is_not_gone() -> None:
    earlier = Before(workers={"instance of one": "one", "an earlier instance of two": "two", "x": "three"})
    assert said(place(before=earlier), "workers-answer") == (
        True, "2 of 2 workers answer; of 3 from before the patch these are gone: three",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"proof": {}}, "two did not run the canary task and chord (0 of 2 processes busy)"),
        ({"proof": {"task": "t"}}, "two did not run the canary chord (0 of 2 processes busy)"),
        ({"proof": {"task": "t", "chord": "an old one"}}, "two did not run the canary chord"),
        ({"queues": ()}, "two consumes none of the application's queues"),
        ({"canary": False}, "two consumes no canary queue: its patchpilot is another version"),
        ({"knows": False, "canary": False, "queues": ()}, "two consumes no canary queue"),
    ],
)
def test_a_worker_that_does_not_consume_is_found_out(change: dict[str, Any], fault: str) -> None:
    holds, evidence = said(place(ONE, replace(TWO, **change)), "workers-consume")
    assert not holds
    assert fault in evidence
    assert "one did" not in evidence


def test_a_worker_that_no_canary_was_sent_to_proves_nothing() -> None:
    assert not said(replace(place(), sent={"instance of one": "t"}), "workers-consume")[0]


def test_a_silent_worker_fails_one_claim_and_is_named() -> None:
    silent = place(ONE, replace(TWO, answers=False))
    assert said(silent, "workers-answer") == (False, "1 of 2 workers answer; two is alive and does not answer")
    assert said(silent, "workers-consume")[0]


def test_a_worker_that_could_not_be_proven_before_and_was_waived_is_not_judged_but_told() -> None:
    excused = Before(excused=frozenset({"instance of two"}))
    for change in ({"answers": False}, {"canary": False}):
        at = place(ONE, replace(TWO, **change), before=excused)
        assert all(claim.holds for claim in worker_claims(at))
        assert "two is not judged" in said(at, "workers-answer")[1]


@pytest.mark.parametrize(
    ("first", "now", "holds"),
    [
        (Depth("spare", 5, "a"), 5, False),
        (Depth("spare", 5, "a"), 6, False),
        (None, 5, False),
        (Depth("spare", 0), 5, False),
        (Depth("spare", 5, "spare 5"), 4, True),
        (Depth("spare", 5, "another"), 6, True),
        (Depth("spare", 5, "a"), 0, True),
    ],
)
def test_a_queue_that_holds_messages_has_to_shrink_or_to_be_taken_from(
    first: Depth | None, now: int, holds: bool
) -> None:
    at = place(queues={"spare": now}, first={"spare": first} if first else {})
    if first and first.oldest == "a":
        at = replace(at, first={"spare": replace(first, oldest=f"spare {now}")})
    claim = said(at, "queues-drain")
    assert claim[0] is holds
    assert holds or "nobody consumes it" in claim[1]


def test_a_queue_is_in_good_hands_if_who_consumes_it_is_proven_to_consume() -> None:
    assert said(place(queues={"reports": 7}), "queues-drain") == (
        True, "1 queue(s) looked at twice; reports holds 7 messages",
    )  # fmt: skip
    idle = place(
        ONE, replace(TWO, proof={}), queues={"reports": 7}, first={"reports": Depth("reports", 7, "reports 7")}
    )
    assert said(idle, "queues-drain") == (
        False,
        ("1 queue(s) looked at twice; reports held 7 messages, then 7: two consumes it, and takes nothing"),
    )


def test_the_return_of_an_earlier_canary_proves_nothing_of_a_queue() -> None:
    stale = replace(TWO, proof=dict.fromkeys(TWO.proof, "of an earlier one"))
    same = {"reports": Depth("reports", 7, "reports 7")}
    assert not said(place(ONE, stale, queues={"reports": 7}, first=same), "queues-drain")[0]


def test_a_queue_that_lost_its_consumers_is_found_even_while_it_is_empty() -> None:
    earlier = Before(consumed=frozenset({"celery", "reports"}))
    assert said(place(ONE, queues={"celery": 0, "reports": 0}, before=earlier), "queues-drain") == (
        False,
        ("2 queue(s) looked at twice; reports holds 0 messages: it was consumed before the patch, and nobody does now"),
    )


def test_a_queue_that_nobody_consumed_before_either_is_not_the_patchs_doing() -> None:
    parked = place(queues={"parked": 3}, before=Before(idle=frozenset({"parked"})))
    assert said(parked, "queues-drain") == (
        True, "1 queue(s) looked at twice; parked holds 3 messages",
    )  # fmt: skip


QUIET, LOUD = Alarm("memory", "OK", tells=True), Alarm("lag", "ALARM", tells=True, reason="7 > 5")


@pytest.mark.parametrize(
    ("alarms", "earlier", "holds"),
    [
        ((QUIET,), Before(), True),
        ((), Before(), True),
        ((QUIET, LOUD), Before(alarms_known=True), False),
        ((QUIET, LOUD), Before(alarms_known=True, firing=frozenset({"lag"})), True),
        ("AWS denies access", Before(alarms_known=True), False),
        ("AWS denies access", Before(), None),
    ],
)
def test_no_alarm_fires_that_did_not_before(alarms: Any, earlier: Before, holds: bool | None) -> None:
    claim = alarm_claim(alarms, earlier)
    assert (claim.holds if claim else None) is holds
    assert claim is None or claim.evidence


def test_what_was_before_is_read_from_the_record_and_from_records_of_older_versions() -> None:
    note = {
        "alarms_known": True, "firing": ["lag"], "workers": {"x": "one"}, "doubtful": ["x"], "idle": ["parked"],
        "consumed": ["celery"],
    }  # fmt: skip
    waived = [{"name": "workers", "waived": "a batch host"}]
    known = Before(
        True, frozenset({"lag"}), {"x": "one"}, frozenset({"x"}), frozenset({"parked"}), frozenset({"celery"})
    )
    assert Before.of({"before": note, "checks": waived}) == known
    assert Before.of({"before": note, "checks": [{"name": "workers"}]}).excused == frozenset()
    assert Before.of({}) == Before()
