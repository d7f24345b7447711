"""`patchpilot recover --watch` on real servers, any of which may go away."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chord

from patchpilot.errors import Exit
from patchpilot.lab.launch import Address
from patchpilot.lab.links import Link
from patchpilot.lab.processes import until
from tests.support.commands import environment, patchpilot
from tests.support.processes import ROOT, Shop
from tests.support.shop import add, total

WAIT = 60


def config(directory: Path, dsn: str, endpoint: str) -> Path:
    path = directory / f"{len(list(directory.glob('*.toml')))}.toml"
    path.write_text(
        f'[postgres]\ndsn = "{dsn}"\n[clusters.broker]\nrole = "broker"\nreplication_group = "b"\n'
        f'endpoint = "{endpoint}"\n'
    )
    return path


class Watch:
    """`patchpilot recover --watch 1s` as a process."""

    def __init__(self, directory: Path, path: Path, *options: str) -> None:
        self._files = [directory / f"{path.stem}.{name}" for name in ("out", "err")]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "patchpilot", "recover", "--watch", "1s", "--min-age", "0s",
                 "--config", path, "--listen", "127.0.0.1:0", *options],
                cwd=ROOT, env=environment(), stdout=out, stderr=err,
            )  # fmt: skip
        until(lambda: "listening on" in self.said or self.process.poll() is not None, seconds=WAIT, what="it listened")
        assert self.process.poll() is None, self.said
        self.address = self.said.split("listening on ")[1].split(": ")[0]

    @property
    def said(self) -> str:
        return self._files[1].read_text()

    @property
    def told(self) -> str:
        return self._files[0].read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it told in JSON; a line that is not finished yet is for the next time."""
        lines = [json.loads(line) for line in self.told.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["event"] == name]

    def ask(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def await_health(self, status: int) -> str:
        until(lambda: self.ask("/healthz")[0] == status, seconds=WAIT, what=f"health was {status}: {self.said}")
        return self.ask("/healthz")[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def lost_chord(shop: Shop) -> str:
    """A chord whose header's messages are nowhere any more. Its group id."""
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete("celery")
    return str(result.parent.id)


def test_two_watches_recover_what_gets_stuck_once_and_end_at_a_signal(shop: Shop, stack: ExitStack) -> None:
    watches = [Watch(shop.directory, config(shop.directory, shop.dsn, shop.broker), "--output", "json") for _ in "ab"]
    for each in watches:
        stack.callback(each.kill)
    assert watches[0].await_health(200) == "ok\n"
    group_ids = [lost_chord(shop) for _ in range(5)]
    with redis.Redis.from_url(shop.broker) as broker:
        until(lambda: broker.llen("celery") >= 10, seconds=WAIT, what="every message was sent again")
    seen = [passes(each) for each in watches]
    until(
        lambda: all(passes(each) >= before + 2 for each, before in zip(watches, seen, strict=True)),
        seconds=WAIT,
        what="two more passes each",
    )
    shop.worker()
    shop.await_line("total 6", count=5)
    lines = shop.ledger()
    assert {line: lines.count(line) for line in set(lines)} == {"add 1 1": 5, "add 2 2": 5, "total 6": 5}
    assert any(watch.events("recovered") for watch in watches)
    status, metrics = watches[0].ask("/metrics")
    assert status == 200
    assert 'patchpilot_recovery_passes_total{outcome="ok"}' in metrics
    assert not any(group_id in metrics for group_id in group_ids)
    assert watches[0].ask("/")[0] == 404
    assert watches[0].ask("/healthz?from=probe") == (200, "ok\n")
    assert [watches[0].stop(), watches[1].stop(signal.SIGINT)] == [Exit.DONE, Exit.DONE]
    assert all("Traceback" not in each.said for each in watches)


def test_a_dry_run_tells_each_finding_once_and_changes_nothing(shop: Shop, stack: ExitStack) -> None:
    watch = Watch(shop.directory, config(shop.directory, shop.dsn, shop.broker), "--dry-run")
    stack.callback(watch.kill)
    group_id = lost_chord(shop)

    until(lambda: group_id in watch.told, seconds=WAIT, what="it was found")
    seen = passes(watch)
    until(lambda: passes(watch) >= seen + 2, seconds=WAIT, what="two more passes")
    assert watch.stop() == Exit.DONE
    told = [line.split("  ", 1)[1] for line in watch.told.splitlines()]
    assert sorted(told) == sorted(set(told))  # the first pass may have come while it was being sent
    [line] = [line for line in told if line.startswith(f"found chord {group_id} ")]
    assert "header-message-lost, remedy republish" in line
    with redis.Redis.from_url(shop.broker) as broker:
        assert broker.llen("celery") == 0


@pytest.mark.parametrize("away", ["postgres", "broker"])
def test_it_outlives_a_server_that_is_away(shop: Shop, stack: ExitStack, away: str) -> None:
    server = shop.dsn.split("@")[1].split("/")[0] if away == "postgres" else shop.broker.split("/")[2]
    host, port = server.split(":")
    link = stack.enter_context(Link(Address(host, int(port))))
    reach = {"postgres": shop.dsn, "broker": shop.broker, away: ""}
    reach[away] = {"postgres": shop.dsn, "broker": shop.broker}[away].replace(server, str(link.address))
    path = config(shop.directory, reach["postgres"], reach["broker"])
    watch = Watch(shop.directory, path, "--output", "json")
    stack.callback(watch.kill)
    watch.await_health(200)
    link.refuse()
    reason = watch.await_health(503)
    assert "the last pass failed" in reason
    until(lambda: failures(watch) >= 2, seconds=WAIT, what="two passes failed")
    assert len(watch.events("away")) == 1  # said once
    group_id = lost_chord(shop)
    link.retarget(Address(host, int(port)))
    until(lambda: [it["id"] for it in watch.events("recovered")] == [group_id], seconds=WAIT, what="it recovered")
    watch.await_health(200)
    assert len(watch.events("back")) == 1
    assert watch.stop() == Exit.DONE
    assert "Traceback" not in watch.said


def passes(watch: Watch) -> float:
    [line] = [it for it in watch.ask("/metrics")[1].splitlines() if 'passes_total{outcome="ok"}' in it]
    return float(line.split()[-1])


def failures(watch: Watch) -> float:
    lines = watch.ask("/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("patchpilot_recovery_errors_total{"))


def test_what_does_not_go_together_and_an_address_that_is_taken(migrated: str, valkey: str, tmp_path: Path) -> None:
    path = config(tmp_path, migrated, valkey)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            ("--watch", "5s", "--plan", "plan.json"): (Exit.USAGE, "--watch goes on without a person"),
            ("--listen", ":0"): (Exit.USAGE, "--listen is for --watch"),
            ("--watch", "10ms"): (Exit.USAGE, "an interval below 1s"),
            ("--watch", "2d"): (Exit.USAGE, "an interval above 1d 0h"),
            ("--watch", "5s", "--listen", "here"): (Exit.USAGE, "'here' is no address"),
            ("--adopt", "--strays", ""): (Exit.USAGE, "--strays"),
            ("--watch", "5s", "--listen", f"127.0.0.1:{port}"): (Exit.ERROR, "Address already in use"),
        }
        for arguments, (code, words) in cases.items():
            done = patchpilot("recover", *arguments, "--config", path)
            assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
            assert words in done.stderr


def test_tables_that_are_missing_are_said_at_once(dsn: str, valkey: str, tmp_path: Path) -> None:
    done = patchpilot("recover", "--watch", "1s", "--config", config(tmp_path, dsn, valkey))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (Exit.ERROR, 1)
    assert "patchpilot db migrate" in done.stderr
