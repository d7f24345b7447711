"""The demo itself, as `make demo` runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from patchpilot.errors import Exit
from patchpilot.lab.processes import until
from tests.support.commands import environment
from tests.support.processes import ROOT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "patchpilot", "lab", "demo", "--reports", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "demo.json").read_text())
    for side in ("patchpilot", "stock"):
        assert figures[side]["sent"] > 50
        assert set(figures[side]) >= {"sent", "stuck", "recovered", "lost", "duplicated"}
        assert sum(figures[side]["stuck_by_kind"].values()) == figures[side]["stuck"]
        assert sum(figures[side]["lost_by_kind"].values()) == figures[side]["lost"]
        # What was stuck came back or is lost; what was lost need not have been stuck when it was counted.
        assert 0 <= figures[side]["stuck"] - figures[side]["recovered"] <= figures[side]["lost"]
    assert (figures["patchpilot"]["lost"], figures["patchpilot"]["duplicated"]) == (0, 0)
    report = json.loads(Path(figures["report"]).read_text())
    assert (report["run_id"], report["outcome"]) == (figures["run_id"], "done")
    # No message of theirs was left anywhere, so Celery cannot have healed these: each is among the pilot's remedies.
    remedied = [each for each in report["remedies"]["after"] if each["diagnosis"] == "header-message-lost"]
    assert figures["patchpilot"]["stuck_by_kind"].get("header message lost", 0) <= len({r["id"] for r in remedied})
    assert not report["remedies"]["left"]
    assert left() == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "patchpilot", "lab", "demo", "--reports", str(tmp_path)]
    folder = tmp_path / "tmp"
    folder.mkdir()
    demo = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(TMPDIR=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until(lambda: any("patchpilot.lab.sample" in line for line in left()), seconds=60, what="its workers ran")
    os.killpg(demo.pid, signal.SIGINT)  # Ctrl-C goes to the whole group
    until(lambda: ignores_interrupts(demo.pid) or demo.poll() is not None, seconds=30, what="it was cleaning up")
    os.killpg(demo.pid, signal.SIGINT)  # impatience must not disturb the cleaning up
    said, _ = demo.communicate(timeout=60)
    assert demo.returncode == Exit.RESUME_LATER, said
    assert said.splitlines()[-1] == "interrupted; everything it started is stopped"
    assert "Traceback" not in said
    until(lambda: left() == [], seconds=30, what="everything was gone")
    assert list(folder.iterdir()) == []


def ignores_interrupts(pid: int) -> bool:
    """Whether a process ignores SIGINT at the moment, by proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    [ignored] = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(ignored, 16) & 1 << (signal.SIGINT - 1))


def left() -> list[str]:
    """Command lines of what a demo starts, as far as it still runs. Tests of the same machine do not run beside it."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if "patchpilot-demo-" in line or "patchpilot.lab.sample" in line]
