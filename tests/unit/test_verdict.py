"""The demo's judge: what the ledger says, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

from patchpilot.lab.ledger import Ledger
from patchpilot.lab.producer import LARGEST, SMALLEST, orders
from patchpilot.lab.verdict import CALLBACK, HEADER, PART, stuck, verdict


def ledger(path: Path) -> Ledger:
    """Six chords: one well, one of each kind of loss, one that ran twice, one whose sending raised."""
    book = Ledger(path / "ledger")
    for name, parts, callbacks in [
        ("well", 2, 1),
        ("header", 1, 0),
        ("part", 2, 0),
        ("callback", 2, 0),
        ("twice", 2, 2),
    ]:
        book.write("sent", name, employees=[0, 1], group_id=f"g-{name}")
        for part in range(parts):
            book.write("part", name, part=part)
        for _ in range(callbacks):
            book.write("callback", name, right=True, got="")
    book.write("part", "well", part=0)
    book.write("raised", "raised", error="OperationalError")
    return book


def test_the_kinds_of_loss(tmp_path: Path) -> None:
    chords = ledger(tmp_path).read()
    later = max(chord.sent_at or 0 for chord in chords.values()) + 60
    found = stuck(chords, later, counting={"g-part"}, waiting=set())
    assert dict(found.kinds) == {"header": HEADER, "part": PART, "callback": CALLBACK}
    assert stuck(chords, later - 59, set(), set()).kinds == {}


def test_what_waits_is_late_and_hides_no_loss(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.write("sent", "half", employees=[0, 1, 2], group_id="g-half")
    book.write("part", "half", part=0)
    chords = book.read()
    later = max(chord.sent_at or 0 for chord in chords.values()) + 60

    def kinds(*waiting: tuple[str, int | None]) -> dict[str, str]:
        return dict(stuck(chords, later, {"g-part", "g-half"}, set(waiting)).kinds)

    rest = {"header": HEADER, "part": PART, "callback": CALLBACK}
    assert kinds() == {**rest, "half": HEADER}
    assert kinds(("half", 1)) == {**rest, "half": HEADER}  # one of its messages waits, the other is lost
    assert kinds(("half", 0), ("half", None)) == {**rest, "half": HEADER}
    assert kinds(("half", 1), ("half", 2)) == rest
    assert "callback" not in kinds(("callback", None))
    assert "part" not in kinds(("part", 1))  # it ran, is not acknowledged, and will return or run again


def test_a_part_that_ran_after_the_moment_had_not_run(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "ledger")
    book.write("sent", "chord", employees=[7], group_id="g")
    sent = book.read()["chord"].sent_at or 0
    chord = book.read()["chord"]
    chord.add({"what": "part", "part": 7, "at": sent + 20})
    chord.add({"what": "callback", "right": True, "at": sent + 21})
    assert stuck({"chord": chord}, sent + 10, {"g"}, set()).kinds == {"chord": HEADER}
    assert stuck({"chord": chord}, sent + 10, {"g"}, {("chord", 7)}).kinds == {}
    assert stuck({"chord": chord}, sent + 22, set(), set()).kinds == {}


def test_the_verdict(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    later = max(chord.sent_at or 0 for chord in book.read().values()) + 60
    before = stuck(book.read(), later, {"g-part"}, set())
    book.write("callback", "part", right=True, got="")
    book.write("callback", "header", right=False, got="[1]")
    found = verdict(book.read(), before)
    assert (found.sent, found.stuck, found.recovered, found.lost) == (5, 3, 2, 1)
    assert (found.duplicated, found.wrong, found.raised, found.repeated_parts) == (1, 1, 1, 1)
    assert found.lost_by_kind == {CALLBACK: 1}
    assert not found.good


def test_the_traffic_is_a_function_of_its_seed() -> None:
    first, second, other = (list(itertools.islice(orders(seed, 5.0), 300)) for seed in (1, 1, 2))
    assert first == second != other
    sizes = [len(order.employees) for order in first]
    assert min(sizes) == SMALLEST
    assert max(sizes) > LARGEST * 0.9
    assert all(
        list(order.employees) == [who for dates in order.plan.values() for ids in dates.values() for who in ids]
        for order in first
    )
