"""The pages for people: one for each phase, and every command on them is one that exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import typer.main
from botocore import xform_name

import patchpilot.phases
from patchpilot.cli.app import app
from patchpilot.clock import FakeClock
from patchpilot.engine.journal import MemoryJournal
from patchpilot.engine.runner import Runner
from patchpilot.phases.checks import CHECKS
from patchpilot.postgres.connection import Database
from tests.crash.world import World, desk

PAGES = Path(__file__).parents[2] / "runbooks"
PHASES = Path(patchpilot.phases.__file__).parent
HEADINGS = ["What it does", "What you see", "By hand"]


def phase_pages() -> list[Path]:
    return sorted(PAGES.glob("p*.md"))


def test_each_phase_has_its_twin_and_each_page_its_phase() -> None:
    modules = {path.stem.replace("_", "-") for path in PHASES.glob("p[0-9]*.py")}
    assert modules == {page.stem for page in phase_pages()}
    assert len(modules) == len(patchpilot.phases.RUNBOOK)


@pytest.mark.parametrize("page", phase_pages(), ids=lambda page: page.stem)
def test_a_page_answers_the_four_questions(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert headings[:3] == HEADINGS
    assert headings[3].startswith("What if it dies here")
    number = page.stem[1]
    assert page.read_text().startswith(f"# Phase {number}: ")


def test_the_page_of_pre_flight_names_every_check_and_which_of_them_may_be_waived() -> None:
    page = (PAGES / "p1-preflight.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ") and "|---" not in line]
    said = {name: row[-1] for row in rows for name in row[0].split(", ")}
    assert {row.name for row in CHECKS} == said.keys() - {"Check"}
    assert {row.name for row in CHECKS if row.waivable} == {name for name, worst in said.items() if "waived" in worst}


def test_the_page_of_the_verification_names_every_claim(tmp_path: Path) -> None:
    clock = FakeClock()
    journal = MemoryJournal(clock)
    facts = Runner(patchpilot.phases.runbook(desk(World(clock), journal, tmp_path)), journal, clock).run().facts()
    page = (PAGES / "p7-verify.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:] == [
        claim["name"] for claim in facts["verify"]["claims"]
    ]


def test_what_if_speaks_of_everybody_who_can_die() -> None:
    headings = re.findall(r"^## (.+?)(?: \(.*)?$", (PAGES / "what-if.md").read_text(), re.MULTILINE)
    assert headings == [
        "The pilot", "A worker", "A producer", "Recovery", "PostgreSQL", "Valkey", "The AWS API",
    ]  # fmt: skip


def commands(program: str) -> Iterator[list[str]]:
    """Every command line of ``program`` on any page, in a block of its own or in the running text."""
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        lines += [
            " ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        ]
        yield from (shlex.split(line) for line in lines if line.split()[:1] == [program] and len(line.split()) > 1)


def test_every_aws_command_exists_with_its_options() -> None:
    session, seen = botocore.session.get_session(), 0
    models = {service: session.get_service_model(service) for service in ("elasticache", "cloudwatch")}
    for _, service, name, *options in commands("aws"):
        if name == "wait":  # named as something not to do
            continue
        model = models[service]
        operations = {xform_name(name, "-"): name for name in model.operation_names}
        assert name in operations, name
        shape: Any = model.operation_model(operations[name]).input_shape
        known = {f"--{xform_name(member, '-')}" for member in shape.members}
        assert {option for option in options if option.startswith("--")} <= known, name
        seen += 1
    assert seen > 10


def test_every_patchpilot_command_exists_with_its_options() -> None:
    root: Any = typer.main.get_command(app)
    seen = 0
    for _, *words in commands("patchpilot"):
        command = root
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not root, words
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, words
        seen += 1
    assert seen > 10


def test_every_query_runs_on_the_schema(migrated: str) -> None:
    queries = [
        query for page in PAGES.glob("*.md") for query in re.findall(r"```sql\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(queries) >= 4
    with closing(Database(migrated)) as database:
        for query in queries:
            database.run(lambda connection, query=query: connection.execute(query.encode()))  # type: ignore[misc]
