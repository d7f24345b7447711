"""``patchpilot approve``, on a real PostgreSQL and the simulator's API: what is approved, and when that is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.cli.approving import approve
from patchpilot.cli.console import Output
from patchpilot.cli.desk import Outfit
from patchpilot.clock import SYSTEM
from patchpilot.engine.journal import Kind
from patchpilot.errors import Blocked, NothingToDo, ResumeLater, Usage
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.launch import Address
from patchpilot.lab.world import LAB_UPDATE, Group, Member, World, lab_update
from patchpilot.phases.order import Kind as Do
from patchpilot.phases.order import Order
from patchpilot.phases.proposal import digest, propose
from patchpilot.postgres import requests
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import RunJournal, open_run
from patchpilot.settings import load

GROUP, REGION = "shop-broker", "eu-central-1"
NAMES = [f"{GROUP}-{number:03d}" for number in (1, 2, 3)]


@pytest.fixture
def database(migrated: str) -> Iterator[Database]:
    opened = Database(migrated)
    yield opened
    opened.close()


@pytest.fixture
def world() -> World:
    world = World(region=REGION)
    members = tuple(Member(name, Address("127.0.0.1", 7000), f"{REGION}{zone}") for name, zone in zip(NAMES, "abc"))  # noqa: B905 - three of each
    world.add_group(Group(GROUP, Address("127.0.0.1", 7100), members, NAMES[0], world.now()))
    world.add_update(lab_update(world.now()))
    return world


@pytest.fixture
def config(tmp_path: Path, migrated: str, world: World) -> Iterator[Path]:
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    path = tmp_path / "patchpilot.toml"
    with Cloud(world, {}, calls=tmp_path / "calls.jsonl") as cloud:
        path.write_text(
            f'[postgres]\ndsn = "{migrated}"\n[aws]\nregion = "{REGION}"\nendpoint_url = "{cloud.url}"\n'
            f'credentials_file = "{credentials}"\n'
            f'[clusters.broker]\nrole = "volatile"\nreplication_group = "{GROUP}"\n'
        )
        yield path


def begin(database: Database, order: Order | None = None, *, live: bool = False) -> RunJournal:
    """A run whose process lives on, or has ended."""
    ttl = timedelta(hours=1) if live else timedelta(milliseconds=1)
    journal = open_run(database, "default", "broker", ttl=ttl)
    order = order or Order(approve_before="trigger")
    # The lease may be over before the first word of it: as after a pause of the whole process.
    journal.append(Kind.STARTED, data={"order": order.note()})
    return journal


def proposal(config: Path, database: Database, order: Order | None = None) -> dict[str, Any]:
    """What the run would show now."""
    settings = load(config)
    with Outfit(settings, "broker", database, {}) as outfit:
        content = propose(outfit.look(order or Order(), "test"), SYSTEM.now())
    shown: dict[str, Any] = json.loads(json.dumps({**content, "grace": 7.0, "waived": ["zones"]}))
    return shown


def show(journal: RunJournal, content: dict[str, Any]) -> str:
    key = digest(content)
    journal.append(Kind.INTENDED, "trigger", "approve")
    journal.append(Kind.OBSERVED, "trigger", "approve", {"digest": key, "proposal": content})
    return key


def approved(database: Database, journal: RunJournal) -> list[str | None]:
    return [request.digest for request in requests.requests(database, journal.run_id)]


@pytest.mark.parametrize("live", [True, False])
def test_the_last_plan_shown_is_approved_and_the_line_says_what_will_be_done(
    database: Database, config: Path, capsys: pytest.CaptureFixture[str], live: bool
) -> None:
    journal = begin(database, live=live)
    with pytest.raises(ResumeLater, match="has shown no plan yet"):
        approve("broker", config)
    content = proposal(config, database)
    key = show(journal, content)
    journal.append(Kind.INTENDED, "trigger", "approve")  # taken up again: it has not looked yet
    capsys.readouterr()
    approve("broker", config, reason="looks fine", output=Output.JSON)
    told = capsys.readouterr()
    assert f"approved plan {key}, as shown at " in told.err
    assert (
        f"service update {LAB_UPDATE} on {GROUP}: {NAMES[1]} -> {NAMES[2]} -> {NAMES[0]}, {NAMES[0]} last" in told.err
    )
    assert ("no process works on it" in told.err) is not live
    assert "could not be seen" not in told.err
    assert (json.loads(told.out)["digest"], json.loads(told.out)["plan"]["what"]) == (key, content["what"])
    with pytest.raises(NothingToDo, match=f"plan {key} of run .* has been approved by .*stays good for it"):
        approve("broker", config)
    assert approved(database, journal) == [key]


def test_after_a_refusal_the_approval_is_still_there_and_the_line_says_so(database: Database, config: Path) -> None:
    journal = begin(database)
    key = show(journal, proposal(config, database))
    approve("broker", config)
    journal.append(Kind.REACHED, "trigger", "approve", {"needed": True, "digest": key, "proposal": {}})
    journal.append(Kind.CONTRADICTED, "trigger", "trigger", {"why": "AWS denies access"})
    with pytest.raises(NothingToDo, match="that stays good for it; give the same `patchpilot run` command again"):
        approve("broker", config)
    assert approved(database, journal) == [key]


def test_a_world_that_changed_while_no_process_looked_is_not_approved(
    database: Database, config: Path, world: World
) -> None:
    journal = begin(database)
    content = proposal(config, database)
    key = show(journal, content)
    world.change_group(GROUP, primary_id=NAMES[1])
    for plan in (None, key):
        with pytest.raises(Blocked, match=f"plan {key} was shown at .*: primary was {NAMES[0]}, is {NAMES[1]}"):
            approve("broker", config, plan)
    world.change_action((LAB_UPDATE, GROUP), "not-applicable")
    with pytest.raises(Blocked, match="no service update applies"):
        approve("broker", config)
    assert approved(database, journal) == []


def test_a_plan_that_changed_a_moment_ago_has_to_be_named(database: Database, config: Path) -> None:
    journal = begin(database, live=True)
    content = proposal(config, database)
    first = show(journal, content)
    second = show(journal, {**content, "primary": NAMES[1]})
    with pytest.raises(Blocked, match=f"a moment ago: primary was {NAMES[0]}, is {NAMES[1]}.*with --plan {second}"):
        approve("broker", config)
    with pytest.raises(Usage, match=rf"what waits is plan {second}, not {first} \(primary was"):
        approve("broker", config, first)
    with pytest.raises(Usage, match=f"what waits is plan {second}, not ffff: see"):
        approve("broker", config, "ffff")
    approve("broker", config, second)
    assert approved(database, journal) == [second]


def test_a_plan_that_changed_a_while_ago_need_not_be_named(
    database: Database, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(database, live=True)
    content = proposal(config, database)
    show(journal, content)
    second = show(journal, {**content, "primary": NAMES[1]})
    monkeypatch.setattr("patchpilot.cli.approving.JUST_NOW", timedelta())
    approve("broker", config)
    assert approved(database, journal) == [second]


def test_where_aws_cannot_be_asked_the_run_itself_looks_again(
    database: Database, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = begin(database)
    key = show(journal, proposal(config, database))
    config.write_text(config.read_text().replace("credentials_file", "profile"))
    approve("broker", config)
    assert "could not be seen from here" in capsys.readouterr().err
    assert approved(database, journal) == [key]


@pytest.mark.parametrize(
    ("order", "step", "fact"),
    [
        (Order(), "readiness", {}),
        (None, "approve", {"needed": False}),
        (None, "trigger", {}),
    ],
)
def test_what_needs_no_approval_says_so(
    database: Database, config: Path, order: Order | None, step: str, fact: dict[str, Any]
) -> None:
    journal = begin(database, order, live=True)
    show(journal, proposal(config, database))
    if step != "approve":
        journal.append(Kind.INTENDED, "trigger", step)
    journal.append(Kind.REACHED, "trigger", step, fact)
    with pytest.raises(NothingToDo, match="needs no approval"):
        approve("broker", config)


def test_a_game_day_is_described_as_one(database: Database, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = Order(Do.TEST_FAILOVER, approve_before="trigger")
    show(begin(database, order), proposal(config, database, order))
    approve("broker", config)
    assert f"{GROUP} fails over from {NAMES[0]} to one of its replicas" in capsys.readouterr().err
