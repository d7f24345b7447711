"""What the backend reads from the Celery configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from celery import Celery
from celery.exceptions import ImproperlyConfigured

MESSAGE_ID = "patchpilot_message"
"""Message header: the id of the message in the outbox."""

CALLBACK_OF = "patchpilot_callback_of"
"""Message header: the chord whose callback this message is. Its start is fenced."""

CANARY = "patchpilot.canary"
"""The canary task's name, and what the names of its queues and chords begin with. Its messages are not recorded."""


class Masked(str):
    """What stands in the Celery configuration for a DSN, so that no report or inspection shows it."""

    __slots__ = ("dsn",)
    dsn: str

    @classmethod
    def of(cls, dsn: str) -> Masked:
        masked = cls("***")
        masked.dsn = dsn
        return masked

    def __reduce__(self) -> tuple[Any, ...]:
        return (Masked.of, (self.dsn,))


@dataclass(frozen=True)
class Config:
    """The backend's settings, all but the first optional."""

    dsn: str = field(repr=False)
    claim_lease: timedelta = timedelta(seconds=30)
    """How long one process may take to join a chord's results and publish its callback before another may."""
    fence_lease: timedelta = timedelta(seconds=30)
    """How long after the last sign of life of a running callback another delivery of it may run."""
    valkey_budget: float = 30.0
    """Seconds for which counting a part is retried before the chord is left to recovery."""
    postgres_budget: float = 60.0
    """Seconds for which PostgreSQL may be away before a worker or a producer hears of it."""

    @classmethod
    def of(cls, app: Celery) -> Config:
        """Read the configuration of ``app``.

        :raises ImproperlyConfigured: if PostgreSQL is configured nowhere.
        """
        dsn = app.conf.get("patchpilot_postgres") or os.environ.get("PATCHPILOT_POSTGRES")
        if isinstance(dsn, Masked):
            dsn = dsn.dsn
        if callable(dsn):
            dsn = dsn()
        if not dsn:
            raise ImproperlyConfigured(
                "the patchpilot backend needs PostgreSQL: set patchpilot_postgres in the Celery configuration, "
                "or PATCHPILOT_POSTGRES in the environment, to a libpq connection string"
            )
        app.conf["patchpilot_postgres"] = Masked.of(str(dsn))
        return cls(
            str(dsn),
            claim_lease=_seconds(app, "patchpilot_claim_lease", cls.claim_lease),
            fence_lease=_seconds(app, "patchpilot_fence_lease", cls.fence_lease),
            valkey_budget=float(app.conf.get("patchpilot_valkey_budget", cls.valkey_budget)),
            postgres_budget=float(app.conf.get("patchpilot_postgres_budget", cls.postgres_budget)),
        )


def _seconds(app: Celery, key: str, default: timedelta) -> timedelta:
    value: Any = app.conf.get(key)
    if value is None:
        return default
    return value if isinstance(value, timedelta) else timedelta(seconds=float(value))
