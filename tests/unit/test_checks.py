"""What each check says of the calendar, the data, what watches it and what lives on it; and what a waiver does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from patchpilot.clock import FakeClock
from patchpilot.elasticache.cloudwatch import FREEABLE, LAG, MEMORY, Alarm, Metric
from patchpilot.elasticache.facts import Event, Member, Snapshot, UpdateAction
from patchpilot.engine.journal import Kind, MemoryJournal
from patchpilot.engine.plan import View
from patchpilot.engine.runner import Runner
from patchpilot.errors import Blocked, Refused, Transient
from patchpilot.phases import runbook
from patchpilot.phases.checks import CHECKS, Check, Situation, Verdict, blocking, judge
from patchpilot.phases.checks.calendar import opens_in
from patchpilot.phases.choice import Choice
from patchpilot.phases.order import Kind as Do
from patchpilot.phases.p1_preflight import PATIENCE, read
from patchpilot.postgres.journal import Run
from patchpilot.recovery.findings import Remedy
from patchpilot.report import build, markdown
from patchpilot.settings import Metric as Limit
from patchpilot.valkey.nodes import Memory, Report
from patchpilot.workers import Fleet
from tests.crash.world import GROUP, NAMES, PARAMETERS, SETTINGS, World, desk, stuck, worker

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)  # a Sunday
DENIED = "AWS denies access: give this role the permission named here"


@pytest.fixture
def situation(tmp_path: Path) -> Situation:
    """Everything is well."""
    clock = FakeClock(NOON)
    return read(desk(World(clock), MemoryJournal(clock), tmp_path), View("run", NOON, {}, NOON))


def not_passing(situation: Situation) -> dict[str, tuple[Verdict, str]]:
    checks = judge(situation)
    assert all(check.evidence and check.why for check in checks)
    assert all(bool(check.mend) is (check.verdict is not Verdict.PASS) for check in checks)
    return {check.name: (check.verdict, check.evidence) for check in checks if check.verdict is not Verdict.PASS}


def said(situation: Situation, name: str) -> Check:
    return next(check for check in judge(situation) if check.name == name)


def test_names_are_unique_and_what_may_be_waived_although_it_blocks_is_a_judgement_of_risk() -> None:
    names = [row.name for row in CHECKS]
    assert len(set(names)) == len(names)
    assert {row.name for row in CHECKS if row.waivable} == {"memory", "maxmemory-policy", "abort-metric", "alarms"}


LATELY, MOVED = NOON - timedelta(days=3), f"Failover from primary node {NAMES[0]} to replica node {NAMES[1]} completed"
EVENTS = (Event(LATELY, NAMES[1], MOVED), Event(LATELY, GROUP, MOVED))
NOTICE = Event(NOON, NAMES[0], "The node with Cache Cluster ID: x is scheduled for replacement during ...")
ELSEWHERE = UpdateAction("pages", "u", "in-progress")
FULL = Report("primary", 1, memory=Memory(91, 100, "noeviction"))

LIMIT = Limit(namespace="n", name="m", points=2, above=100.0)

CASES: list[tuple[str, dict[str, Any], Verdict, str]] = [
    ("region-quiet", {"elsewhere": (ELSEWHERE,)}, Verdict.WARN, "u on pages in-progress"),
    ("region-quiet", {"elsewhere": DENIED}, Verdict.UNKNOWN, DENIED),
    ("snapshot", {"snapshots": (Snapshot("s", "creating"),)}, Verdict.BLOCK, "s creating"),
    ("snapshot", {"snapshots": ()}, Verdict.WARN, "none was ever taken"),
    ("snapshot", {"snapshots": (Snapshot("s", "available", "manual", NOON - timedelta(hours=25)),)}, Verdict.WARN,
     "the newest is of 2026-02-28 11:00:00 UTC"),
    ("snapshot", {"snapshots": DENIED}, Verdict.UNKNOWN, DENIED),
    ("history", {"history": EVENTS}, Verdict.WARN, "2026-02-26 12:00:00 UTC: Failover"),
    ("history", {"history": (NOTICE,)}, Verdict.WARN, "scheduled for replacement"),
    ("history", {"history": DENIED}, Verdict.UNKNOWN, DENIED),
    ("maxmemory-policy", {"parameters": {**PARAMETERS, "maxmemory-policy": "allkeys-lru"}}, Verdict.BLOCK,
     "allkeys-lru (parameter group); noeviction (endpoint, shop-broker-001"),
    ("maxmemory-policy", {"parameters": {**PARAMETERS, "maxmemory-policy": "volatile-lru"}}, Verdict.WARN,
     "the counts of chords are thrown away"),
    ("reserved-memory", {"parameters": {**PARAMETERS, "reserved-memory-percent": "10"}}, Verdict.WARN, "10 %"),
    ("reserved-memory", {"parameters": {k: v for k, v in PARAMETERS.items() if "reserved" not in k}}, Verdict.WARN,
     "not reported"),
    ("close-on-replica-write", {"parameters": {**PARAMETERS, "close-on-replica-write": "no"}}, Verdict.WARN, "no"),
    ("metrics", {"metrics": ()}, Verdict.WARN, "no data point of the last 15m00s"),
    ("metrics", {"metrics": (Metric(LAG, "n", 11.0, NOON), Metric(MEMORY, "n", 20.0, NOON))}, Verdict.WARN,
     "n ReplicationLag 11 s"),
    ("metrics", {"metrics": (Metric(FREEABLE, "n", 50.0 * 1024 * 1024, NOON),)}, Verdict.WARN, "FreeableMemory 50 MiB"),
    ("metrics", {"metrics": DENIED}, Verdict.UNKNOWN, DENIED),
    ("abort-metric", {"limit": LIMIT, "measured": (101.0, 100.5)}, Verdict.BLOCK, "n m is above 100: 101, 100.5"),
    ("abort-metric", {"limit": LIMIT, "measured": (101.0,)}, Verdict.WARN, "n m: 101 (points = 2)"),
    ("abort-metric", {"limit": LIMIT, "measured": ()}, Verdict.WARN, "n m: no value"),
    ("abort-metric", {"limit": LIMIT, "measured": DENIED}, Verdict.UNKNOWN, DENIED),
    ("alarms", {"alarms": ()}, Verdict.WARN, "no alarm watches this group"),
    ("alarms", {"alarms": (Alarm("a", "OK", tells=False),)}, Verdict.WARN, "a tells nobody"),
    ("alarms", {"alarms": (Alarm("a", "INSUFFICIENT_DATA", tells=True),)}, Verdict.WARN, "a is INSUFFICIENT_DATA"),
    ("alarms", {"alarms": (Alarm("a", "ALARM", tells=True, reason="9 > 5"),)}, Verdict.BLOCK, "a is firing: 9 > 5"),
    ("alarms", {"alarms": DENIED}, Verdict.UNKNOWN, DENIED),
    ("workers", {"fleet": Fleet()}, Verdict.WARN, "no worker gives a sign of life"),
    ("workers", {"fleet": Fleet((worker("w", answers=False, settings={}),))}, Verdict.UNKNOWN, "w is alive and"),
    ("workers", {"fleet": Fleet((worker("w", knows=False, canary=False, settings={}),))}, Verdict.UNKNOWN, "no canary"),
    ("workers", {"fleet": Fleet((worker("w", queues=()),))}, Verdict.WARN, "w (no queue)"),
    ("clients", {"fleet": Fleet((worker("w", broker=(f"{NAMES[1]}.test", 6379)),))}, Verdict.BLOCK,
     f"w is connected to node {NAMES[1]} itself"),
    ("chords", {"stuck": (stuck("a"), stuck("b", Remedy.NONE))}, Verdict.WARN,
     "2 chord/callback-lost: 1 will be recovered first, 1 only a person can judge"),
    ("chords", {"stuck": "the broker is away"}, Verdict.UNKNOWN, "the broker is away"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "verdict", "evidence"), CASES)
def test_each_check_by_itself(
    situation: Situation, name: str, change: dict[str, Any], verdict: Verdict, evidence: str
) -> None:
    found = not_passing(replace(situation, **change))
    assert found.keys() == {name}
    assert found[name][0] is verdict
    assert evidence in found[name][1]


@pytest.mark.parametrize(
    ("offered", "verdict", "evidence"),
    [
        (("8.0", "8.1"), Verdict.PASS, "valkey 8.1; AWS offers 8.0, 8.1"),
        (("8.0", "8.10"), Verdict.BLOCK, "valkey 8.1; AWS offers 8.0, 8.10"),
        ((), Verdict.BLOCK, "valkey 8.1; AWS offers no version of it"),
        (DENIED, Verdict.UNKNOWN, DENIED),
    ],
)
def test_an_engine_version_has_to_be_one_that_aws_offers(
    situation: Situation, offered: tuple[str, ...] | str, verdict: Verdict, evidence: str
) -> None:
    aim = {"engine": "valkey", "engine_version": "8.1"}
    upgrade = replace(situation, choice=Choice(operation=Do.ENGINE_UPGRADE, aim=aim), offered=offered)
    assert (said(upgrade, "engine-version").verdict, said(upgrade, "engine-version").evidence) == (verdict, evidence)
    assert "engine-version" not in {check.name for check in judge(situation)}


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "broker_connection_max_retries"])
def test_each_setting_of_a_worker(situation: Situation, setting: str) -> None:
    bad = worker("w", settings={**SETTINGS, setting: None})
    found = not_passing(replace(situation, fleet=Fleet((bad, worker("good")))))
    assert found.keys() == {"clients"}
    assert f"w: {setting} is None (good: " in found["clients"][1]
    assert "good: broker" not in found["clients"][1]


def test_refusals_are_unknown_wherever_they_are_needed(situation: Situation) -> None:
    assert set(not_passing(replace(situation, nodes=DENIED))) == {
        "nodes-available", "nothing-pending", "maintenance-window",
    }  # fmt: skip
    assert set(not_passing(replace(situation, parameters=DENIED))) == {"reserved-memory", "close-on-replica-write"}
    assert set(not_passing(replace(situation, fleet="silence"))) == {"workers", "clients"}
    unlisted = replace(situation, updates=DENIED, choice=Choice(situation.choice.action, None))
    assert not_passing(unlisted) == {"update-dates": (Verdict.UNKNOWN, DENIED)}
    pending = replace(situation, nodes=DENIED, group=replace(situation.group, pending=("AuthTokenStatus",)))
    assert said(pending, "nothing-pending").verdict is Verdict.BLOCK


def test_replicas_in_other_zones(situation: Situation) -> None:
    def in_zones(*zones: str) -> Situation:
        members = tuple(replace(m, zone=zone) for m, zone in zip(situation.group.members, zones, strict=True))
        return replace(situation, group=replace(situation.group, members=members))

    assert not_passing(in_zones("a", "a", "b")) == {}
    assert set(not_passing(in_zones("a", "a", "a"))) == {"zones"}
    assert set(not_passing(in_zones("a", "", ""))) == {"zones"}
    assert set(not_passing(in_zones("", "b", "c"))) == {"zones"}


@pytest.mark.parametrize(
    ("role", "words"), [("broker", "re-creates from PostgreSQL"), ("volatile", "nothing re-creates")]
)
def test_durability_is_told_and_never_stops_anybody(situation: Situation, role: Any, words: str) -> None:
    for effective in ("", "async", "disabled", "a new word"):
        lossy = replace(situation, role=role, group=replace(situation.group, effective_durability=effective))
        check = said(lossy, "durability")
        assert check.verdict is Verdict.PASS
        assert (effective or "not reported") in check.evidence
        assert "lossy" in check.evidence
        assert words in check.evidence
    durable = replace(situation, group=replace(situation.group, effective_durability="sync"))
    assert "no acknowledged write is lost" in said(durable, "durability").evidence


@pytest.mark.parametrize(
    ("window", "now", "wait"),
    [
        ("05:00-06:00", "2026-03-01T04:00", timedelta(hours=1)),
        ("05:00-06:00", "2026-03-01T05:00", timedelta()),
        ("05:00-06:00", "2026-03-01T05:59", timedelta()),
        ("05:00-06:00", "2026-03-01T06:00", timedelta(hours=23)),
        ("23:30-00:30", "2026-03-01T00:29", timedelta()),
        ("23:30-00:30", "2026-03-01T00:30", timedelta(hours=23)),
        ("sun:23:00-mon:01:30", "2026-03-01T22:00", timedelta(hours=1)),
        ("sun:23:00-mon:01:30", "2026-03-02T01:29", timedelta()),
        ("sun:23:00-mon:01:30", "2026-03-02T01:30", timedelta(days=6, hours=21, minutes=30)),
        ("SUN:23:00-MON:01:30", "2026-03-01T23:30", timedelta()),
        ("", "2026-03-01T00:00", None),
        ("whenever", "2026-03-01T00:00", None),
        ("sun:23:00-01:30", "2026-03-01T00:00", None),
        ("xyz:23:00-mon:01:30", "2026-03-01T00:00", None),
    ],
)
def test_when_a_window_opens(window: str, now: str, wait: timedelta | None) -> None:
    assert opens_in(window, datetime.fromisoformat(now).replace(tzinfo=UTC)) == wait


@pytest.mark.parametrize(
    ("window", "verdict"),
    [("11:30-12:30", Verdict.WARN), ("12:35-13:35", Verdict.WARN), ("12:37-13:37", Verdict.PASS), ("?", Verdict.WARN),
     ("", Verdict.PASS)],
)  # fmt: skip
def test_a_window_has_to_be_clear_for_as_long_as_the_patch_may_take(
    situation: Situation, window: str, verdict: Verdict
) -> None:
    """Three nodes of twelve minutes each, from noon on."""
    near = replace(situation, group=replace(situation.group, snapshot_window=window))
    assert said(near, "snapshot-window").verdict is verdict
    assert not isinstance(situation.nodes, str)
    weekly = window and f"sun:{window.replace('-', '-sun:')}"
    nodes = tuple(replace(node, maintenance_window=weekly) for node in situation.nodes)
    assert said(replace(situation, nodes=nodes), "maintenance-window").verdict is verdict


def test_many_failovers_are_told_once_each_the_newest_first(situation: Situation) -> None:
    failovers = [replace(event, at=NOON - timedelta(days=days)) for days in range(5) for event in EVENTS]
    evidence = said(replace(situation, history=tuple(failovers)), "history").evidence
    assert evidence.index("2026-03-01") < evidence.index("2026-02-28") < evidence.index("2026-02-27")
    assert evidence.endswith("and 2 more")
    other = (Event(NOON, GROUP, "Snapshot succeeded for snapshot with ID 'x'"),)
    assert said(replace(situation, history=other), "history").verdict is Verdict.PASS


def test_a_cache_needs_no_snapshot_and_may_evict(situation: Situation) -> None:
    cache = replace(
        situation, role="cache", snapshots=(), parameters={**PARAMETERS, "maxmemory-policy": "allkeys-lru"}, fleet=None,
        stuck=None, metrics=None,
    )  # fmt: skip
    assert not_passing(cache) == {}
    assert said(cache, "metrics").evidence == "not read: aws.metrics is false"


def test_memory_is_read_from_whoever_can_be_asked(situation: Situation) -> None:
    def at(percent: int, **more: Any) -> Situation:
        report = Report("primary", 1, memory=Memory(percent, 100))
        return replace(
            situation, **{"endpoint": report, "members": {"a": report, "b": "no route"}, "metrics": (), **more}
        )

    assert said(at(74), "memory").verdict is Verdict.PASS
    assert "b: no route" in said(at(74), "memory").evidence
    assert said(at(75), "memory").verdict is Verdict.WARN
    assert said(at(90), "memory").verdict is Verdict.BLOCK
    hidden = {"members": {"a": "no route", "b": "no route"}}
    assert "the primary uses 91 %" in said(at(91, **hidden), "memory").evidence
    replica = Report("replica", 1, memory=Memory(10, 100))
    only_the_replica = said(at(99, members={"a": "no route", "b": replica}), "memory")
    assert only_the_replica.verdict is Verdict.BLOCK
    assert only_the_replica.evidence == "b uses 10 %; the primary uses 99 %; a: no route"
    silent = at(1, endpoint="silent", **hidden)
    assert said(silent, "memory").verdict is Verdict.UNKNOWN
    cloudwatch = replace(silent, metrics=(Metric(MEMORY, "a", 80.0, NOON), Metric(LAG, "a", 80.0, NOON)))
    assert "a uses 80 %" in said(cloudwatch, "memory").evidence
    assert said(cloudwatch, "memory").verdict is Verdict.WARN


def test_an_endpoint_that_is_a_nodes_own_address(situation: Situation) -> None:
    astray = replace(situation, address=(f"{NAMES[0]}.test", 6379))
    assert said(astray, "endpoint").verdict is Verdict.BLOCK
    assert f"the address of node {NAMES[0]} itself" in said(astray, "endpoint").evidence
    # Where AWS calls a node's address the primary endpoint, it is one.
    alone = replace(situation.group, members=(Member(NAMES[0], "primary", "broker.test", 6379, "a"),))
    assert said(replace(situation, group=alone), "endpoint").verdict is Verdict.PASS


class TestWaivers:
    def test_what_is_unknown_may_be_waived_and_is_on_record(self, situation: Situation) -> None:
        blind = replace(situation, alarms=DENIED, snapshots=DENIED)
        checks = judge(blind, {"alarms": "seen in the console"})
        assert [check.name for check in blocking(checks, "broker")] == ["snapshot"]
        waived = next(check for check in checks if check.name == "alarms")
        assert (waived.verdict, waived.waived) == (Verdict.UNKNOWN, "seen in the console")

    @pytest.mark.parametrize(("name", "change"), [
        ("alarms", {"alarms": (Alarm("a", "ALARM", tells=True),)}),
        ("maxmemory-policy", {"parameters": {**PARAMETERS, "maxmemory-policy": "allkeys-lru"}}),
        ])  # fmt: skip
    def test_a_block_that_is_a_judgement_of_risk_may_be_waived(
        self, situation: Situation, name: str, change: dict[str, Any]
    ) -> None:
        at = replace(situation, **change)
        assert name in [check.name for check in blocking(judge(at), "broker")]
        assert name not in [check.name for check in blocking(judge(at, {name: "known"}), "broker")]

    def test_no_other_block_may_be(self, situation: Situation) -> None:
        alone = replace(situation, group=replace(situation.group, members=situation.group.members[:1]))
        [check] = blocking(judge(alone, {"replica": "it will be fine"}), "broker")
        assert check.evidence.endswith("(this cannot be waived)")

    def test_a_waiver_that_is_not_needed_changes_nothing(self, situation: Situation) -> None:
        assert judge(situation, {"alarms": "to be sure"}) == judge(situation)


class TestReading:
    """What pre-flight makes of whoever does not answer."""

    @pytest.fixture
    def world(self) -> World:
        return World(FakeClock(NOON))

    @pytest.mark.parametrize(("call", "checks"), [
        ("in_flight", {"region-quiet"}), ("parameters", {"reserved-memory", "close-on-replica-write"}),
        ("snapshots", {"snapshot"}), ("history", {"history"}), ("alarms", {"alarms"}), ("metrics", {"metrics"}),
        ("look", {"workers", "clients"}), ("survey", {"chords"}),
    ])  # fmt: skip
    def test_a_refused_request_is_unknown_at_once_in_the_words_of_whoever_refused(
        self, world: World, tmp_path: Path, call: str, checks: set[str]
    ) -> None:
        world.surprises[call] = [Refused("AWS denies access (no such luck)")]
        found = not_passing(read(desk(world, MemoryJournal(world.clock), tmp_path), View("r", NOON, {}, NOON)))
        assert found == dict.fromkeys(checks, (Verdict.UNKNOWN, "AWS denies access (no such luck)"))

    def test_silence_is_waited_for_and_then_unknown(self, world: World, tmp_path: Path) -> None:
        at_desk = desk(world, MemoryJournal(world.clock), tmp_path)
        world.surprises["alarms"] = [Transient("throttled")] * 2
        with pytest.raises(Transient):
            read(at_desk, View("r", NOON, {}, since=NOON))
        found = not_passing(read(at_desk, View("r", NOON, {}, since=NOON - PATIENCE)))
        assert found == {"alarms": (Verdict.UNKNOWN, "throttled")}

    @pytest.mark.parametrize("call", ["update_actions", "group"])
    def test_without_the_group_and_its_updates_there_is_no_situation(
        self, world: World, tmp_path: Path, call: str
    ) -> None:
        world.surprises[call] = [Refused("denied")]
        with pytest.raises(Refused):
            read(desk(world, MemoryJournal(world.clock), tmp_path), View("r", NOON, {}, NOON))


Fly = Callable[..., list[Any]]


@pytest.fixture
def fly(tmp_path: Path) -> Fly:
    """A whole run in a world whose alarms cannot be read; returns the journal."""
    clock = FakeClock()
    world, journal = World(clock), MemoryJournal(clock)
    world.surprises["alarms"] = [Refused("AWS denies access")] * 99

    def run(**more: Any) -> list[Any]:
        try:
            Runner(runbook(desk(world, journal, tmp_path, **more)), journal, clock).run()
        finally:
            assert len(world.applied) == (1 if more.get("waivers") else 0)
        return list(journal.entries())

    return run


def test_a_broker_is_not_patched_past_something_unknown_until_somebody_answers_for_it(fly: Fly) -> None:
    with pytest.raises(Blocked, match=r"^pre-flight refuses: alarms: AWS denies access \(see to what is firing"):
        fly()
    entries = fly(waivers={"alarms": "on the wall", "history": "not needed"})
    report = build(entries, Run("run", "test", "broker", NOON))
    assert report["preflight"]["waivers"] == {"alarms": "on the wall", "history": "not needed"}
    [waived] = [check for check in report["preflight"]["checks"] if check["waived"]]
    assert (waived["name"], waived["verdict"], waived["waived"]) == ("alarms", "unknown", "on the wall")
    page = markdown(report)
    assert "Waived: alarms (on the wall); history (not needed)." in page
    assert "| alarms | unknown, **waived:** on the wall |" in page
    # Somebody answered for not knowing of the alarms, so nothing is claimed of them at the end.
    assert "alarms-quiet" not in [claim["name"] for claim in report["verification"]["claims"]]
    reached = [entry for entry in entries if (entry.step, entry.kind) == ("readiness", Kind.REACHED)]
    assert reached[0].data["waivers"]["alarms"] == "on the wall"
