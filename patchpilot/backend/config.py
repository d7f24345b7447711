"""What the backend reads from the Celery configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any, TypeVar

from celery import Celery
from celery.exceptions import ImproperlyConfigured

from patchpilot.dsn import MALFORMED, is_readable
from patchpilot.durations import long_enough_to_be_dead

MESSAGE_ID = "patchpilot_message"
"""Message header: the id of the message in the outbox."""

CALLBACK_OF = "patchpilot_callback_of"
"""Message header: the chord whose callback this message is. Its start is fenced."""

DSN = ("patchpilot_database", "patchpilot_postgres")
"""The setting that says where PostgreSQL is, under either name. Whatever is called a database Celery shows nobody, even
where nothing of ours is loaded yet."""

BROKER = "patchpilot_broker"
"""The setting that names the broker in the record, where its address does not do."""

FOLLOWS = "patchpilot_follows"
"""Message header: the message of the task before this one in a chain, or that links to it. Its start is fenced."""

ORIGIN = "patchpilot_origin"
"""Message header: the message by which a task began that has retried or replaced itself since."""

TO_ALL = "patchpilot_to_all"
"""Message header: it went to all who listen, so each of them runs it."""

CANARY = "patchpilot.canary"
"""The canary task's name, and what the names of its queues and chords begin with. Its messages are not recorded."""

LEAST_PATIENCE = 5.0
"""Seconds for which an answer of PostgreSQL is waited for at least, unless somebody says otherwise."""

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


class Journal(StrEnum):
    """``patchpilot_journal_messages``: what becomes of a message before it is published.

    Chords are written down whatever it says, with their members and their callbacks. Where that fails, no part of the
    chord is published: without its record nobody would call its callback, and nobody would tell.
    """

    REQUIRED = "required"
    """It is written down; if that fails, publishing fails. The default, also written ``True``."""
    WARN = "warn"
    """It is written down; if that fails, it is published all the same, with a warning; but no chord is."""
    OFF = "off"
    """Only chords and their callbacks are written down: a lost callback is what this backend is for. Also ``False``."""


class FenceMode(StrEnum):
    """``patchpilot_fence``: which tasks that are delivered twice run once."""

    OFF = "off"
    CALLBACKS = "callbacks"
    """What follows from other tasks: callbacks of chords, later tasks of chains, links."""
    ALL = "all"


class Counting(StrEnum):
    """``patchpilot_counting``: where the parts of a chord are counted."""

    POSTGRES = "postgres"
    VALKEY = "valkey"


class Mode(StrEnum):
    """``patchpilot_mode``: whether the backend acts or only watches."""

    DURABLE = "durable"
    SHADOW = "shadow"
    """Results and chords stay on Celery's own Redis backend; the record is written beside it."""


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
class MaskedCall:
    """What stands there for a function that returns the DSN: a partial would show what it was given."""

    call: Callable[[], Any] = field(repr=False)

    def __call__(self) -> Any:
        return self.call()


def mask(conf: Any, dsn: str | None = None) -> None:
    """Hide the DSN in a Celery configuration, under every name it has there, a namespace's included.

    :param dsn: the DSN; what is configured by default. A callable is not called for that.
    """
    for name in DSN:
        value = conf.get(name)
        found = dsn or value
        if not value or isinstance(value, Masked) or (isinstance(value, MaskedCall) and dsn is None):
            continue
        hidden = Masked.of(found) if isinstance(found, str) else MaskedCall(found) if callable(found) else None
        for key in conf._to_keys(name) if hidden is not None else ():
            if key == name or any(key in known for known in conf.maps):
                conf.changes[key] = hidden


@dataclass(frozen=True)
class Config:
    """The backend's settings, all but the first optional."""

    dsn: str = field(repr=False)
    mode: Mode = Mode.DURABLE
    counting: Counting = Counting.POSTGRES
    journal: Journal = Journal.REQUIRED
    fence: FenceMode = FenceMode.CALLBACKS
    strict: bool = False
    """Whether a callback that cannot be stored unchanged fails the dispatch, before anything is published."""
    prepared_statements: bool = False
    """Whether PostgreSQL keeps prepared statements for our sessions: faster, but not behind a transaction pooler."""
    claim_lease: timedelta = timedelta(seconds=30)
    """How long one process may take to join a chord's results and publish its callback before another may."""
    fence_lease: timedelta = timedelta(seconds=30)
    """How long after the last sign of life of a running callback another delivery of it may run."""
    retention: timedelta = timedelta(days=7)
    """How long chords and starts that are over stay on record. Longer than the broker's visibility timeout: until then
    an old message may come back."""
    recovery_min_age: timedelta = timedelta(minutes=5)
    """In a worker that recovers: what made progress later is left alone; and how long after connecting it sweeps."""
    recovery_max_age: timedelta = timedelta(hours=24)
    """What made none for longer is left alone too."""
    recovery_every: timedelta | None = None
    """How often it sweeps beside that; None for not at all."""
    recovery_dead_after: timedelta = timedelta(minutes=1)
    """A worker that gave no sign of life for this long has lost what it had."""
    valkey_budget: float = 30.0
    """Seconds for which counting a part is retried before the chord is left to recovery."""
    postgres_budget: float = 60.0
    """Seconds for which PostgreSQL may be away before a worker or a producer hears of it."""
    postgres_timeout: float | None = None
    """Seconds without an answer after which PostgreSQL counts as away; None for as long as the budget."""

    @property
    def patience(self) -> float:
        """``postgres_timeout``, or what stands for it: a budget may be too short for any statement."""
        return max(self.postgres_budget, LEAST_PATIENCE) if self.postgres_timeout is None else self.postgres_timeout

    @classmethod
    def of(cls, app: Celery, dsn: str | None = None) -> Config:
        """Read the configuration of ``app``.

        :param dsn: where PostgreSQL is, if not where ``app`` says.

        :raises ImproperlyConfigured: if PostgreSQL is configured nowhere, or a value is not one of those it may be.
        """
        config = cls(
            dsn or dsn_of(app),
            mode=_choice(app, "patchpilot_mode", Mode, cls.mode),
            counting=_choice(app, "patchpilot_counting", Counting, cls.counting),
            journal=_choice(app, "patchpilot_journal_messages", Journal, cls.journal),
            fence=_fence(app),
            strict=_read(app, "patchpilot_strict", _flag, cls.strict),
            prepared_statements=_read(app, "patchpilot_prepared_statements", _flag, cls.prepared_statements),
            claim_lease=_read(app, "patchpilot_claim_lease", _span, cls.claim_lease),
            fence_lease=_read(app, "patchpilot_fence_lease", _span, cls.fence_lease),
            retention=_read(app, "patchpilot_retention", _span, cls.retention),
            recovery_min_age=_read(app, "patchpilot_recovery_min_age", _span, cls.recovery_min_age),
            recovery_max_age=_read(app, "patchpilot_recovery_max_age", _span, cls.recovery_max_age),
            recovery_every=_read(app, "patchpilot_recovery_every", _span, None),
            recovery_dead_after=_read(app, "patchpilot_recovery_dead_after", _silence, cls.recovery_dead_after),
            valkey_budget=_read(app, "patchpilot_valkey_budget", _seconds, cls.valkey_budget),
            postgres_budget=_read(app, "patchpilot_postgres_budget", _seconds, cls.postgres_budget),
            postgres_timeout=_read(app, "patchpilot_postgres_timeout", _some_seconds, None),
        )
        if config.recovery_min_age >= config.recovery_max_age:
            raise ImproperlyConfigured(
                f"patchpilot_recovery_min_age ({config.recovery_min_age}) must be below patchpilot_recovery_max_age "
                f"({config.recovery_max_age}): nothing is between"
            )
        return config


def dsn_of(app: Celery) -> str:
    """The DSN from the setting ``patchpilot_database`` (a string, or a function that returns one) or the environment.

    The setting is masked on the way: ``app.conf.humanize()`` and ``celery report`` print every setting.

    :raises ImproperlyConfigured: if there is none, or libpq cannot read it.
    """
    configured = (app.conf.get(name) for name in DSN)
    dsn = next(filter(None, configured), None) or os.environ.get("PATCHPILOT_POSTGRES")
    hidden = isinstance(dsn, Masked)
    if isinstance(dsn, Masked):
        dsn = dsn.dsn
    if callable(dsn):
        dsn = dsn()
    if not dsn:
        raise ImproperlyConfigured(
            "the patchpilot backend needs PostgreSQL: set patchpilot_database (or patchpilot_postgres) in the Celery "
            "configuration, or PATCHPILOT_POSTGRES in the environment, to a libpq connection string"
        )
    if not is_readable(str(dsn)):
        raise ImproperlyConfigured(f"the DSN (patchpilot_database, PATCHPILOT_POSTGRES) {MALFORMED}")
    if not hidden:
        mask(app.conf, str(dsn))
    return str(dsn)


def _fence(app: Celery) -> FenceMode:
    """The fence's mode. Whoever asks Celery not to repeat what has succeeded asks for all of it."""
    mode = _choice(app, "patchpilot_fence", FenceMode, Config.fence)
    everything = mode is FenceMode.CALLBACKS and app.conf.worker_deduplicate_successful_tasks
    return FenceMode.ALL if everything else mode


def _choice(app: Celery, key: str, choices: type[E], default: E) -> E:
    value = app.conf.get(key)
    if value is None:
        return default
    if choices is Journal and isinstance(value, bool):
        value = Journal.REQUIRED if value else Journal.OFF
    try:
        return choices(value)
    except ValueError:
        raise ImproperlyConfigured(f"{key} is {value!r}; it may be {', '.join(choices)}") from None


def _read(app: Celery, key: str, parse: Callable[[Any], T], default: T) -> T:
    value = app.conf.get(key)
    if value is None:
        return default
    try:
        return parse(value)
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"{key} is {value!r}: {error}") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("it may be True or False")
    return value


def _seconds(value: Any) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 0:
        raise ValueError("it may not be negative")
    return seconds


def _some_seconds(value: Any) -> float:
    if not (seconds := _seconds(value)):
        raise ValueError("it has to be more than 0")
    return seconds


def _span(value: Any) -> timedelta:
    return timedelta(seconds=_seconds(value))


def _silence(value: Any) -> timedelta:
    return long_enough_to_be_dead(_span(value))
