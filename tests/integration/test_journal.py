"""The durable journal and its lease, on a real PostgreSQL."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from patchpilot.clock import SYSTEM, FakeClock
from patchpilot.engine.journal import Kind
from patchpilot.errors import LeaseLost, LockHeld, NeedsOperator, Usage
from patchpilot.postgres.connection import Connection, Database, T
from patchpilot.postgres.holder import Holder
from patchpilot.postgres.journal import RunJournal, entries, find_run, open_run, outdated, runs
from patchpilot.postgres.migrate import migrations

LONG = timedelta(hours=1)
ELSEWHERE = Holder(host="elsewhere", pid=7, machine="another kernel", began="1")


@pytest.fixture
def database(migrated: str) -> Iterator[Database]:
    opened = Database(migrated)
    yield opened
    opened.close()


def begin(database: Database, holder: Holder | None = None, ttl: timedelta = LONG) -> RunJournal:
    return open_run(database, "prod", "broker", holder, ttl)


def expire(database: Database) -> None:
    database.execute("UPDATE patchpilot.lease SET until = now() - interval '1 second'")


def test_entries_come_back_as_they_were_written(database: Database) -> None:
    clock = FakeClock(datetime(2026, 3, 1, 2, 30, tzinfo=UTC))
    journal = open_run(database, "prod", "broker", clock=clock)
    clock.sleep(1.5)
    written = [
        journal.append(Kind.STARTED),
        journal.append(Kind.INTENDED, "watch", "watch", {"members": ["a-001", "a-002"], "lag": 0.25, "none": None}),
    ]
    assert list(journal.entries()) == written
    assert [entry.seq for entry in written] == [1, 2]
    assert written[0].at == datetime(2026, 3, 1, 2, 30, 1, 500000, tzinfo=UTC)
    assert journal.run_id.startswith("20260301-023000-")


def test_a_secret_does_not_get_into_the_journal(database: Database) -> None:
    journal = open_run(database, "prod", "broker")
    written = journal.append(
        Kind.INTENDED, "preflight", "readiness", {"waivers": {"alarms": "see redis://:hunter2@h/0"}}
    )
    assert list(journal.entries()) == [written]
    assert written.data == {"waivers": {"alarms": "see redis://***@h/0"}}


def test_an_unfinished_run_is_taken_up_and_a_finished_one_is_not(database: Database) -> None:
    first = begin(database)
    first.append(Kind.STARTED)
    first.release()

    second = begin(database)
    assert second.run_id == first.run_id
    assert second.token == first.token + 1
    second.append(Kind.FINISHED, data={"outcome": "nothing-to-do"})
    second.release()

    assert begin(database).run_id != first.run_id
    finished = find_run(database, first.run_id)
    assert (finished.outcome, finished.finished_at) == ("nothing-to-do", second.entries()[-1].at)


@pytest.mark.parametrize(
    ("outcome", "age", "taken_up"),
    [("done", "59 minutes", True), ("done", "61 minutes", False), ("nothing-to-do", "0", False)],
)
def test_a_finished_run_is_taken_up_once_if_its_process_died_before_it_could_say_so(
    database: Database, outcome: str, age: str, taken_up: bool
) -> None:
    first = begin(database, ELSEWHERE)
    first.append(Kind.FINISHED, data={"outcome": outcome})
    database.execute("UPDATE patchpilot.run SET finished_at = now() - %s::interval", (age,))
    expire(database)
    second = begin(database)
    assert (second.run_id == first.run_id) is taken_up
    if not taken_up:
        second.append(Kind.FINISHED)
    second.release()
    assert begin(database).run_id not in {first.run_id, second.run_id}


def test_clusters_and_environments_do_not_contend(database: Database) -> None:
    held = [open_run(database, *place) for place in (("prod", "broker"), ("prod", "cache"), ("test", "broker"))]
    assert len({journal.run_id for journal in held}) == 3


def test_a_rival_is_told_who_holds_the_cluster_and_writes_nothing(database: Database) -> None:
    journal = begin(database)
    with pytest.raises(LockHeld) as refusal:
        begin(database, ELSEWHERE)
    message = str(refusal.value)
    for part in ("'broker'", journal.run_id, str(Holder.here()), "since 20", "patchpilot status", "3600 s"):
        assert part in message
    assert "\n" not in message
    journal.append(Kind.STARTED)
    assert len(runs(database)) == 1


def test_whoever_lost_the_lease_writes_nothing_more(database: Database) -> None:
    loser = begin(database, ELSEWHERE)
    loser.append(Kind.STARTED)
    expire(database)
    winner = begin(database)
    assert (winner.run_id, winner.token) == (loser.run_id, loser.token + 1)

    with pytest.raises(LeaseLost, match=loser.run_id):
        loser.append(Kind.INTENDED, "trigger", "trigger")
    with pytest.raises(LeaseLost):
        loser.append(Kind.FINISHED, data={"outcome": "done"})
    with pytest.raises(LeaseLost):
        loser.renew()
    loser.release()

    assert [entry.kind for entry in winner.entries()] == [Kind.STARTED]
    assert find_run(database, winner.run_id).state == "running"
    winner.append(Kind.RESUMED)


def test_an_expired_lease_is_still_good_until_somebody_takes_it(database: Database) -> None:
    journal = begin(database)
    expire(database)
    journal.append(Kind.STARTED)
    journal.renew()
    with pytest.raises(LockHeld):
        begin(database, ELSEWHERE)


def test_a_write_that_meets_a_take_over_waits_for_it_and_is_refused(database: Database, migrated: str) -> None:
    loser = begin(database, ELSEWHERE)
    expire(database)
    locked, go_on = threading.Event(), threading.Event()
    rival = Slow(migrated, locked, go_on)
    taken: list[RunJournal] = []
    take_over = threading.Thread(target=lambda: taken.append(begin(rival)))
    take_over.start()
    assert locked.wait(10)

    outcome: list[object] = []

    def write() -> None:
        try:
            outcome.append(loser.append(Kind.ACTING, "trigger", "trigger"))
        except LeaseLost as error:
            outcome.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    await_lock_wait(migrated)
    assert outcome == []
    go_on.set()
    take_over.join()
    writer.join()
    rival.close()

    assert isinstance(outcome[0], LeaseLost)
    assert entries(database, taken[0].run_id) == ()


class Slow(Database):
    """Holds its transaction open, with everything done, until told to go on."""

    def __init__(self, dsn: str, locked: threading.Event, go_on: threading.Event) -> None:
        super().__init__(dsn)
        self._locked, self._go_on = locked, go_on

    def run(self, work: Callable[[Connection], T]) -> T:
        def wait(connection: Connection) -> T:
            result = work(connection)
            self._locked.set()
            assert self._go_on.wait(10)
            return result

        return super().run(wait)


def await_lock_wait(dsn: str) -> None:
    """Until some statement in this database waits for a row lock."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(200):
            found = connection.execute(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ).fetchone()
            if found:
                return
            SYSTEM.sleep(0.02)
    pytest.fail("nothing waited for the lock")


class Forgetful(Database):
    """Loses the answer to every commit, so that everything is done twice."""

    def _persistently(self, work: Callable[[Connection], T]) -> T:
        super()._persistently(work)
        return super()._persistently(work)


def test_a_commit_whose_answer_was_lost_is_not_done_twice(migrated: str) -> None:
    database = Forgetful(migrated)
    journal = begin(database)
    assert journal.token == 1
    assert journal.append(Kind.STARTED).seq == 1
    assert journal.append(Kind.FINISHED, data={"outcome": "done"}).seq == 2
    assert [entry.seq for entry in journal.entries()] == [1, 2]
    assert [run.outcome for run in runs(database)] == ["done"]
    database.close()


HOLD = """
import sys
from datetime import timedelta
from patchpilot.engine.journal import Kind
from patchpilot.postgres.connection import Database
from patchpilot.postgres.journal import open_run
journal = open_run(Database(sys.argv[1]), "prod", "broker", ttl=timedelta(hours=1))
journal.append(Kind.STARTED)
print(journal.run_id, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_after_kill_9_the_same_command_goes_on_at_once(database: Database, migrated: str, reaped: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, migrated], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        run_id = process.stdout.readline().strip()
        with pytest.raises(LockHeld, match=f"pid {process.pid} on host"):
            begin(database)
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait()
        else:
            await_state(process.pid, "Z")
        journal = begin(database)
        assert (journal.run_id, journal.token) == (run_id, 2)


def await_state(pid: int, state: str) -> None:
    for _ in range(200):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == state:
            return
        SYSTEM.sleep(0.02)
    pytest.fail(f"process {pid} never was in state {state}")


def test_only_proof_counts_as_death() -> None:
    here = Holder.here()
    assert not here.is_certainly_dead()
    assert Holder(here.host, here.pid, here.machine, "1").is_certainly_dead()  # its pid is another process's now
    assert not Holder(here.host, here.pid, "another kernel", "1").is_certainly_dead()
    assert not Holder(here.host, here.pid, "", "1").is_certainly_dead()
    assert not Holder(here.host, here.pid, here.machine, "").is_certainly_dead()


def test_a_lease_is_renewed_while_the_process_is_busy_and_given_back_at_the_end(database: Database) -> None:
    term = timedelta(milliseconds=600)
    with begin(database, ttl=term) as journal:
        SYSTEM.sleep(2 * term.total_seconds())
        with pytest.raises(LockHeld):
            begin(database, ELSEWHERE)
        journal.append(Kind.STARTED)
    assert begin(database, ELSEWHERE).run_id == journal.run_id


def test_losing_the_lease_in_the_background_is_noticed_at_the_next_write(database: Database) -> None:
    with begin(database, ELSEWHERE, ttl=timedelta(milliseconds=90)) as loser:
        expire_and_take = begin_when_free(database)
        SYSTEM.sleep(0.2)
        with pytest.raises(LeaseLost):
            loser.append(Kind.STARTED)
    assert expire_and_take.entries() == ()
    expire_and_take.append(Kind.STARTED)


def begin_when_free(database: Database) -> RunJournal:
    for _ in range(100):
        expire(database)
        try:
            return begin(database)
        except LockHeld:  # renewed in between
            continue
    pytest.fail("the lease could not be taken over")


@pytest.mark.parametrize(
    "statement",
    ["UPDATE patchpilot.run_entry SET kind = 'reached'", "DELETE FROM patchpilot.run_entry",
     "TRUNCATE patchpilot.run_entry CASCADE"],
)  # fmt: skip
def test_the_database_itself_refuses_to_change_the_journal(database: Database, statement: str) -> None:
    journal = begin(database)
    journal.append(Kind.STARTED)
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        database.run(lambda connection: connection.execute(statement.encode()))
    assert [entry.kind for entry in journal.entries()] == [Kind.STARTED]


def test_the_database_itself_refuses_a_second_unfinished_run(database: Database) -> None:
    begin(database)
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.execute("INSERT INTO patchpilot.run (id, environment, cluster) VALUES ('other', 'prod', 'broker')")


def test_the_database_knows_every_kind_of_entry_and_no_other(database: Database) -> None:
    labels = database.fetch("SELECT unnest(enum_range(NULL::patchpilot.entry_kind))::text AS kind")
    assert [row["kind"] for row in labels] == [str(kind) for kind in Kind]


def test_a_listing_says_how_each_run_was_left(database: Database) -> None:
    def leave(cluster: str, *last: object) -> None:
        journal = open_run(database, "prod", cluster, ttl=LONG)
        journal.append(*last)  # type: ignore[arg-type]
        journal.release()

    leave("done", Kind.FINISHED, "", "", {"outcome": "done"})
    leave("paused", Kind.PAUSED, "watch", "watch", {"why": "asked to stop"})
    leave("blocked", Kind.CONTRADICTED, "preflight", "readiness", {"why": "no replica", "exit": 5})
    leave("killed", Kind.ACTING, "trigger", "trigger")
    open_run(database, "prod", "live", ttl=LONG)
    open_run(database, "test", "other", ttl=LONG)

    listed = runs(database, "prod")
    assert {run.cluster: run.state for run in listed} == {
        "done": "done", "paused": "paused", "blocked": "contradicted", "killed": "interrupted", "live": "running",
    }  # fmt: skip
    assert [run.cluster for run in listed] == ["live", "killed", "blocked", "paused", "done"]
    assert [run.cluster for run in runs(database, "prod", "paused")] == ["paused"]
    assert [run.cluster for run in runs(database, limit=1)] == ["other"]
    blocked = listed[2].last
    assert blocked is not None
    assert (blocked.phase, blocked.step, blocked.data) == ("preflight", "readiness", {"why": "no replica"})


def test_an_unknown_run_is_a_usage_error(database: Database) -> None:
    with pytest.raises(Usage, match="no run 'nowhere'"):
        find_run(database, "nowhere")
    assert entries(database, "nowhere") == ()


def test_the_schema_check_names_both_versions(database: Database, dsn: str) -> None:
    assert outdated(database) is None
    database.execute("DELETE FROM patchpilot.migration WHERE number > 1")
    assert outdated(database) == f"the schema is at migration 0001, this version needs {migrations()[-1].number:04}"
    empty = Database(dsn)
    with pytest.raises(NeedsOperator, match="db migrate"):
        outdated(empty)
    empty.close()
