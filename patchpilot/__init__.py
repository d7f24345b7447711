"""Patch the Valkey or Redis cluster under Celery workers live, lose nothing, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

__version__ = "0.1.0"


def install(app: Celery, *, recover: bool = False) -> None:
    """Make the workers and producers of ``app`` survive a failover of their broker.

    Sets the transport ``patchpilot.transport:Transport`` and, beside it, how long publishing and connecting are
    retried. What the application sets itself stands, whether before or after this call. Also hides the DSN, by
    whatever name it is set, from reports and inspection. Brokers other than ``redis://`` and ``rediss://`` keep theirs.

    :param recover: have its workers recover what the broker lost, ``patchpilot_recovery_min_age`` after they have
        connected to it, and then ``patchpilot_recovery_every``, if that is set. One of them at a time.
    :raises ImproperlyConfigured: under a Celery that is not supported.
    """
    from patchpilot.backend.install import install as install_into

    install_into(app, recover=recover)
