"""Which worker this is: one name for its main process and its pool, and another one for every other worker.

The pool inherits the name, so that siblings know each other: a sibling's pid can be looked up. A worker that was forked
by somebody's own code, from a process that had loaded the backend, inherits it too, and makes one of its own.
"""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

from billiard.process import current_process
from celery import signals

_name = str(uuid4())
_pid = os.getpid()


def this_worker() -> str:
    """The name of this worker, a UUID. In a process that is no worker, of that process."""
    global _name, _pid
    if os.getpid() != _pid and not _is_of_a_pool():
        _name, _pid = str(uuid4()), os.getpid()
    return _name


def this_process() -> str:
    """The worker and the process, as recorded with what it runs."""
    return f"{this_worker()}/{os.getpid()}"


def is_gone(process: str) -> bool:
    """Whether ``process`` was one of our own worker and is no more. Of others we cannot know."""
    name, _, pid = process.partition("/")
    if name != this_worker():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _is_of_a_pool() -> bool:
    """Whether Celery made this process for its pool. To billiard every other one is a main process."""
    return current_process()._parent_pid is not None


def _before_the_pool(**_: Any) -> None:
    this_worker()


signals.celeryd_init.connect(_before_the_pool)
