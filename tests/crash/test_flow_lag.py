"""A failover just before the run, which AWS shows late: it is no part of the run, and proves nothing of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from patchpilot.errors import NothingToDo, Transient, Unsafe
from tests.crash.flow import ORDERS, Flow, arranged
from tests.crash.world import NAMES


def lagging(flow: Flow) -> Flow:
    """There was a failover a moment ago, and AWS shows it a minute late: its roles and its event."""
    flow.world.fail_over(NAMES[2])
    flow.world.stale = 60
    flow.clock.sleep(5)
    return flow


@pytest.mark.parametrize("silent", [False, True])
def test_what_aws_shows_late_is_no_proof_of_a_test_failover_that_never_happened(tmp_path: Path, silent: bool) -> None:
    flow = lagging(arranged(tmp_path, "test-failover"))
    flow.world.surprises["apply"] = [Transient("AWS answers 503")] * 100
    if silent:
        flow.world.surprises |= {f"{name}.test": [Transient("silent")] * 2000 for name in NAMES}
    assert "AWS shows nothing of it" in flow.refuses(Unsafe)
    assert flow.world.applied == []
    flow.world.surprises.clear()
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]


def test_the_nodes_word_proves_a_test_failover_back_to_whom_aws_still_showed(tmp_path: Path) -> None:
    flow = arranged(tmp_path, "test-failover")
    flow.world.tells_of_failovers = False
    flow.world.change(primary=NAMES[1])
    flow.clock.sleep(300)
    lagging(flow).run()
    assert (flow.outcome, [row["to"] for row in flow.report()["failovers"]]) == ("done", [NAMES[1]])


@pytest.mark.parametrize("kind", ["test-failover", "engine-upgrade", "service-update"])
def test_the_failover_before_the_run_is_not_listed_as_one_of_it(tmp_path: Path, kind: str) -> None:
    flow = lagging(arranged(tmp_path, kind))
    flow.run()
    assert (flow.outcome, len(flow.world.applied)) == ("done", 1)
    assert [row["to"] for row in flow.report()["failovers"]] == [NAMES[1]]


def test_a_failover_before_it_is_not_what_is_observed(tmp_path: Path) -> None:
    flow = lagging(Flow(tmp_path, ORDERS["observe"], observe=timedelta(minutes=30)))
    assert "nothing began" in flow.refuses(NothingToDo)
