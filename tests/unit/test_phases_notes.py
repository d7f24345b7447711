"""How facts are written down and read by people."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from patchpilot.elasticache.facts import NodeUpdate, UpdateAction
from patchpilot.phases.notes import clock_time, length, moment, noted

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_facts_become_what_json_can_express_and_moments_come_back() -> None:
    action = UpdateAction("g", "u", "complete", nodes=(NodeUpdate("a", "complete", started=NOON),), modified=NOON)
    note = json.loads(json.dumps(noted({"action": action, 3: timedelta(minutes=2)})))
    assert moment(note["action"]["modified"]) == NOON
    assert note["action"]["nodes"][0] == {
        "node": "a", "status": "complete", "started": NOON.isoformat(), "ended": None, "initiated_by": "",
        "initiated": None,
    }  # fmt: skip
    assert note["3"] == 120.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.2, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (7384, "2h03m")],
)
def test_lengths_of_time_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert length(timedelta(seconds=seconds)) == text


def test_moments_say_that_they_are_utc() -> None:
    assert clock_time(NOON) == "2026-03-01 12:00:00 UTC"
