"""Which worker a process is of."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend

FORKED = """
import os
from billiard import Process
from celery import signals
from patchpilot.backend.instance import this_worker

print(this_worker(), flush=True)
if os.fork() == 0:
    signals.celeryd_init.send(sender="w")
    pool = Process(target=lambda: print(this_worker(), flush=True))
    pool.start()
    pool.join()
    print(this_worker(), flush=True)
    os._exit(0)
os.wait()
"""


def test_a_worker_that_somebody_forked_has_a_name_of_its_own_and_its_pool_has_it_too() -> None:
    ran = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True)
    parent, pool, worker = ran.stdout.split()
    assert pool == worker != parent
