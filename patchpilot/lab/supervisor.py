"""The process that owns a lab in the background. Started by :func:`patchpilot.lab.background.up`, never by hand."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from patchpilot.clock import SYSTEM
from patchpilot.errors import PatchpilotError
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster, replace

NAME = "supervisor"
STATE = "state.json"
"""The roster, in the lab's directory."""
READY = "ready.json"
"""Written, in the lab's directory, once everything is up: what `lab.json` says about addresses."""

_HANDOVER_SECONDS = 10.0


def main(directory: Path, options: dict[str, Any]) -> None:
    """Leave the caller behind, and run a lab until SIGTERM."""
    starter = os.getpid()
    child = os.fork()
    if child:
        # Whoever waits for this process finds the supervisor on the roster.
        Roster(directory / STATE).add(NAME, child)
        os._exit(0)
    os.setsid()
    until(lambda: os.getppid() != starter, seconds=_HANDOVER_SECONDS, what="the supervisor was on its own")
    try:
        _run(directory, options)
    except PatchpilotError as error:
        # The caller shows the end of this process's log.
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def _run(directory: Path, options: dict[str, Any]) -> None:
    from patchpilot.lab import scenario
    from patchpilot.lab.laboratory import Lab
    from patchpilot.lab.watchdog import Watchdog

    enough = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: enough.set())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    roster = Roster(directory / STATE)
    played = options.pop("scenario", None)
    options["scenario"] = scenario.read(Path(played)) if played else scenario.CALM
    with Watchdog(roster), Lab(directory, roster=roster, **options) as lab:
        facts = {
            "endpoint": lab.endpoint,
            "postgres": lab.dsn,
            "elasticache": lab.cloud.url,
            "replication_group": lab.replicas.name,
            "region": lab.world.region,
            "calls": str(lab.calls),
            "nodes": {name: node.url for name, node in lab.replicas.nodes.items()},
        }
        replace(directory / READY, json.dumps(facts, indent=1))
        while not SYSTEM.wait(enough, 3600):
            pass
    roster.clean()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
