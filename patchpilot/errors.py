"""Errors, sorted by the reaction they ask for.

Every error that reaches a person carries one line that says what is wrong and what to do, and an exit code
that a scheduler can branch on. The codes are part of the command line's contract: see the README's table.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every ``patchpilot`` command."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    NOTHING_TO_DO = 3
    RESUME_LATER = 4
    BLOCKED = 5
    LOCK_HELD = 6
    VERIFICATION_FAILED = 7
    ABORTED = 8


class PatchpilotError(Exception):
    """Anything patchpilot raises on purpose. The message is one line for a person."""

    exit_code: Exit = Exit.ERROR


class Transient(PatchpilotError):
    """Try again: the far side was away, slow or throttling. The engine does, within a bound, then stops resumably."""

    exit_code = Exit.RESUME_LATER


class Throttled(Transient):
    """We ask too often, and the far side said so: it did nothing."""


class ResumeLater(PatchpilotError):
    """The run stopped at a checkpoint, on request or because its time budget is spent. The same command goes on."""

    exit_code = Exit.RESUME_LATER


class NeedsOperator(PatchpilotError):
    """A person has to change something first: configuration, credentials, permissions."""

    exit_code = Exit.ERROR


class Refused(NeedsOperator):
    """One request is refused, for want of a permission perhaps: what it asked for stays unknown. Others may be good."""


class Usage(NeedsOperator):
    """The command line or the configuration file is wrong. Nothing was touched."""

    exit_code = Exit.USAGE


class NothingToDo(PatchpilotError):
    """There is no work: no applicable service update, for example. Not a failure."""

    exit_code = Exit.NOTHING_TO_DO


class Blocked(NeedsOperator):
    """Pre-flight refuses to go on: patching now would be unsafe."""

    exit_code = Exit.BLOCKED


class Unsafe(PatchpilotError):
    """Going on could break a promise, so patchpilot stopped before it did."""

    exit_code = Exit.ERROR


class Aborted(PatchpilotError):
    """The run was ended on request, or by an abort criterion, before the update was complete."""

    exit_code = Exit.ABORTED


class LockHeld(Unsafe):
    """Another live run holds the cluster."""

    exit_code = Exit.LOCK_HELD


class LeaseLost(Unsafe):
    """This process lost the cluster's lease to another one; it can no longer write to the run journal."""

    exit_code = Exit.LOCK_HELD


class VerificationFailed(Unsafe):
    """The runbook ran, but the result could not be proven good."""

    exit_code = Exit.VERIFICATION_FAILED


class Corrupt(PatchpilotError):
    """A record contradicts itself or was changed by somebody else. Never repaired automatically."""

    exit_code = Exit.ERROR
