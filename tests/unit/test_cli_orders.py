"""What `run`, `plan` and `preflight` have in common: the same options, refused in the same words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchpilot.cli.app import run_app
from patchpilot.cli.plan import plan
from patchpilot.cli.preflight import preflight
from patchpilot.cli.run import run
from patchpilot.errors import Exit

SHARED = [
    "cluster", "config", "operation", "update", "engine", "engine_version", "parameter_group", "node_type", "waive",
    "reason", "output",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "own"),
    [(preflight, []), (plan, ["grace"]), (run, ["plan", "approve_before", "grace", "time_budget"])],
)
def test_each_has_the_options_that_say_what_to_do_and_its_own(command: Callable[..., Any], own: list[str]) -> None:
    names = list(inspect.signature(command).parameters)
    assert [name for name in names if name not in own] == SHARED
    assert [name for name in names if name in own] == own


@pytest.mark.parametrize("command", ["run", "plan", "preflight"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cluster", "brokr"], "no cluster 'brokr'"),
        (["--operation", "dance"], "--operation: 'dance' is none of"),
        (["--operation", "engine-upgrade", "--engine-version", "abc"], "--engine-version: 'abc' is no version"),
        (["--operation", "engine-upgrade", "--engine", "x", "--engine-version", "8.1"], "--engine: 'x' is none of"),
        (["--node-type", "cache.r7g.large"], "--node-type goes with --operation node-type"),
        (["--waive", "alarms"], "each --waive needs a --reason"),
        (["--config", "nowhere.toml"], "no such configuration file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, options: list[str], words: str
) -> None:
    """There is no PostgreSQL here, and none is asked."""
    path = tmp_path / "patchpilot.toml"
    path.write_text(
        '[postgres]\ndsn = "postgresql://127.0.0.1:1/x"\n'
        '[clusters.broker]\nrole = "volatile"\nreplication_group = "b"\n'
    )
    given = {"--config": str(path), "--cluster": "broker"}
    arguments = [word for pair in given.items() if pair[0] not in options for word in pair]
    assert run_app([command, *arguments, *options]) == Exit.USAGE
    said = capsys.readouterr()
    assert words in said.err
    assert (said.out, len(said.err.splitlines())) == ("", 1)


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("grace", "words"),
    [
        ("soon", "--grace: 'soon' is not a duration"),
        ("15d", "--grace: must be between"),
        ("24h", "--grace: runbook"),
    ],
)
def test_a_grace_that_cannot_be_is_refused_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, grace: str, words: str
) -> None:
    path = tmp_path / "patchpilot.toml"
    path.write_text('[clusters.broker]\nrole = "volatile"\nreplication_group = "b"\n')
    assert run_app([command, "--config", str(path), "--cluster", "broker", "--grace", grace]) == Exit.USAGE
    assert words in capsys.readouterr().err
