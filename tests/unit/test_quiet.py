"""What is said to a person of what is open and no finding: never that all is well where nobody knows."""

from __future__ import annotations

from datetime import timedelta

from patchpilot.recovery.diagnose import CHORDS
from patchpilot.recovery.findings import Finding, Remedy, Window
from patchpilot.recovery.quiet import STANDING, Hands, Outside, Quiet, headline, rest

WINDOW = Window(timedelta(minutes=5), timedelta(hours=24))


def test_there_is_a_word_for_every_chord_that_is_no_finding() -> None:
    assert set(STANDING) == {rule.name for rule in CHORDS if not rule.report}


def test_that_nothing_is_stuck_is_said_without_reserve_only_if_everything_was_looked_at() -> None:
    assert headline(Quiet({"at-work": 3})) == "nothing is stuck"
    for quiet in (
        Quiet(outside=Outside(young=1)),
        Quiet(outside=Outside(old=1)),
        Quiet(messages_outside=Outside(young=1)),
        Quiet(messages_outside=Outside(old=1)),
    ):
        assert headline(quiet) == "nothing is stuck of what was looked at"
    assert headline(Quiet(), elsewhere=True) == "nothing is stuck of what was looked at"
    assert headline(Quiet(), ["task"]) == "nothing is stuck of what was looked at"


def test_what_is_open_is_told_in_numbers() -> None:
    assert rest((), Quiet(), WINDOW) == ()
    assert rest((), Quiet({"at-work": 130}, Hands(queued=512), tasks=Hands(queued=1)), WINDOW) == (
        "open: 130 chords under way; messages of their headers: 512 in queues, none with a worker",
        "open: 1 message of other tasks: 1 in queues, none with a worker",
        "open: no worker has any of what is queued; if that stays so, look whether one consumes these queues",
    )
    busy = Quiet({"at-work": 1, "finishing": 1, "being-dispatched": 1}, Hands(2, 3), Hands(1, 1), Hands(0, 4))
    of_chords, of_callbacks, of_tasks = (
        (
            "open: 2 chords being finished",
            "open: 1 chord under way; messages of their headers: 2 in queues, 3 with workers",
        ),
        ("open: 2 messages of callbacks: 1 in queues, 1 with workers",),
        ("open: 4 messages of other tasks: 0 in queues, 4 with workers",),
    )
    assert rest((), busy, WINDOW) == (*of_chords, *of_callbacks, *of_tasks)
    assert rest((), busy, WINDOW, ["chord"])[:-1] == of_chords
    assert rest((), busy, WINDOW, ["callback"])[:-1] == of_callbacks
    assert rest((), busy, WINDOW, ["task"])[:-1] == of_tasks


def test_what_was_not_looked_at_is_told_as_such() -> None:
    quiet = Quiet({"at-work": 1}, outside=Outside(2, 3), messages_outside=Outside(1, 5))
    assert rest((), quiet, WINDOW)[1:] == (
        "not looked at: 2 chords with progress in the last 5m 0s",
        "not looked at: 3 chords without progress for 1d 0h",
        "not looked at: 1 message with progress in the last 5m 0s",
        "not looked at: 5 messages without progress for 1d 0h",
    )
    assert rest((), quiet, WINDOW, ["task"]) == (
        "not looked at: chords and callbacks, which were not asked for",
        "not looked at: 1 message with progress in the last 5m 0s",
        "not looked at: 5 messages without progress for 1d 0h",
    )


def test_what_is_not_known_is_not_called_well() -> None:
    unknown = [
        Finding("chord", "g", "unknown", Remedy.NONE, "a worker is silent"),
        Finding("callback", "h", "callback-unknown", Remedy.NONE, "a worker is silent"),
    ]
    assert rest([*unknown, Finding("task", "t", "expired", Remedy.NONE, "expired")], Quiet(), WINDOW) == (
        "not known: whether 2 of these are lost or well; the reason is given",
    )
