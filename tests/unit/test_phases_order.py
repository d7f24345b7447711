"""What a run is asked to do: which options fit together, and what holds when a run is taken up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from patchpilot.errors import Corrupt, Usage
from patchpilot.phases.operations import OPERATIONS
from patchpilot.phases.order import Kind, Order, settle

UPGRADE = {"operation": "engine-upgrade", "engine_version": "9.1"}


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"operation": "reboot"}, "'reboot' is none of service-update, engine-upgrade"),
        ({"operation": "engine-upgrade"}, "operation engine-upgrade needs --engine-version"),
        ({"operation": "node-type"}, "operation node-type needs --node-type"),
        ({"engine_version": "9.1"}, "--engine-version goes with --operation engine-upgrade"),
        ({"operation": "engine-upgrade", "engine_version": "abc"}, "--engine-version: 'abc' is no version"),
        ({"operation": "engine-upgrade", "engine_version": "8."}, "--engine-version: '8.' is no version"),
        ({**UPGRADE, "engine": "postgres"}, "--engine: 'postgres' is none of redis, valkey"),
        ({"engine": "valkey"}, "--engine goes with --operation engine-upgrade"),
        ({"node_type": "cache.r7g.large"}, "--node-type goes with --operation node-type"),
        ({"operation": "test-failover", "update": "u"}, "--update goes with --operation observe or service-update"),
        ({"operation": "observe", "plan": "0" * 16}, "there is nothing to plan"),
        ({"operation": "observe", "approve_before": "trigger"}, "there is nothing to plan or to approve"),
        ({"approve_before": "lunch"}, "'lunch' is not a place to wait"),
    ],
)
def test_what_does_not_fit_together_is_refused(asked: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(Usage, match=complaint):
        settle(asked, None, begun=False)


def test_it_comes_back_from_the_journal_as_it_went_in() -> None:
    order = Order(Kind.ENGINE_UPGRADE, engine="valkey", engine_version="9.1", approve_before="trigger")
    assert Order.of(order.note()) == order
    assert Order.of({}) == Order()


@pytest.mark.parametrize("note", [{"operation": "dance"}, {"tempo": "fast"}, {"operation": "node-type"}])
def test_what_another_version_wrote_is_not_guessed_at(note: dict[str, Any]) -> None:
    with pytest.raises(Corrupt, match="does not understand"):
        Order.of(note)


def test_there_is_an_operation_for_each_kind() -> None:
    assert set(OPERATIONS) == set(Kind)


def settled(on_record: Order | None, *, begun: bool, **asked: str) -> Order:
    return settle(asked, on_record.note() if on_record else None, begun=begun)


def test_a_new_run_does_what_is_asked_for() -> None:
    assert settled(None, begun=False) == Order()
    assert settled(None, begun=False, **UPGRADE) == Order(Kind.ENGINE_UPGRADE, engine_version="9.1")
    for version in ("8", "6.x", "7.2.4"):  # as AWS writes them
        assert settled(None, begun=False, **{**UPGRADE, "engine_version": version}).engine_version == version


class TestTakenUp:
    upgrade = Order(Kind.ENGINE_UPGRADE, engine_version="9.1")
    planned = Order(update="u", plan="0" * 16)
    gated = Order(approve_before="trigger")

    def test_what_has_begun_goes_on_whether_it_is_asked_for_or_not(self) -> None:
        assert settled(self.upgrade, begun=True) == self.upgrade
        assert settled(self.upgrade, begun=True, **UPGRADE) == self.upgrade

    @pytest.mark.parametrize(
        "asked", [{"operation": "service-update"}, {"operation": "engine-upgrade", "engine_version": "9.2"}]
    )
    def test_what_has_begun_cannot_become_something_else(self, asked: dict[str, str]) -> None:
        with pytest.raises(Usage, match=r"engine upgrade to 9\.1\) has begun: .* would change it"):
            settled(self.upgrade, begun=True, **asked)

    def test_until_it_has_begun_the_command_line_says_what_to_do(self) -> None:
        assert settled(self.upgrade, begun=False) == Order()  # a schedule does not take up somebody's upgrade
        assert settled(self.upgrade, begun=False, update="v") == Order(update="v")

    def test_nobody_gets_past_a_plan_by_leaving_the_option_out(self) -> None:
        assert settled(self.planned, begun=False) == self.planned
        of_update = replace(self.planned, update="u")
        assert settled(of_update, begun=False, update="u") == of_update
        gated = settled(of_update, begun=False, approve_before="trigger")
        assert (gated.plan, gated.approve_before) == (self.planned.plan, "trigger")
        with pytest.raises(Usage, match=r"held to plan .* --update v is not part of it"):
            settled(of_update, begun=False, update="v")
        assert settled(of_update, begun=False, plan="1" * 16).plan == "1" * 16

    def test_nobody_gets_past_an_approval_by_leaving_the_option_out(self) -> None:
        assert settled(self.gated, begun=False) == self.gated
        assert settled(self.gated, begun=False, update="v") == Order(update="v", approve_before="trigger")
        assert settled(self.gated, begun=False, operation="observe") == Order(Kind.OBSERVE)
