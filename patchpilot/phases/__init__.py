"""The runbook: eight phases, one file each. What they work with is on the :class:`~patchpilot.phases.desk.Desk`."""

from __future__ import annotations

from patchpilot.engine.plan import Plan
from patchpilot.phases.desk import Desk
from patchpilot.phases.p1_preflight import Preflight
from patchpilot.phases.p2_trigger import Trigger
from patchpilot.phases.p3_watch import Watch, outcome
from patchpilot.phases.p4_grace import Grace
from patchpilot.phases.p5_dry_run import DryRun
from patchpilot.phases.p6_recover import Recover
from patchpilot.phases.p7_verify import Verify
from patchpilot.phases.p8_report import Report

RUNBOOK = (Preflight, Trigger, Watch, Grace, DryRun, Recover, Verify, Report)

__all__ = ["RUNBOOK", "Desk", "runbook"]


def runbook(desk: Desk) -> Plan:
    """The plan of one run."""
    return Plan(tuple(phase(desk) for phase in RUNBOOK), poll=desk.runbook.poll_interval, outcome=outcome)
