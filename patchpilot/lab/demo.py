"""The demo: a live broker is patched under load, and a ledger counts what was lost. Then the same with stock Celery.

Nothing is tuned until it looks good: the traffic comes from a seed, both sides get the same, and the figures are what
the ledger says, also when they are unflattering.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import redis
from botocore.config import Config

from patchpilot.clock import SYSTEM, Backoff
from patchpilot.errors import Exit, NeedsOperator
from patchpilot.lab import background
from patchpilot.lab.background import LabInfo
from patchpilot.lab.ledger import Ledger
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.sample import chord_of
from patchpilot.lab.verdict import Stuck, Verdict, stuck, verdict
from patchpilot.lab.watchdog import Watchdog

RATE = 8.0
"""Chords a second; some 120 tasks a second."""
WORKERS, PROCESSES = 2, 12
WARM_UP_SECONDS = 5.0
GRACE_SECONDS = 5.0
"""How long after the failover the stuck chords are counted: the `grace` of the lab's configuration."""
BLINK_SECONDS = 0.2
QUIET_SECONDS = 18.0
"""Without a callback for this long, whatever is open is lost: longer than the visibility timeout and its sweep."""
READY_SECONDS = 60.0
SERVICE_UPDATE_SECONDS = 120.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One of the two applications that are compared."""

    name: str
    title: str
    backend_prefix: str


OURS = Side("patchpilot", "patchpilot", "patchpilot+")
STOCK = Side("stock", "stock Celery, Redis backend", "")


def demo(reports: Path, *, prepare: Callable[[str], None], seed: int | None = None) -> int:
    """Run the demo.

    :param reports: where `demo.json` and the run's own report go.
    :param prepare: migrates the lab's PostgreSQL.
    :param seed: of the traffic; a new one each time by default.
    :returns: the exit code: not zero unless patchpilot lost nothing and repeated nothing, and it was not interrupted.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _demo(reports, prepare, random.SystemRandom().randrange(10**6) if seed is None else seed)
    except KeyboardInterrupt:
        _say("interrupted; everything it started is stopped")
        return int(Exit.RESUME_LATER)


def _demo(reports: Path, prepare: Callable[[str], None], seed: int) -> int:
    _say(f"traffic: {RATE:g} chords a second of 2 to 50 tasks, seed {seed}; {WORKERS} workers of {PROCESSES} processes")
    with _rehearsal(OURS, prepare) as rehearsal:
        run_id, report = rehearsal.patch_with_pilot(reports, seed)
        ours = rehearsal.verdict()
    _say("")
    _say("the same traffic through the same failover, with Celery's own Redis backend:")
    with _rehearsal(STOCK, prepare) as rehearsal:
        rehearsal.patch_by_hand(seed, count=ours.sent + ours.raised)
        stock = rehearsal.verdict()
    path = _write(reports, ours, stock, run_id, report, seed)
    _compare(ours, stock)
    _say("")
    _say(f"report:  {report}")
    _say(f"         {Path(report).with_suffix('.md')}")
    _say(f"figures: {path}")
    return int(Exit.DONE if ours.good else Exit.VERIFICATION_FAILED)


class _Rehearsal:
    """A lab, two workers and a producer of one side."""

    def __init__(self, side: Side, lab: LabInfo, directory: Path, roster: Roster) -> None:
        self.side = side
        self.lab = lab
        self.directory = directory
        self.ledger = Ledger(directory / "ledger.jsonl")
        self._roster = roster
        self._environment = {
            **os.environ, "LAB_BROKER": lab.endpoint, "LAB_BACKEND": f"{side.backend_prefix}{lab.endpoint}",
            "LAB_POSTGRES": lab.postgres, "LAB_LEDGER": str(self.ledger.path), "PYTHONWARNINGS": "ignore",
            "TMPDIR": str(directory),  # a killed pool leaves files behind
        }  # fmt: skip
        self._processes: list[subprocess.Popen[bytes]] = []
        self._before = Stuck({})

    # -- processes ----------------------------------------------------------------------------------------------

    def start_workers(self) -> None:
        """Start the workers and wait until they consume."""
        logs = [self.directory / f"worker-{number}.log" for number in range(1, WORKERS + 1)]
        for log in logs:
            self._start(
                log, "-m", "celery", "-A", "patchpilot.lab.sample", "worker", "-n", f"{log.stem}@%h",
                "-c", str(PROCESSES), "-l", "INFO", "--without-gossip", "--without-mingle",
            )  # fmt: skip
        until(
            lambda: all(" ready." in log.read_text(encoding="utf-8", errors="replace") for log in logs),
            seconds=READY_SECONDS, what="the workers were ready",
        )  # fmt: skip

    def _start(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments], env=self._environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        self._roster.add(log.stem, process.pid)
        return process

    def stop(self) -> None:
        """Stop what this rehearsal started; the lab is stopped by its own means."""
        for process in self._processes:
            if process.poll() is None:
                # The whole group: a worker's pool has to go as well.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # -- the two ways of patching -------------------------------------------------------------------------------

    def patch_with_pilot(self, reports: Path, seed: int) -> tuple[str, str]:
        """Patch as a user would. Returns the run's id and the path of its report."""
        with self._traffic(seed):
            _say("")
            command = ["run", "--cluster", "broker", "--config", self._config(), "--output", "json"]
            _say(f"$ patchpilot {' '.join(command)}")
            pilot = subprocess.Popen(
                [sys.executable, "-m", "patchpilot", *command],
                env={**os.environ, **self._addresses(), "PATCHPILOT_REPORTS": str(reports)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            self._roster.add("pilot", pilot.pid)
            try:
                answer = self._follow(pilot)
            finally:
                if pilot.poll() is None:
                    pilot.terminate()
                pilot.wait()
        if pilot.returncode != Exit.DONE:
            raise NeedsOperator(f"patchpilot run ended with exit code {pilot.returncode}: {answer.get('why', '')}")
        return answer["run_id"], answer["report"]["json"]

    def _follow(self, pilot: subprocess.Popen[str]) -> dict[str, Any]:
        """Show what the pilot says. Count what is stuck when it turns to recovery: after its grace, before its cure."""
        if pilot.stderr is None or pilot.stdout is None:
            raise NeedsOperator("the pilot's output cannot be read")
        counted = False
        for line in pilot.stderr:
            _say(f"  {line.rstrip()}")
            if "dry-run/" in line and not counted:
                self._before, counted = self.count_stuck(), True
        answer = pilot.stdout.read()
        return dict(json.loads(answer)) if answer.strip() else {}

    def patch_by_hand(self, seed: int, count: int) -> None:
        """Patch with one API call, and count so long after the failover as the pilot waits. The traffic is its too."""
        client = boto3.client(
            "elasticache", endpoint_url=self.lab.elasticache, region_name=self.lab.region,
            aws_access_key_id="lab", aws_secret_access_key="lab",  # noqa: S106 - the simulator's
            config=Config(retries={"total_max_attempts": 3}),
        )  # fmt: skip
        with self._traffic(seed, count):
            [update] = client.describe_service_updates(ServiceUpdateStatus=["available"])["ServiceUpdates"]
            name, groups = update["ServiceUpdateName"], [self.lab.replication_group]
            client.batch_apply_update_action(ServiceUpdateName=name, ReplicationGroupIds=groups)
            _say(f"  service update {name} triggered")

            def complete() -> bool:
                [action] = client.describe_update_actions(ServiceUpdateName=name, ReplicationGroupIds=groups)[
                    "UpdateActions"
                ]
                return bool(action["UpdateActionStatus"] == "complete")

            def failed_over() -> datetime | None:
                events = client.describe_events(
                    SourceType="replication-group", SourceIdentifier=self.lab.replication_group, Duration=60
                )["Events"]
                dates = [event["Date"] for event in events if event["Message"].startswith("Failover from primary node")]
                return max(dates, default=None)

            until(lambda: failed_over() is not None, seconds=SERVICE_UPDATE_SECONDS, what="there was a failover")
            at = failed_over() or SYSTEM.now()
            _say(f"  failover completed; counting {GRACE_SECONDS:g} s after it, when the pilot's grace would end")
            SYSTEM.sleep((at + timedelta(seconds=GRACE_SECONDS) - SYSTEM.now()).total_seconds())
            self._before = self.count_stuck()
            until(complete, seconds=SERVICE_UPDATE_SECONDS, what="the service update was complete")
            _say("  service update complete")

    @contextmanager
    def _traffic(self, seed: int, count: int | None = None) -> Iterator[None]:
        """Traffic for as long as the block lasts, or ``count`` chords of it, whichever takes longer."""
        self.start_workers()
        log = self.directory / "producer.log"
        options = ["--seed", str(seed), "--rate", str(RATE), *(["--count", str(count)] if count is not None else [])]
        producer = self._start(log, "-m", "patchpilot.lab.producer", *options)
        SYSTEM.sleep(WARM_UP_SECONDS)  # traffic has to be under way; how much is the seed's affair
        if producer.poll() is not None or not self.ledger.read():
            raise NeedsOperator(f"the workload did not start; see {log}")
        yield
        if count is None:
            producer.terminate()
        producer.wait()

    def _config(self) -> str:
        """The configuration a user would name; outside a checkout, the one that the lab wrote."""
        return "config/lab.toml" if Path("config/lab.toml").is_file() else self.lab.config

    def _addresses(self) -> dict[str, str]:
        return {
            "PATCHPILOT_POSTGRES": self.lab.postgres,
            "PATCHPILOT_AWS__ENDPOINT_URL": self.lab.elasticache,
            "PATCHPILOT_AWS__CREDENTIALS_FILE": str(Path(self.lab.config).with_name("aws-credentials")),
            "PATCHPILOT_CLUSTERS__BROKER__ENDPOINT": self.lab.endpoint,
        }

    # -- counting -----------------------------------------------------------------------------------------------

    def count_stuck(self) -> Stuck:
        """What is stuck now: by the ledger, by what waits in the broker, and by which counts Valkey still holds.

        The ledger is read last: what does not wait any more when the broker is looked at has left its line by then.
        """
        with redis.Redis.from_url(self.lab.endpoint) as client:
            waiting = _waiting(client)
            # Between the queue and a worker's hands a message is in neither for a moment.
            SYSTEM.sleep(BLINK_SECONDS)
            waiting |= _waiting(client)
            keys = [key.decode() for key in client.scan_iter("celery-taskset-meta-*.s", count=1000)]
        counting = {key.removeprefix("celery-taskset-meta-").removesuffix(".s") for key in keys}
        return stuck(self.ledger.read(), SYSTEM.now().timestamp(), counting, waiting)

    def verdict(self) -> Verdict:
        """Wait until every callback has run, or nothing has happened for too long, and count."""
        _say("  traffic stopped; waiting until every callback has run, or none has for long")
        patience = Backoff(SYSTEM, QUIET_SECONDS, first=0.5, longest=0.5)
        ran = -1
        while True:
            chords = self.ledger.read()
            if all(chord.callbacks for chord in chords.values() if chord.sent_at is not None):
                break
            if (now := sum(len(chord.callbacks) for chord in chords.values())) != ran:
                ran, patience = now, Backoff(SYSTEM, QUIET_SECONDS, first=0.5, longest=0.5)
            if not patience.pause():
                break
        return verdict(self.ledger.read(), self._before)


def _waiting(client: redis.Redis) -> set[tuple[str, int | None]]:
    """What is queued or in a worker's hands, both at one moment."""
    with client.pipeline(transaction=True) as both:
        both.lrange("celery", 0, -1)
        both.hvals("unacked")
        queued, taken = both.execute()
    return {chord_of(json.loads(each)) for each in queued} | {chord_of(json.loads(each)[0]) for each in taken}


@contextmanager
def _rehearsal(side: Side, prepare: Callable[[str], None]) -> Iterator[_Rehearsal]:
    directory = Path(tempfile.mkdtemp(prefix=f"patchpilot-demo-{side.name}-"))
    roster = Roster(directory / "demo-roster.json")
    # Dismissed only when everything is cleaned up: if that fails half-way, or never begins, it is the watchdog's work.
    watchdog = Watchdog(roster)
    rehearsal: _Rehearsal | None = None
    failed = False
    try:
        _say(f"starting the lab: PostgreSQL, a Valkey primary with two replicas, an ElastiCache API ({side.title})")
        lab = background.up(directory, prepare=prepare)
        supervisor = Roster(Path(lab.state)).processes["supervisor"]
        roster.add("supervisor", supervisor.pid)
        rehearsal = _Rehearsal(side, lab, directory, roster)
        yield rehearsal
    except Exception:
        failed = True
        raise
    finally:
        with _undisturbed():
            try:
                if rehearsal is not None:
                    rehearsal.stop()
            finally:
                background.down(directory)
            watchdog.dismiss()
            roster.clean()
            if failed:
                _say(f"the logs of what failed are in {directory}")
            else:
                shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for as long as the block lasts."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(reports: Path, ours: Verdict, stock: Verdict, run_id: str, report: str, seed: int) -> Path:
    reports.mkdir(parents=True, exist_ok=True)
    path = reports / "demo.json"
    content = {
        "patchpilot": ours.as_dict(), "stock": stock.as_dict(), "run_id": run_id, "report": report, "seed": seed,
        "traffic": {"chords_per_second": RATE, "sizes": [2, 50], "workers": WORKERS, "processes": PROCESSES},
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _compare(ours: Verdict, stock: Verdict) -> None:
    _say("")
    _say(f"{'':30} {'patchpilot':>12} {'stock Celery':>14}")
    rows = [
        ("chords sent", "sent"), ("stuck after the failover", "stuck"), ("recovered", "recovered"), ("lost", "lost"),
        ("callbacks run more than once", "duplicated"), ("callbacks with wrong results", "wrong"),
        ("sending raised in the caller", "raised"), ("header tasks run again", "repeated_parts"),
    ]  # fmt: skip
    for title, key in rows:
        _say(f"{title:30} {getattr(ours, key):>12} {getattr(stock, key):>14}")
        if key == "stuck":
            for kind in sorted({*ours.stuck_by_kind, *stock.stuck_by_kind}):
                _say(f"{'  ' + kind:30} {ours.stuck_by_kind.get(kind, 0):>12} {stock.stuck_by_kind.get(kind, 0):>14}")
    if not stock.lost:
        _say("")
        _say("By chance stock Celery lost nothing in this failover. Failovers are like that, most of the time.")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the demo is for people
