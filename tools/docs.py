"""Write the parts of the documentation that the code knows better: `make docs`.

The diagrams in README.md and the index of the runbooks come from the runbook's own phases and from the tables that say
what may follow what in a journal; the page of diagnoses comes from recovery's tables, and from the lines that the
runbook has for them. A test fails when they are out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from patchpilot.engine.journal import RUN_TRANSITIONS, TRANSITIONS, Kind
from patchpilot.engine.plan import Effect, Phase, Step
from patchpilot.errors import Exit
from patchpilot.phases import RUNBOOK, Desk
from patchpilot.phases.operations import OPERATIONS
from patchpilot.recovery.diagnose import CHORDS, MESSAGES, Rule
from patchpilot.recovery.findings import Remedy, Window
from patchpilot.settings import Runbook

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
INDEX = ROOT / "runbooks" / "README.md"
DIAGNOSES = ROOT / "docs" / "diagnoses.md"
ADVICE = ROOT / "runbooks" / "diagnoses.md"

EFFECTS = {
    Effect.READ: "reads only",
    Effect.OBSERVABLE: "changes the cluster, and looks before it does",
    Effect.PUBLISH: "sends what is missing, or writes files",
}


def phases() -> list[Phase]:
    """The runbook's phases, on a desk with nothing on it."""
    needed = [each.name for each in fields(Desk) if each.default is MISSING and each.default_factory is MISSING]
    laid: dict[str, Any] = {"role": "cache", "runbook": Runbook(), "window": Window()}
    desk = Desk(**{**dict.fromkeys(needed), **laid})
    return [phase(desk) for phase in RUNBOOK]


def flow() -> str:
    """The phases in order, and the steps of each."""
    names = " ─▶ ".join(f"{number} {phase.name}" for number, phase in enumerate(phases(), 1))
    lines = [names, ""]
    for number, phase in enumerate(phases(), 1):
        steps = ", ".join(step.name + ("!" if step.effect is Effect.OBSERVABLE else "") for step in phase.steps)
        lines.append(f"{number} {phase.name:10} {phase.title:36} {steps}")
    return (
        "```\n"
        + "\n".join(lines)
        + "\n```\nSteps with a ! change the cluster; all others only read, or send what is missing."
    )


def diagram(transitions: Mapping[tuple[Any, Kind], Any]) -> str:
    """What may follow what, as Mermaid draws it: entries that lead from one state to another share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (before, kind), after in transitions.items():
        arrows.setdefault((_state(before), _state(after)), []).append(str(kind))
    first = _state(next(iter(transitions))[0])
    lines = [f"    {before} --> {after}: {', '.join(kinds)}" for (before, after), kinds in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {first}", *lines, "```"])


def states() -> str:
    """Both tables, as diagrams."""
    return "\n\n".join((
        "The run as a whole:", diagram(RUN_TRANSITIONS), "Each of its steps:", diagram(TRANSITIONS),
    ))  # fmt: skip


def index() -> str:
    """The index of the runbooks."""
    rows = [
        f"| {number} | [{phase.name}](p{number}-{phase.name}.md) | {phase.title} | {_steps(phase.steps)} |"
        for number, phase in enumerate(phases(), 1)
    ]
    kinds = [f"| `{kind}` | {each.begins} | {_stops(each.stoppable)} |" for kind, each in OPERATIONS.items()]
    others = sorted(page for page in INDEX.parent.glob("*.md") if not re.match(r"p\d|README", page.name))
    return "\n".join((
        "# Runbooks", "",
        "One page for each phase: what it does, what you see, how to do it by hand, and what if it dies here.", "",
        "| | Phase | What for | Its steps |", "|---|---|---|---|", *rows, "",
        "A step " + "; ".join(f"of effect *{effect}* {text}" for effect, text in EFFECTS.items()) + ".", "",
        "## What it can do", "",
        "| Operation | The trigger | Can AWS stop it half-way? |", "|---|---|---|", *kinds, "",
        "## What the journal says", "",
        "A run is what its journal says, and a journal in which anything else follows is refused.", "", states(), "",
        "## Exit codes", "", ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in Exit) + ".",
        "", "## Other pages", "", *(f"- [{_title(page)}]({page.name})" for page in others), "",
        "<!-- Written by `make docs`. -->", "",
    ))  # fmt: skip


REMEDIES = {
    Remedy.DISPATCH_CALLBACK: "claim the chord in PostgreSQL, join its results from there, publish its callback with "
    "its own task id; or, if a part failed, store the `ChordError` as the callback's result and call its errbacks",
    Remedy.REPUBLISH: "publish the message on record again, as it was, with its own task id",
    Remedy.REQUEUE: "put the message back into its queue, as Celery does after the visibility timeout",
    Remedy.RECORD_PART: "record the part from the result of its task; if that completes the chord, dispatch its "
    "callback",
    Remedy.REVOKE_PART: "store that its task was revoked, as a worker does that meets it, and record the part from "
    "there; if that completes the chord, it fails: its errbacks are called",
    Remedy.NONE: "nothing",
}


def advice(page: Path = ADVICE) -> dict[str, str]:
    """What a person does about each diagnosis: the runbook's line of it, by the name of its anchor."""
    found = re.findall(r'^\| <a id="([\w-]+)"></a>`[^`]+` \| (.+) \|$', page.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(found)


def diagnoses() -> str:
    """Recovery's tables, row by row."""
    lines = [
        "# Diagnoses", "",
        "What `patchpilot recover --dry-run` and `patchpilot chords` say about something that does not go on, what it",
        "is known by, and what recovery does about it. The first row that applies is the diagnosis. Age counts from",
        "the last progress that was seen, and only what made none for `--min-age` is looked at. What cannot be known,",
        "because a worker that is alive does not answer or a server is away, is never remedied, unless",
        "`--assume-lost` says so.", "",
        "## Remedies", "", "| Remedy | What recovery does |", "|---|---|",
        *(f"| `{remedy}` | {REMEDIES[remedy]} |" for remedy in Remedy), "",
        "Each is claimed in PostgreSQL, by the statement that takes effect, before anything leaves for the broker.", "",
    ]  # fmt: skip
    for title, kind, rules in (
        ("Of a chord whose callback is not out", "chord", CHORDS),
        ("Of a message whose task has not ended", "message", MESSAGES),
    ):
        lines += [f"## {title}", "", *_table_of(kind, rules), ""]
    lines += [
        "That of a chord's callback has `callback-` before its name: `callback-message-lost`. A message of a header",
        "that is lost is told with its chord. Rows in *italics* are all well and are not reported.", "",
        "<!-- Written by `make docs`. -->", "",
    ]  # fmt: skip
    return "\n".join(lines)


def anchor(kind: str, name: str) -> str:
    """Where the runbook says what to do about it."""
    return f"{kind}-{name}"


def _table_of(kind: str, rules: Iterable[Rule[Any]]) -> Iterator[str]:
    told = advice()
    yield "| Diagnosis | Evidence | Remedy | Why | What you do |"
    yield "|---|---|---|---|---|"
    for rule in rules:
        at = anchor(kind, rule.name)
        todo = f"[{told[at]}](../runbooks/{ADVICE.name}#{at})" if rule.report else ""
        name = f"`{rule.name}`" if rule.report else f"*{rule.name}*"
        yield f"| {name} | {rule.evidence} | `{rule.remedy}` | {_spoken(rule.why)} | {todo} |"


def _spoken(why: str) -> str:
    """A sentence whose blanks are not filled in."""
    return re.sub(r"\{(\w+)\}", lambda blank: f"*{blank[1].replace('_', ' ')}*", why)


def readme(text: str) -> str:
    """``text`` with everything between its markers written anew."""
    for name, content in (("phases", flow()), ("states", states())):
        block = f"<!-- docs: {name} -->\n{content}\n<!-- /docs -->"
        text, found = re.subn(
            rf"<!-- docs: {name} -->.*?<!-- /docs -->", lambda _, new=block: new, text, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f"README.md has {found} places for {name!r}; it needs one")
    return text


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that is written here, and what it should say."""
    yield README, readme(README.read_text(encoding="utf-8"))
    yield INDEX, index()
    yield DIAGNOSES, diagnoses()


def _steps(steps: tuple[Step, ...]) -> str:
    return "; ".join(f"**{step.name}** ({step.effect}): {step.title}" for step in steps)


def _stops(stoppable: bool) -> str:
    return "yes" if stoppable else "no"


def _state(state: Any) -> str:
    return str(state).replace(" ", "_")


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def main() -> int:
    """Write what is out of date."""
    for path, text in pages():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stderr.write(f"wrote {path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
