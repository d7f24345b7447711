"""The lab's servers are real, come back where they were, and run as whoever may run them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import redis

from patchpilot.errors import NeedsOperator
from patchpilot.lab.launch import free_port
from patchpilot.lab.processes import Identity
from patchpilot.lab.programs import PostgresHome, copy_postgres, postgres_site
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


@pytest.fixture
def own_postgres(lab_roster: Roster, tmp_path: Path) -> Iterator[Postgres]:
    """A server that the test may kill."""
    server = Postgres(tmp_path, roster=lab_roster, name="own-postgres")
    try:
        server.start()
        yield server
    finally:
        server.discard()


@pytest.fixture
def node(lab_roster: Roster, tmp_path: Path) -> Iterator[ValkeyNode]:
    """A Valkey that the test may kill."""
    node = ValkeyNode("own-valkey", tmp_path, roster=lab_roster)
    try:
        node.start()
        yield node
    finally:
        node.stop(hard=True)


def test_every_test_gets_an_empty_database_of_its_own(dsn: str, postgres_server: Postgres) -> None:
    with psycopg.connect(dsn) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert tables == (0,)
    assert dsn != postgres_server.dsn


def test_postgres_comes_back_on_the_same_port_with_what_was_committed(own_postgres: Postgres) -> None:
    with psycopg.connect(own_postgres.dsn) as connection:
        connection.execute("CREATE TABLE kept (hard boolean)")
    for hard in (False, True):
        with psycopg.connect(own_postgres.dsn) as connection:
            connection.execute("INSERT INTO kept VALUES (%s)", (hard,))
        before = own_postgres.identity

        own_postgres.stop(hard=hard)
        assert not own_postgres.running
        own_postgres.start()

        with psycopg.connect(own_postgres.dsn) as connection:
            assert connection.execute("SELECT hard FROM kept").fetchall()[-1] == (hard,)
        assert own_postgres.identity != before


def test_postgres_takes_options_and_listens_on_loopback_only(lab_roster: Roster, tmp_path: Path) -> None:
    server = Postgres(tmp_path, roster=lab_roster, name="optional", options={"max_connections": "17"})
    try:
        server.start()
        with psycopg.connect(server.dsn) as connection:
            settings = dict(
                connection.execute(
                    "SELECT name, setting FROM pg_settings WHERE name IN "
                    "('max_connections', 'listen_addresses', 'unix_socket_directories')"
                ).fetchall()
            )
    finally:
        server.discard()
    assert settings == {"max_connections": "17", "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}


def test_a_server_that_does_not_start_says_why(lab_roster: Roster, tmp_path: Path) -> None:
    server = Postgres(tmp_path, roster=lab_roster, name="hopeless", options={"no_such_setting": "1"})
    try:
        with pytest.raises(NeedsOperator, match="no_such_setting"):
            server.start()
    finally:
        server.discard()
    node = ValkeyNode("hopeless-node", tmp_path, roster=lab_roster, options={"maxmemory-policy": "remember-nothing"})
    with pytest.raises(NeedsOperator, match="maxmemory-policy"):
        node.start()


@as_root
def test_as_root_postgres_runs_as_nobody(postgres_server: Postgres) -> None:
    identity = postgres_server.identity
    assert identity is not None
    assert Path(f"/proc/{identity.pid}").stat().st_uid not in (0, -1)


@as_root
def test_programs_that_the_account_cannot_reach_are_copied(lab_roster: Roster, tmp_path: Path) -> None:
    hidden = tmp_path / "private home"
    hidden.mkdir(mode=0o700)
    copy_postgres(postgres_site(), hidden)
    home = PostgresHome(tmp_path, roster=lab_roster, site=hidden)
    server = Postgres(tmp_path, roster=lab_roster, name="copied", home=home)
    try:
        server.start()
        with psycopg.connect(server.dsn) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        copy = home.binaries
    finally:
        server.discard()
    assert hidden not in copy.parents
    assert hidden.stat().st_mode & 0o777 == 0o700, "nobody's permissions are changed for this"
    assert not copy.exists()


@as_root
def test_a_temporary_directory_that_the_account_cannot_use_is_passed_over(
    lab_roster: Roster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unusable = tmp_path / "tmp"
    unusable.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(unusable))
    home = PostgresHome(tmp_path, roster=lab_roster)
    try:
        assert unusable not in home.make_directory().parents
    finally:
        home.remove()


def test_a_fresh_valkey_is_empty_and_keeps_nothing(node: ValkeyNode) -> None:
    with node.client() as client:
        assert client.dbsize() == 0
        client.set("key", "value")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    node.stop()
    node.start()
    with node.client() as client:
        assert client.dbsize() == 0


def test_a_node_notices_that_somebody_killed_it_and_comes_back_as_a_replica(
    node: ValkeyNode, lab_roster: Roster, tmp_path: Path
) -> None:
    primary = ValkeyNode("own-primary", tmp_path, roster=lab_roster)
    try:
        primary.start()
        with primary.client() as client:
            client.set("key", "value")
        identity = node.identity
        assert identity is not None
        os.kill(identity.pid, 9)
        with suppress(redis.ConnectionError), node.client() as client:
            client.ping()
        node.stop()
        assert not node.running

        node.start(follow=primary.address)
        node.await_sync(primary)

        state = node.replication()
        assert not state.primary
        assert state.link_up
        assert state.follows == primary.address
        with node.client() as client:
            assert client.get("key") == "value"
    finally:
        primary.stop()


def test_a_node_that_does_not_answer_gives_one_clear_line(lab_roster: Roster, tmp_path: Path) -> None:
    node = ValkeyNode("never-started", tmp_path, roster=lab_roster)
    with pytest.raises(NeedsOperator, match=f"never-started at {node.address}"):
        node.replication()


def test_two_processes_of_one_name_are_both_written_down(node: ValkeyNode, lab_roster: Roster, tmp_path: Path) -> None:
    twin = ValkeyNode(node.name, tmp_path, roster=lab_roster)
    twin.start()
    rows = json.loads(lab_roster.path.read_text(encoding="utf-8"))["processes"]
    assert [row["name"] for row in rows].count(node.name) == 2
    twin.stop()
    assert lab_roster.processes[node.name] == node.identity


def test_ports_are_not_those_of_outgoing_connections() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    assert all(1024 < free_port() < low for _ in range(50))


def test_an_identity_is_not_fooled_by_a_recycled_process_id() -> None:
    me = Identity.of(os.getpid())
    assert me.alive
    assert not Identity(me.pid, "some other start").alive


def test_identities_work_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    me = Identity.of(os.getpid())
    assert me.alive
    assert not Identity.of(2**22 + 1).alive
