"""Our ElastiCache client over real HTTP: against the lab's simulator, and a server that says what it is told."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from patchpilot.clock import SYSTEM
from patchpilot.elasticache import ElastiCache, connect
from patchpilot.elasticache.facts import (
    Application,
    Event,
    Group,
    Modification,
    ServiceUpdate,
    Unprocessed,
    UpdateAction,
)
from patchpilot.errors import Corrupt, NeedsOperator, Refused, Throttled, Transient
from patchpilot.lab.cloud import Cloud
from patchpilot.lab.launch import Address
from patchpilot.lab.world import Group as LabGroup
from patchpilot.lab.world import Member, World, lab_update
from patchpilot.settings import Aws

GROUP, OTHER, REGION = "shop-broker", "shop-cache", "eu-central-1"


class Idle:
    """Is told to rotate nodes, and does not."""

    def rotate(self, update: str) -> None: ...

    def test_failover(self) -> None: ...

    def modify(self, target: object) -> None: ...


@pytest.fixture(autouse=True)
def own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Credentials in a file of the test's own, and none from wherever this machine keeps some."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    file = tmp_path / "credentials"
    write_credentials(file, "FIRST")
    return file


def write_credentials(file: Path, key: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


@pytest.fixture
def world() -> World:
    world = World(region=REGION)
    for name in (GROUP, OTHER):
        members = tuple(
            Member(f"{name}-{number:03d}", Address("127.0.0.1", 7000 + number), f"{REGION}{'abc'[number]}")
            for number in range(3)
        )
        world.add_group(LabGroup(name, Address("127.0.0.1", 7100), members, members[0].cluster_id, world.now()))
    world.add_update(lab_update(world.now()))
    return world


@pytest.fixture
def cloud(world: World, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(world, {GROUP: Idle()}, calls=tmp_path / "calls.jsonl") as cloud:
        yield cloud


@pytest.fixture
def aws(cloud: Cloud, own_credentials: Path) -> Iterator[ElastiCache]:
    with connect(Aws(region=REGION, endpoint_url=cloud.url, credentials_file=own_credentials)) as client:
        yield client


def calls(cloud: Cloud, action: str) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in cloud.calls.read_text().splitlines()]
    return [row["parameters"] for row in rows if row["action"] == action]


def test_service_updates_with_their_three_dates(aws: ElastiCache, world: World) -> None:
    (update,) = aws.service_updates()
    known = lab_update(world.now())
    assert isinstance(update, ServiceUpdate)
    assert (update.name, update.status, update.severity, update.automatic) == (
        known.name, "available", "important", True,
    )  # fmt: skip
    assert update.released < update.recommended_by < update.ends  # type: ignore[operator]
    assert update.ends.utcoffset() == timedelta()  # type: ignore[union-attr]


def test_update_actions_of_one_group_with_their_nodes(aws: ElastiCache) -> None:
    (action,) = aws.update_actions(GROUP)
    assert isinstance(action, UpdateAction)
    assert (action.group, action.status, action.nodes_updated) == (GROUP, "not-applied", "0/3")
    assert [(node.node, node.status) for node in action.nodes] == [
        (f"{GROUP}-{number:03d}", "not-applied") for number in range(3)
    ]
    assert not action.complete_on([node.node for node in action.nodes])


def test_a_group_with_members_roles_and_addresses(aws: ElastiCache) -> None:
    group = aws.group(GROUP)
    assert isinstance(group, Group)
    assert (group.available, group.primary, group.cluster_enabled) == (True, f"{GROUP}-000", False)
    assert (group.automatic_failover, group.multi_az, group.pending) == ("enabled", "enabled", ())
    assert [(member.role, member.port) for member in group.members] == [
        ("primary", 7000), ("replica", 7001), ("replica", 7002),
    ]  # fmt: skip
    assert group.answered is not None
    assert timedelta() <= SYSTEM.now() - group.answered < timedelta(hours=1)  # the date of the answer, in UTC
    assert group.heard is not None
    assert timedelta() <= group.heard - group.answered  # nothing is heard before it was said
    assert [node.node for node in aws.nodes(group)] == [member.node for member in group.members]
    assert {node.status for node in aws.nodes(group)} == {"available"}


def test_events_of_a_group_and_its_nodes_over_many_pages_each_once(aws: ElastiCache, world: World) -> None:
    for number in range(120):
        world.publish("cache-cluster", f"{GROUP}-001", f"event {number}")
        world.publish("cache-cluster", f"{OTHER}-001", f"event {number}")
    now = SYSTEM.now()
    events = aws.events({GROUP, f"{GROUP}-001"}, now - timedelta(minutes=5), now + timedelta(minutes=1))
    assert len(events) == 120
    assert {event.source for event in events} == {f"{GROUP}-001"}
    assert list(events) == sorted(events)
    earlier = aws.events({f"{GROUP}-001"}, now - timedelta(days=400), now - timedelta(minutes=1))
    assert earlier == ()


def test_an_event_told_twice_is_one() -> None:
    row = {"Date": SYSTEM.now(), "SourceIdentifier": "x", "Message": "m"}
    assert len({Event.of({**row, "SourceType": kind}) for kind in ("cache-cluster", "replication-group")}) == 1


def test_an_update_is_processed_once_and_unprocessed_after_that(aws: ElastiCache, cloud: Cloud) -> None:
    (update,) = aws.service_updates()
    assert aws.apply(update.name, GROUP) == Application("waiting-to-start")
    assert {node.initiated_by for node in aws.update_actions(GROUP)[0].nodes} == {"customer"}

    refused = aws.apply(update.name, GROUP)
    assert refused.status is None
    assert refused.unprocessed is not None
    assert refused.unprocessed.error_type
    assert "waiting-to-start" in refused.unprocessed.error_message
    assert calls(cloud, "BatchApplyUpdateAction") == [
        {"ServiceUpdateName": update.name, "ReplicationGroupIds": [GROUP]}
    ] * 2  # fmt: skip


def test_what_does_not_exist_says_where_to_look(aws: ElastiCache) -> None:
    with pytest.raises(NeedsOperator, match=r"no such replication group in this region.*elsewhere"):
        aws.group("elsewhere")
    with pytest.raises(NeedsOperator, match="no such service update: check --update"):
        aws.apply("elsewhere", GROUP)
    assert aws.update_actions("elsewhere") == ()


def test_another_region_is_empty(cloud: Cloud, own_credentials: Path) -> None:
    settings = Aws(region=REGION, endpoint_url=cloud.url, credentials_file=own_credentials)
    with connect(settings, "us-east-1") as elsewhere, pytest.raises(NeedsOperator, match="no such replication group"):
        elsewhere.group(GROUP)


def test_rows_that_lack_everything_are_unknown_and_not_done() -> None:
    assert not UpdateAction.of({}).complete_on(["a"])
    assert not Group.of({}).available
    assert Group.of({}).primary is None
    for members in ([], ["a"]):
        assert not UpdateAction.of({"UpdateActionStatus": "complete"}).complete_on(members)
        assert not UpdateAction.of({"UpdateActionStatus": "complete", "NodesUpdated": "0/0"}).complete_on(members)
    assert UpdateAction.of({"UpdateActionStatus": "a new word"}).status == "a new word"
    two = Group.of(
        {"NodeGroups": [{"NodeGroupMembers": [{"CacheClusterId": c, "CurrentRole": "primary"}]} for c in "ab"]}
    )
    assert two.primary is None
    assert replace(two, members=two.members[:1]).primary == "a"


class Told(BaseHTTPRequestHandler):
    """Answers with the script's next line; with its last one for ever after."""

    script: ClassVar[list[tuple[int, str]]] = []
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.asked.append(key)
        status, body = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Told.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def told(server: ThreadingHTTPServer, own_credentials: Path) -> Iterator[ElastiCache]:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with connect(Aws(region=REGION, endpoint_url=url, credentials_file=own_credentials)) as client:
        yield client


def fault(code: str, status: int = 400) -> tuple[int, str]:
    return status, f"<ErrorResponse><Error><Code>{code}</Code><Message>said {code}</Message></Error></ErrorResponse>"


def nothing(action: str) -> tuple[int, str]:
    """A good answer with nothing in it."""
    return answered(action, "")


def answered(action: str, body: str) -> tuple[int, str]:
    return 200, f"<{action}Response><{action}Result>{body}</{action}Result></{action}Response>"


def processed(group: str, status: str = "waiting-to-start") -> str:
    row = f"<ReplicationGroupId>{group}</ReplicationGroupId><UpdateActionStatus>{status}</UpdateActionStatus>"
    return f"<ProcessedUpdateActions><ProcessedUpdateAction>{row}</ProcessedUpdateAction></ProcessedUpdateActions>"


def unprocessed(group: str, kind: str = "Odd") -> str:
    row = (
        f"<ReplicationGroupId>{group}</ReplicationGroupId><ErrorType>{kind}</ErrorType><ErrorMessage>no</ErrorMessage>"
    )
    return (
        f"<UnprocessedUpdateActions><UnprocessedUpdateAction>{row}</UnprocessedUpdateAction></UnprocessedUpdateActions>"
    )


NO_UPDATES = nothing("DescribeServiceUpdates")


@pytest.mark.parametrize(
    ("answer", "reaction", "advice"),
    [
        (fault("APICallRateForCustomerExceeded"), Throttled, "throttling"),
        (fault("Throttling"), Throttled, "throttling"),
        (fault("ServiceUnavailable", 503), Transient, "trouble of its own"),
        (fault("InternalFailure", 500), Transient, "trouble of its own"),
        ((502, "<html>bad gateway</html>"), Transient, "trouble of its own"),
        (fault("ExpiredToken", 403), NeedsOperator, "have expired: renew them"),
        (fault("InvalidClientTokenId", 403), NeedsOperator, "does not accept these credentials"),
        (fault("SignatureDoesNotMatch", 403), NeedsOperator, "this machine's clock"),
        (fault("AccessDenied", 403), Refused, "give this role the permission"),
        (fault("SomethingNew"), Refused, "AWS refuses"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value[0]) if isinstance(value, tuple) else "",
)
def test_every_answer_asks_for_one_reaction(
    told: ElastiCache, answer: tuple[int, str], reaction: type[Exception], advice: str
) -> None:
    Told.script[:] = [answer]
    with pytest.raises(reaction, match=advice) as caught:
        told.service_updates()
    assert type(caught.value) is reaction
    assert "\n" not in str(caught.value)
    assert "DescribeServiceUpdates" in str(caught.value)


def test_reading_is_tried_again_by_the_sdk(told: ElastiCache) -> None:
    Told.script[:] = [fault("ServiceUnavailable", 503), NO_UPDATES]
    assert told.service_updates() == ()
    assert len(Told.asked) == 2


@pytest.mark.parametrize("answer", [fault("ServiceUnavailable", 503), fault("Throttling"), (500, "")])
def test_applying_is_one_request_whatever_comes_back(told: ElastiCache, answer: tuple[int, str]) -> None:
    Told.script[:] = [answer]
    with pytest.raises(Transient):
        told.apply("u", GROUP)
    assert len(Told.asked) == 1


@pytest.mark.parametrize("action", ["DescribeServiceUpdates", "BatchApplyUpdateAction"])
def test_credentials_that_were_renewed_in_the_middle_are_picked_up(
    told: ElastiCache, own_credentials: Path, action: str
) -> None:
    def ask() -> None:
        told.apply("u", GROUP) if action.startswith("Batch") else told.service_updates()

    good = answered(action, processed(GROUP))
    Told.script[:] = [good]
    ask()
    write_credentials(own_credentials, "SECOND")
    Told.script[:] = [fault("ExpiredToken", 403), good]
    ask()
    assert Told.asked == ["FIRST", "FIRST", "SECOND"]


def test_credentials_that_are_renewed_too_late_are_waited_for(told: ElastiCache, own_credentials: Path) -> None:
    Told.script[:] = [NO_UPDATES]
    told.service_updates()
    Told.script[:] = [fault("ExpiredToken", 403)]
    with pytest.raises(Transient, match="waiting for AWS credentials to be renewed"):
        told.service_updates()
    write_credentials(own_credentials, "SECOND")
    Told.script[:] = [NO_UPDATES]
    assert told.service_updates() == ()
    assert Told.asked == ["FIRST", "FIRST", "FIRST", "SECOND"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (processed(GROUP) + unprocessed(OTHER), Application("waiting-to-start")),
        (processed(OTHER) + unprocessed(GROUP, "Already"), Application(None, Unprocessed("Already", "no"))),
        (processed(GROUP, "a new word") + unprocessed(GROUP), Application("a new word")),
    ],
)
def test_processed_and_unprocessed_in_one_answer(told: ElastiCache, body: str, expected: Application) -> None:
    Told.script[:] = [answered("BatchApplyUpdateAction", body)]
    assert told.apply("u", GROUP) == expected
    Told.script[:] = [answered("BatchStopUpdateAction", body)]
    assert told.stop("u", GROUP) == expected


def test_an_answer_that_does_not_mention_us_says_nothing(told: ElastiCache) -> None:
    Told.script[:] = [answered("BatchApplyUpdateAction", processed(OTHER))]
    with pytest.raises(Transient, match=f"does not mention {GROUP}"):
        told.apply("u", GROUP)


@pytest.mark.parametrize("answer", [fault("ServiceUnavailable", 503), fault("Throttling")])
def test_every_request_that_changes_something_is_made_once(told: ElastiCache, answer: tuple[int, str]) -> None:
    Told.script[:] = [answer]
    for ask in (
        lambda: told.stop("u", GROUP),
        lambda: told.modify(GROUP, Modification(engine_version="9.1")),
        lambda: told.test_failover(GROUP, "0001"),
    ):
        Told.asked.clear()
        with pytest.raises(Transient):
            ask()
        assert len(Told.asked) == 1


def test_a_modification_without_a_change_is_never_asked_for(told: ElastiCache) -> None:
    with pytest.raises(Corrupt, match="without a change"):
        told.modify(GROUP, Modification())
    assert Told.asked == []


def test_nobody_listens(own_credentials: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as nobody:
        url = f"http://127.0.0.1:{nobody.server_address[1]}"
    with pytest.raises(Transient, match="DescribeServiceUpdates: Could not connect"):
        connect(Aws(region=REGION, endpoint_url=url, credentials_file=own_credentials)).service_updates()


def test_a_connection_that_breaks_off_in_the_middle(told: ElastiCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(self: Told) -> None:
        self.asked.append("")
        self.connection.close()

    monkeypatch.setattr(Told, "do_POST", hang_up)
    monkeypatch.setattr(Told, "handle_one_request", lambda self: hang_up(self))
    with pytest.raises(Transient, match="BatchApplyUpdateAction"):
        told.apply("u", GROUP)
    assert len(Told.asked) == 1


def test_missing_credentials_profile_and_region_are_a_persons_to_mend(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(NeedsOperator, match="no complete AWS credentials"):
        connect(Aws(region=REGION, endpoint_url="http://127.0.0.1:9", credentials_file=nothing)).service_updates()
    with pytest.raises(NeedsOperator, match=r"\(ghost\).*check aws.profile"):
        connect(Aws(region=REGION, profile="ghost")).service_updates()
    with pytest.raises(NeedsOperator, match=r"set aws\.region"):
        connect(Aws()).service_updates()


def test_a_region_that_does_not_exist(own_credentials: Path) -> None:
    """Only the resolver is asked: the name has no address."""
    nowhere = connect(Aws(region="eu-nowhere-9", credentials_file=own_credentials))
    with nowhere, pytest.raises(NeedsOperator, match="no AWS region 'eu-nowhere-9': check"):
        nowhere.service_updates()


def test_a_role_session_is_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text(
        "[profile pilot]\nrole_arn = arn:aws:iam::1:role/pilot\nsource_profile = default\n"
        "[profile named]\nrole_arn = arn:aws:iam::1:role/pilot\nrole_session_name = mine\nsource_profile = default\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    from patchpilot.elasticache.calls import session

    profiles = session(Aws(profile="pilot"), "patchpilot-" + "x" * 99)._session.full_config["profiles"]
    assert profiles["pilot"]["role_session_name"] == "patchpilot-" + "x" * 53
    assert profiles["named"]["role_session_name"] == "mine"
