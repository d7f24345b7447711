"""The report, made from journals written by hand and from a whole run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from patchpilot.clock import FakeClock
from patchpilot.engine.journal import Entry, Kind, MemoryJournal
from patchpilot.engine.runner import Runner
from patchpilot.errors import Exit, NeedsOperator, PatchpilotError
from patchpilot.phases import RUNBOOK, runbook
from patchpilot.postgres.journal import Run
from patchpilot.report import KINDS, Files, build, html, markdown, write
from patchpilot.report.build import OWN_PHASE
from patchpilot.report.story import PHASES
from tests.crash.world import World, desk, stuck

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
RUN = Run("20260301-120000-abc123", "prod", "broker", NOON)
SCHEMA = json.loads((files("patchpilot.report") / "report.schema.json").read_text())


def journal(*lines: tuple[Kind, str, dict[str, Any]]) -> list[Entry]:
    """Entries a minute apart; a step's phase has its name."""
    return [
        Entry(number, NOON + timedelta(minutes=number), kind, step, step, data)
        for number, (kind, step, data) in enumerate(lines, 1)
    ]


def say(kind: Kind, step: str = "", **data: Any) -> tuple[Kind, str, dict[str, Any]]:
    return kind, step, data


def made(entries: Sequence[Entry]) -> dict[str, Any]:
    """The report, which has to satisfy its schema however little is known."""
    report = build(entries, RUN)
    jsonschema.validate(json.loads(json.dumps(report)), SCHEMA)
    assert markdown(report).startswith("# Patch of broker")
    assert "Patch of broker" in Reader.of(html(report)).text
    return report


class Reader(HTMLParser):
    """What a browser makes of a page: its text, its elements and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[str] = []
        self.attributes: dict[str, set[str]] = {}
        self._open: list[str] = []

    @classmethod
    def of(cls, page: str) -> Reader:
        reader = cls()
        reader.feed(page)
        reader.close()
        assert reader._open == [], "not everything that was opened is closed"
        return reader

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += f" {data}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryJournal, Path]:
    """A whole run in the little world, its journal, and where its report is."""
    clock = FakeClock()
    world, kept, directory = World(clock), MemoryJournal(clock, "run-1"), tmp_path_factory.mktemp("reports")
    world.stick(stuck("old-chord"))
    world.repeated.append(
        (clock.now() + timedelta(hours=1), {"task_id": "t-1", "group_id": "g-1", "callback_name": "f", "starts": 2})
    )
    Runner(runbook(desk(world, kept, directory)), kept, clock).run()
    return world, kept, directory


def test_a_whole_run_satisfies_the_schema(whole: tuple[World, MemoryJournal, Path]) -> None:
    report = made(whole[1].entries())
    assert report["outcome"] == "done"
    assert report["may_have_run_twice"][0]["task_id"] == "t-1"


def test_the_schema_forbids_what_it_does_not_know() -> None:
    report = build([], RUN)
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate({**report, "surprise": 1}, SCHEMA)


def test_the_report_is_the_same_before_and_after_its_own_phase_and_years_later(
    whole: tuple[World, MemoryJournal, Path],
) -> None:
    _, kept, directory = whole
    entries = kept.entries()
    before = [entry for entry in entries if entry.seq < next(e.seq for e in entries if e.phase == OWN_PHASE)]
    run = Run("run-1", "test", "broker", NOON)
    assert build(entries, run) == build(before, run) == build(entries, run)
    on_disk = json.loads((directory / "run-1" / "report.json").read_text())
    assert on_disk == json.loads(json.dumps(build(entries, run)))


def test_stopping_and_dying_while_the_report_is_written_is_no_part_of_it() -> None:
    lines = [say(Kind.STARTED), say(Kind.INTENDED, "verify"), say(Kind.REACHED, "verify", claims=[])]
    own = [
        say(Kind.INTENDED, OWN_PHASE), say(Kind.ACTING, OWN_PHASE), say(Kind.RESUMED, OWN_PHASE),
        say(Kind.CONTRADICTED, OWN_PHASE, why="disk full", exit=1), say(Kind.RESUMED, OWN_PHASE),
    ]  # fmt: skip
    assert made(journal(*lines, *own)) == made(journal(*lines))


def test_the_page_tells_a_person_what_counts(whole: tuple[World, MemoryJournal, Path]) -> None:
    page = (whole[2] / "run-1" / "report.md").read_text()
    for line in (
        "**Done and proven.**",
        "| Recommended by (compliance) | 2026-01-28 00:00:00 UTC |",
        "| Cannot be applied after | 2026-04-01 00:00:00 UTC |",
        "| Applied by AWS itself after the recommended date | no: AWS does nothing by itself |",
        "| How it came to run | applied by this run; initiated by customer, says AWS |",
        "20 min 0 s from the failover to shop-broker-002",
        "| Stuck after the patch | 2 |",
        "| nothing-stuck | holds |",
        "May have run twice in part",
    ):
        assert line in page


def test_the_report_knows_the_runbooks_phases_and_steps(whole: tuple[World, MemoryJournal, Path]) -> None:
    world, kept, directory = whole
    phases = [phase(desk(world, kept, directory)) for phase in RUNBOOK]
    assert [phase.name for phase in phases] == [*PHASES, OWN_PHASE]
    assert [phase.steps[-1].name for phase in phases[:-1]] == [last for _, last in PHASES.values()]


def test_a_run_that_has_not_begun() -> None:
    report = made([])
    assert (report["outcome"], report["started_at"], report["update"]) == ("unfinished", None, None)
    assert {phase["state"] for phase in report["phases"]} == {"not-begun"}


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(Exit.BLOCKED, "blocked"), (Exit.VERIFICATION_FAILED, "verification-failed"), (Exit.ERROR, "stopped")],
)
def test_a_run_that_stopped_says_why(code: Exit, outcome: str) -> None:
    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "readiness"),
        say(Kind.CONTRADICTED, "readiness", why="replica: 1 node", exit=int(code)),
    )  # fmt: skip
    report = made(entries)
    assert (report["outcome"], report["why"], report["finished_at"]) == (outcome, "replica: 1 node", None)
    assert "> replica: 1 node" in markdown(report)


def test_a_blocked_run_shows_its_checks() -> None:
    check = {"name": "replica", "verdict": "block", "evidence": "1 nodes", "why": "w", "mend": "add one"}
    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "readiness"), say(Kind.OBSERVED, "readiness", checks=[check]),
        say(Kind.CONTRADICTED, "readiness", why="replica", exit=int(Exit.BLOCKED)),
    )  # fmt: skip
    assert made(entries)["preflight"]["checks"] == [check]


def test_nothing_to_do() -> None:
    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "readiness"),
        say(Kind.FINISHED, outcome="nothing-to-do", why="all complete"),
    )  # fmt: skip
    report = made(entries)
    assert (report["outcome"], report["why"], report["seconds"]) == ("nothing-to-do", "all complete", 120.0)


ABORT = {"why": "stop asked for by ann on laptop", "by": "ann on laptop"}


@pytest.mark.parametrize(
    ("stopped", "came_to", "how"),
    [
        ({"status": "stopped", "attempts": 1}, "stopped", "AWS was asked to stop it"),
        ({"status": "complete", "attempts": 0}, "complete", "without a request of this run"),
        ({"status": "a word of tomorrow", "attempts": 0}, None, "without a request of this run"),
        (None, None, "it is being stopped"),
    ],
)
def test_an_aborted_rotation_says_why_by_whom_and_how(
    stopped: dict[str, Any] | None, came_to: str | None, how: str
) -> None:
    lines = [
        say(Kind.STARTED),
        say(Kind.INTENDED, "watch"),
        say(Kind.REACHED, "watch", status="in-progress", abort=ABORT),
    ]
    lines += [say(Kind.INTENDED, "stop")]
    if stopped is not None:
        lines += [say(Kind.REACHED, "stop", **stopped), say(Kind.INTENDED, "verify")]
        lines += [say(Kind.REACHED, "verify", claims=[])]
    report = made(journal(*lines))
    assert report["abort"] == {
        **ABORT, "status": stopped and stopped["status"], "requests": stopped and stopped["attempts"],
        "given_up": False, "came_to": came_to,
    }  # fmt: skip
    assert report["outcome"] == ("aborted" if stopped else "unfinished")
    assert (report["why"], report["finished_at"] is None) == ((ABORT["why"], False) if stopped else (None, True))
    page = markdown(report)
    assert "## Aborted" in page
    assert f"| How | {how} |" in page


def test_a_run_that_was_ended_before_it_began_is_aborted_too() -> None:
    entries = journal(
        say(Kind.STARTED, order={"operation": "node-type", "node_type": "cache.r7g.large"}),
        say(Kind.FINISHED, outcome="aborted", why="ended before anything was started"),
    )
    report = made(entries)
    assert (report["outcome"], report["why"], report["abort"]) == ("aborted", "ended before anything was started", None)
    assert report["operation"]["kind"] == "node-type"
    assert report["finished_at"] is not None


def test_interruptions_tell_a_kill_from_a_stop_and_from_giving_up() -> None:
    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "watch"), say(Kind.RESUMED, "watch"),
        say(Kind.PAUSED, "watch", why="asked to stop"), say(Kind.RESUMED, "watch"),
        say(Kind.CONTRADICTED, "watch", why="stalled", exit=1), say(Kind.RESUMED, "watch"),
    )  # fmt: skip
    told = [(each["how"], each["why"], each["after"]) for each in made(entries)["interruptions"]]
    assert told == [
        ("killed", None, "intended watch/watch"),
        ("stopped", "asked to stop", "paused watch/watch"),
        ("gave-up", "stalled", "contradicted watch/watch"),
    ]


def test_the_timeline_holds_changes_only() -> None:
    def look(status: str, node: str) -> dict[str, Any]:
        return {
            "status": status, "group": "modifying", "nodes": {"a": {"status": node}},
            "rotation": {"failovers": [], "primary": "a", "primary_since": None},
        }  # fmt: skip

    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "watch"),
        say(Kind.OBSERVED, "watch", **look("in-progress", "not-applied")),
        say(Kind.OBSERVED, "watch", **look("in-progress", "in-progress")),
    )  # fmt: skip
    lines = [(each["what"], each["status"]) for each in made(entries)["timeline"]]
    assert lines == [
        ("group", "modifying"), ("node a", "not-applied"), ("update", "in-progress"), ("node a", "in-progress"),
    ]  # fmt: skip


def test_no_secret_leaves_the_journal_for_the_report() -> None:
    why = "rediss://pilot:hunter2@broker.example:6379/0 does not answer; password=hunter2"
    entries = journal(say(Kind.STARTED), say(Kind.INTENDED, "watch"), say(Kind.PAUSED, "watch", why=why))
    report = made(entries)
    assert "hunter2" not in json.dumps(report) + markdown(report) + html(report)
    assert "rediss://***@broker.example:6379/0 does not answer" in report["why"]


def test_a_cell_cannot_break_its_table() -> None:
    check = {"name": "x", "verdict": "pass", "evidence": "a | b\nc", "why": "w", "mend": ""}
    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "readiness"), say(Kind.OBSERVED, "readiness", checks=[check])
    )
    assert "| x | pass | a \\| b c | - |" in markdown(made(entries))


def test_writing_again_changes_nothing_and_leaves_no_scraps(tmp_path: Path) -> None:
    report = build(journal(say(Kind.STARTED)), RUN)
    first = write(report, tmp_path)
    content = [path.read_bytes() for path in first]
    assert (
        write(report, tmp_path) == first == tuple(tmp_path / RUN.id / f"report.{end}" for end in ("json", "md", "html"))
    )
    assert [path.read_bytes() for path in first] == content
    assert sorted(path.name for path in (tmp_path / RUN.id).iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_file_that_cannot_be_put_in_place_leaves_no_scraps_either(tmp_path: Path) -> None:
    (tmp_path / RUN.id / "report.json" / "in the way").mkdir(parents=True)
    with pytest.raises(NeedsOperator, match="setting `reports`"):
        write(build([], RUN), tmp_path)
    assert [path.name for path in (tmp_path / RUN.id).iterdir()] == ["report.json"]


def test_files_are_current_only_while_they_say_what_the_journal_says(tmp_path: Path) -> None:
    kept = MemoryJournal(FakeClock(), RUN.id)
    kept.append(Kind.STARTED)
    on_disk = Files(kept, RUN, tmp_path)
    assert on_disk.current() is None
    written = on_disk.write()
    assert on_disk.current() == written
    report = build(kept.entries(), RUN)
    assert Path(written["html"]).read_text() == html(report)
    for kind in KINDS:
        assert RUN.id in Path(written[kind]).read_text()
        Path(written[kind]).write_text("tampered")
        assert on_disk.current() is None
        on_disk.write()
    Path(written["markdown"]).write_bytes(b"\xff")
    assert on_disk.current() is None
    on_disk.write()
    kept.append(Kind.INTENDED, "preflight", "readiness", {"cluster": "broker"})
    assert on_disk.current() is None


def test_reports_directory_that_is_a_file_is_a_persons_mistake(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("")
    with pytest.raises(PatchpilotError, match="cannot write"):
        write(build([], RUN), tmp_path / "reports")


def test_the_html_says_what_the_markdown_says(whole: tuple[World, MemoryJournal, Path]) -> None:
    report = build(whole[1].entries(), RUN)
    text = " ".join(Reader.of(html(report)).text.split())
    for line in markdown(report).splitlines():
        for words in line.strip("#>| ").split(" | "):
            assert " ".join(words.replace("`", "").replace("**", " ").split()) in text or set(words) <= set("-| ")


def test_the_html_needs_nothing_from_elsewhere_and_runs_nothing(whole: tuple[World, MemoryJournal, Path]) -> None:
    page = html(build(whole[1].entries(), RUN))
    reader = Reader.of(page)
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(reader.elements)
    assert not {name for name in reader.attributes if name.startswith("on") or name in {"src", "href", "action"}}
    assert any("default-src 'none'" in value for value in reader.attributes["content"])
    assert "url(" not in page
    assert "@import" not in page


HOSTILE = """<script>alert(1)</script> & <b>"'</b>"""


def test_whatever_is_quoted_in_the_html_stays_words() -> None:
    """People's reasons, names of queues and chords, AWS's free texts, and the name of the cluster."""
    check = {"name": HOSTILE, "verdict": "warn", "evidence": HOSTILE, "why": "w", "mend": HOSTILE, "waived": HOSTILE}
    finding = {
        "kind": "chord",
        "id": HOSTILE,
        "callback": HOSTILE,
        "diagnosis": HOSTILE,
        "remedy": "none",
        "reason": HOSTILE,
    }
    entries = journal(
        say(Kind.STARTED), say(Kind.INTENDED, "readiness", group=HOSTILE, version=HOSTILE),
        say(Kind.REACHED, "readiness", checks=[check], waivers={HOSTILE: HOSTILE}, what=HOSTILE,
            versions={HOSTILE: HOSTILE}, update={"description": HOSTILE},
            action={"update": HOSTILE, "status": HOSTILE}),
        say(Kind.INTENDED, "dry-run"), say(Kind.REACHED, "dry-run", findings=[finding], counts={HOSTILE: 1}),
        say(Kind.INTENDED, "verify"),
        say(Kind.OBSERVED, "verify", claims=[{"name": HOSTILE, "holds": False, "evidence": HOSTILE}]),
        say(Kind.CONTRADICTED, "verify", why=HOSTILE, exit=int(Exit.VERIFICATION_FAILED)),
    )  # fmt: skip
    run = Run(HOSTILE, HOSTILE, HOSTILE, NOON)
    harmless = Run("run-1", "prod", "broker", NOON)
    page, other = html(build(entries, run)), html(build(entries, harmless))
    assert Reader.of(page).elements == Reader.of(other).elements
    assert not {"script", "b>"} & set(Reader.of(page).elements)
    assert "<script" not in page
    assert Reader.of(page).text.count("<script>alert(1)</script>") >= 20
