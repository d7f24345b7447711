"""A lab in the background: `patchpilot lab up`, `down` and `status`.

The servers belong to a supervisor process. What has to be cleaned up is on disk, so that `down` does it whichever of
the processes was killed before, the supervisor included.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from patchpilot.errors import NeedsOperator, PatchpilotError, Unsafe, Usage
from patchpilot.lab import supervisor
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster, replace
from patchpilot.lab.scenario import CALM, Scenario, find, read

_UP_SECONDS = 90.0
_DOWN_SECONDS = 30.0
_FACTS = "lab.json"
_CONFIG = "lab.toml"
_CREDENTIALS = "aws-credentials"
_LOG_LINES = 3
_SETTLE = timedelta(seconds=3)

_TOML = """\
# Written by `patchpilot lab up`; gone after `patchpilot lab down`.
environment = "lab"

[postgres]
dsn = {postgres}

[aws]
region = {region}
endpoint_url = {elasticache}
profile = "lab"
credentials_file = {credentials}

[runbook]
grace = "5s"
poll_interval = "500ms"
settle = {settle}
stall = "5m"
quiet = "5s"
verify_timeout = "60s"

[recovery]
min_age = "0s"
dead_after = "10s"
max_age = "24h"

[clusters.broker]
role = "broker"
replication_group = {replication_group}
endpoint = {endpoint}
"""

# moto checks no signature; boto3 only wants to have something to sign with.
_DUMMY_CREDENTIALS = "[lab]\naws_access_key_id = lab\naws_secret_access_key = lab\n"


@dataclass(frozen=True, slots=True)
class LabInfo:
    """Where a lab can be reached: the contents of `lab.json`."""

    endpoint: str
    """URL of the primary endpoint, with the database number."""
    postgres: str
    """DSN."""
    elasticache: str
    """Endpoint URL for boto3."""
    replication_group: str
    region: str
    config: str
    """Path of a TOML file for `--config`."""
    calls: str
    """Path of a JSON-lines file with one line for each call of the ElastiCache API."""
    state: str
    """Path of the list of processes that `down` goes by."""
    nodes: dict[str, str] = field(default_factory=dict)
    """URLs of the nodes themselves, by cache cluster id."""

    @classmethod
    def load(cls, directory: Path) -> LabInfo:
        """Read `lab.json`.

        :raises Usage: if there is none, or it is not one.
        """
        path = directory / _FACTS
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise Usage(f"no lab in {directory}: start one with `patchpilot lab up --dir {directory}`") from None
        except (ValueError, TypeError) as error:
            raise Usage(f"{path}: not a lab's description: {error}") from None


def up(
    directory: Path,
    *,
    replicas: int = 2,
    write_loss_ms: int = 300,
    endpoint_lag_ms: int = 300,
    seconds_per_node: float = 3.0,
    scenario: str | None = None,
    prepare: Callable[[str], None] | None = None,
) -> LabInfo:
    """Start a lab and leave it running; returns once everything answers.

    :param directory: for `lab.json`, the configuration, logs and data; made if it is missing.
    :param write_loss_ms: at each failover, for how long the old primary takes writes that will be lost.
    :param endpoint_lag_ms: at each failover, for how long the endpoint refuses connections.
    :param seconds_per_node: how long the replacement of a node takes.
    :param scenario: what goes wrong: the name of a scenario, or the path of its file; without one, nothing does.
    :param prepare: called with the DSN once PostgreSQL is up, before `lab.json` is there: for migrations.
    :raises Unsafe: if a lab runs in that directory already.
    :raises Usage: for values out of range, or a scenario that is not one.
    :raises NeedsOperator: if something does not come up. Nothing is left running then.
    """
    if replicas < 1:
        raise Usage("a lab needs at least one replica to fail over to")
    if min(write_loss_ms, endpoint_lag_ms, seconds_per_node) < 0:
        raise Usage("durations must not be negative")
    played, file = _scenario(scenario, replicas)
    directory = directory.absolute()
    options = {
        "replicas": replicas,
        "write_loss_ms": write_loss_ms,
        "endpoint_lag_ms": endpoint_lag_ms,
        "seconds_per_node": seconds_per_node,
        "scenario": file,
    }
    with _alone(directory):
        _refuse_if_running(directory)
        _clear(directory)
        try:
            facts = _start(directory, options)
            if prepare is not None:
                prepare(facts["postgres"])
            return _describe(directory, facts, played)
        except BaseException:
            _clear(directory)
            raise


def down(directory: Path) -> None:
    """Stop a lab, whatever is left of it. Logs stay; a second time, or without a lab, there is nothing to do.

    :raises NeedsOperator: if a process cannot be stopped.
    """
    directory = directory.absolute()
    if directory.is_dir():
        with _alone(directory):
            _clear(directory)


def status(directory: Path) -> dict[str, Any]:
    """What runs of a lab: `running` (all of it), and for each of the `processes` `pid` and `alive`.

    Nodes also have `role` (primary or replica), `offset` (bytes of the replication stream) and `in_sync`, all None
    while a node does not answer; `leads_to` is the node behind the endpoint at the moment.
    """
    directory = directory.absolute()
    roster = Roster(directory / supervisor.STATE)
    processes: dict[str, dict[str, Any]] = {
        name: {"pid": identity.pid, "alive": identity.alive} for name, identity in roster.processes.items()
    }
    try:
        info = LabInfo.load(directory)
    except Usage:
        return {"running": False, "processes": processes, "leads_to": None}
    for name, url in info.nodes.items():
        row = processes.setdefault(name, {"pid": None, "alive": False})
        row.update(_replication(url))
    needed = {supervisor.NAME, "postgres", *info.nodes}
    return {
        "running": all(name in processes and processes[name]["alive"] for name in needed),
        "processes": processes,
        "leads_to": _behind(info),
    }


def _start(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    logs = directory / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / "supervisor.log"
    with log.open("wb") as output:
        started = subprocess.run(
            [sys.executable, "-m", "patchpilot.lab.supervisor", str(directory), json.dumps(options)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    owner = Roster(directory / supervisor.STATE).processes.get(supervisor.NAME)
    if started.returncode or owner is None:
        raise NeedsOperator(f"the lab did not start; {log}: {_last_words(log)}")
    ready = directory / supervisor.READY
    try:
        until(lambda: ready.exists() or not owner.alive, seconds=_UP_SECONDS, what="the lab was up")
    except NeedsOperator as error:
        raise NeedsOperator(f"{error}; {log}: {_last_words(log)}") from None
    if not ready.exists():
        raise NeedsOperator(f"the lab did not start; {log}: {_last_words(log)}")
    facts: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
    return facts


def configuration(facts: Mapping[str, Any], credentials: Path, scenario: Scenario) -> str:
    """The TOML configuration for a pilot in this lab.

    Its `settle` is longer than the scenario's AWS takes to show what it was told to do: that is what the promise of one
    trigger rests on when the pilot is killed in the middle of it.
    """
    settle = f"{(_SETTLE + scenario.longest_lag).total_seconds():g}s"
    said = {**facts, "credentials": str(credentials), "settle": settle}
    # A JSON string is a TOML string too.
    return _TOML.format(**{key: json.dumps(value) for key, value in said.items()})


def _scenario(name: str | None, replicas: int) -> tuple[Scenario, str | None]:
    if name is None:
        return CALM, None
    file = find(name)
    scenario = read(file)
    if scenario.highest_node > replicas + 1:
        raise Usage(f"{file}: is about node {scenario.highest_node}, and the lab has only {replicas + 1}")
    return scenario, str(file)


def _describe(directory: Path, facts: dict[str, Any], scenario: Scenario) -> LabInfo:
    credentials, config = directory / _CREDENTIALS, directory / _CONFIG
    replace(credentials, _DUMMY_CREDENTIALS)
    replace(config, configuration(facts, credentials, scenario))
    info = LabInfo(**facts, config=str(config), state=str(directory / supervisor.STATE))
    replace(directory / _FACTS, json.dumps(asdict(info), indent=1) + "\n")
    return info


def _refuse_if_running(directory: Path) -> None:
    owner = Roster(directory / supervisor.STATE).processes.get(supervisor.NAME)
    if owner is not None and owner.alive:
        raise Unsafe(f"a lab runs in {directory} already: stop it with `patchpilot lab down --dir {directory}`")


def _clear(directory: Path) -> None:
    """Stop what is left of a lab and remove its files, logs and the call log excepted."""
    state = directory / supervisor.STATE
    owner = Roster(state).processes.get(supervisor.NAME)
    if owner is not None and owner.alive:
        owner.send(signal.SIGTERM)
        # If it does not go by itself, it is on the roster like everything else.
        with suppress(PatchpilotError):
            until(lambda: not owner.alive, seconds=_DOWN_SECONDS, what="the supervisor had ended")
    if state.exists():
        Roster(state).clean()
    for name in (_FACTS, _CONFIG, _CREDENTIALS, supervisor.READY):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "data", ignore_errors=True)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; it goes with the process, however that ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise Usage(f"{directory} cannot be used as a lab's directory: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unsafe(f"another `patchpilot lab` command is at work in {directory}") from None
        yield


def _replication(url: str) -> dict[str, Any]:
    try:
        with _client(url) as client:
            info = client.info("replication")
    except redis.RedisError:
        return {"role": None, "offset": None, "in_sync": None}
    primary = info["role"] == "master"
    return {
        "role": "primary" if primary else "replica",
        "offset": info["master_repl_offset" if primary else "slave_repl_offset"],
        "in_sync": primary or (info["master_link_status"] == "up" and not info["master_sync_in_progress"]),
    }


def _behind(info: LabInfo) -> str | None:
    """The node that the endpoint leads to."""
    try:
        with _client(info.endpoint) as client:
            port = client.info("server")["tcp_port"]
    except redis.RedisError:
        return None
    return next((name for name, url in info.nodes.items() if f":{port}/" in url), None)


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0), decode_responses=True
    )


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " / ".join(line.strip() for line in lines[-_LOG_LINES:] if line.strip()) or "(nothing)"
