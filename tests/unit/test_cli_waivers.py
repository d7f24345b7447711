"""Waivers on the command line: by name, and never without a reason."""

from __future__ import annotations

import pytest

from patchpilot.cli.orders import read_waivers
from patchpilot.errors import Usage


def test_each_check_has_its_reason_in_order() -> None:
    assert read_waivers(None, None) == {}
    assert read_waivers(["alarms", "history"], ["on the\n wall", "known"]) == {
        "alarms": "on the wall", "history": "known",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("checks", "reasons", "words"),
    [
        (["luck"], ["x"], r"there is no check 'luck' \(checks: group-available, .*, schema\)"),
        (["alarms", "alarms"], ["x", "y"], "'alarms' is given twice"),
        (["alarms"], None, "needs a --reason"),
        (["alarms", "history"], ["x"], "needs a --reason"),
        (["alarms"], [" "], "needs a --reason"),
        (None, ["x"], "needs a --reason"),
    ],
)
def test_anything_else_is_refused(checks: list[str] | None, reasons: list[str] | None, words: str) -> None:
    with pytest.raises(Usage, match=words):
        read_waivers(checks, reasons)
