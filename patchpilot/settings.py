"""Settings of the command line: flags over environment over a TOML file.

Unknown keys, bad durations and missing clusters are refused in one line that names the file and the key. Secrets are
``SecretStr``: printing a settings object never shows them.
"""

from __future__ import annotations

import os
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from patchpilot import environ
from patchpilot.dsn import readable_dsn, readable_endpoint
from patchpilot.durations import ago, as_duration, long_enough_to_be_dead, parse_duration
from patchpilot.errors import Usage
from patchpilot.kombu_options import ascending, installed
from patchpilot.legible import illegible

DEFAULT_FILE = Path("patchpilot.toml")
PREFIX = "PATCHPILOT_"


def _within(least: str, most: str) -> AfterValidator:
    """A duration from ``least`` to ``most``: outside is a slip, which would mean to wait for ever, or not at all."""

    def check(value: timedelta) -> timedelta:
        if not parse_duration(least) <= value <= parse_duration(most):
            raise ValueError(f"must be between {least} and {most}")
        return value

    return AfterValidator(check)


Duration = Annotated[timedelta, BeforeValidator(as_duration)]
Wait = Annotated[Duration, _within("1s", "14d")]
"""How long to wait for something; AWS keeps events for fourteen days, and what they tell is not known for longer."""

Filled = Annotated[str, Field(pattern=r"\S")]
Region = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")]

# https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/Statistics-definitions.html
_PERCENTAGE = r"(?:100(?:\.0+)?|\d{1,2}(?:\.\d{1,10})?)"
_STATISTIC = re.compile(
    rf"SampleCount|Average|Sum|Minimum|Maximum|IQM|(?:p|tm|tc|ts|wm){_PERCENTAGE}"
    rf"|(?:TM|TC|TS|WM)\((?:{_PERCENTAGE}%)?:(?:{_PERCENTAGE}%)?\)"
    r"|(?:PR|TM|TC|TS|WM)\((?:\d+(?:\.\d+)?)?:(?:\d+(?:\.\d+)?)?\)"
)

Role = Literal["broker", "cache", "volatile"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Postgres(_Section):
    """Where the durable record lives."""

    dsn: SecretStr | None = None


class Aws(_Section):
    """How to reach ElastiCache and CloudWatch. Everything unset is left to boto3's own rules."""

    region: Region | None = None
    profile: Filled | None = None
    endpoint_url: Filled | None = None
    """Of something that answers for both ElastiCache and CloudWatch, such as the lab."""
    credentials_file: Path | None = None
    metrics: bool = True
    """Whether pre-flight reads CloudWatch's metrics of the nodes. Alarms it always reads."""

    @field_validator("endpoint_url")
    @classmethod
    def _an_url(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "http://h")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("is no URL like https://elasticache.eu-central-1.amazonaws.com")
        return url


class Metric(_Section):
    """A CloudWatch metric past which a rotation is stopped."""

    namespace: str
    name: str
    dimensions: dict[str, str] = Field(default_factory=dict)
    statistic: str = "Average"
    """One of CloudWatch's: ``Sum``, ``p99.9``, ``TM(10%:90%)`` ..."""
    period: Duration = timedelta(minutes=1)
    points: int = Field(default=3, ge=1, le=60)
    """How many values in a row have to be past the limit: one alone may be a blip, and a failover is one."""
    above: float | None = Field(default=None, allow_inf_nan=False)
    below: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("set one of above and below")
        return self

    @field_validator("statistic")
    @classmethod
    def _a_statistic(cls, name: str) -> str:
        if not _STATISTIC.fullmatch(name):
            raise ValueError(
                f"{name!r} is no statistic of CloudWatch; write Average, Sum, Minimum, Maximum, SampleCount, or like "
                "p99 or TM(10%:90%)"
            )
        return name

    @field_validator("period")
    @classmethod
    def _a_period(cls, period: timedelta) -> timedelta:
        seconds = period.total_seconds()
        if seconds not in {1, 5, 10, 20, 30} and (seconds % 60 or not 60 <= seconds <= 86400):
            raise ValueError("is no period of CloudWatch: write 1s, 5s, 10s, 20s, 30s or whole minutes up to 24h")
        return period

    def is_past(self, value: float) -> bool:
        """Whether ``value`` is on the wrong side of the limit."""
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


class Runbook(_Section):
    """How the pilot waits, and when it stops a rotation."""

    grace: Annotated[Duration, _within("0s", "14d")] = timedelta(minutes=5)
    """How long after the last failover recovery waits, so that clients reconnect and Celery heals what it can."""
    poll_interval: Annotated[Duration, _within("100ms", "1h")] = timedelta(seconds=15)
    settle: Annotated[Duration, _within("1s", "24h")] = timedelta(minutes=1)
    """After an interrupted trigger: how long AWS may take to show the update as started before it counts as absent."""
    stall: Wait = timedelta(hours=2)
    """How long the whole rotation may take before the run stops and says so."""
    node_stall: Wait = timedelta(hours=1)
    """How long one node may take before the run stops and names it."""
    observe: Wait = timedelta(hours=4)
    """Operation ``observe``: how long to wait for something to begin."""
    quiet: Wait = timedelta(minutes=10)
    """Operation ``observe``: how long nothing may happen before what was no service update counts as over."""
    abort_stuck: int | None = Field(default=None, ge=0)
    """Stop the update when more chords than this are stuck during the rotation. Unset: never."""
    abort_metric: Metric | None = None
    """Stop the update when this metric is past its limit during the rotation. Unset: never."""
    verify_timeout: Wait = timedelta(minutes=5)
    time_budget: Wait | None = None
    """After this long, checkpoint and exit with "resume later". For schedulers that end a job themselves."""


class Recovery(_Section):
    """Which chords and messages recovery looks at."""

    min_age: Duration = timedelta(minutes=5)
    max_age: Duration = timedelta(hours=24)
    claim_lease: Annotated[Duration, _within("1s", "24h")] = timedelta(seconds=30)
    """How long a recovery may take to join one chord's results and publish its callback before another may."""
    dead_after: Annotated[Duration, AfterValidator(long_enough_to_be_dead), _within("1s", "24h")] = timedelta(minutes=1)
    """A worker that gave no sign of life for this long counts as dead, and what it had as lost. A machine that is
    frozen for longer than this and comes back may run again what was sent again meanwhile. One is due every 2 s."""

    @model_validator(mode="after")
    def _some_age(self) -> Self:
        if self.min_age >= self.max_age:
            raise ValueError(
                f"min_age {ago(self.min_age)} must be below max_age {ago(self.max_age)}: nothing is between"
            )
        return self


class Purge(_Section):
    """What `patchpilot db purge` leaves."""

    retention: Annotated[Duration, _within("1s", "3650d")] = timedelta(days=7)
    """How long chords and starts that are over stay on record. Longer than the broker's visibility timeout."""


class Celery(_Section):
    """What recovery must know of the Celery application; its routing and serialisers are recorded with each chord."""

    accept_content: Annotated[tuple[str, ...], AfterValidator(installed)] = ("json",)
    """Serialisers recovery may decode. Add "pickle" only if the application itself uses it."""
    result_accept_content: Annotated[tuple[str, ...], AfterValidator(installed)] = ()
    """The same of results, if the application sets ``result_accept_content``."""
    results: SecretStr | None = None
    """URL of the Valkey of the result backend, without "patchpilot+". Unset: it is the broker."""
    results_prefix: str = ""
    """``global_keyprefix`` of the result backend transport options, if the application sets one. Its keys are looked
    for under the names that the Celery installed here gives them; only 5.4 puts an underscore behind every prefix."""
    control_exchange: Filled = "celery"
    """``control_exchange`` of the application, if it sets one: over it its workers are asked what they have."""
    fanout_prefix: bool | str = True
    """``fanout_prefix`` of the broker transport options, if the application sets one."""
    sep: Annotated[str, Field(min_length=1)] = "\x06\x16"
    """``sep`` of the broker transport options, if the application sets one."""
    priority_steps: Annotated[tuple[int, ...], AfterValidator(ascending)] | None = None
    """``priority_steps`` of the broker transport options, if the application sets some."""
    unacked_key: Filled = "unacked"
    """``unacked_key`` of the broker transport options, if the application sets one."""
    unacked_index_key: Filled = "unacked_index"
    """``unacked_index_key`` of the broker transport options, if the application sets one."""
    result_serializer: str = ""
    """``result_serializer`` of the application. Only for chords that are adopted before any of their parts returned."""

    @field_validator("fanout_prefix")
    @classmethod
    def _a_switch(cls, value: bool | str) -> bool | str:
        # From the environment everything is text.
        return {"true": True, "false": False}.get(str(value).lower(), value)


class Cluster(_Section):
    """One ElastiCache replication group."""

    replication_group: str = Field(min_length=1, max_length=40, pattern=r"^[A-Za-z][A-Za-z0-9-]*$")
    role: Role
    endpoint: SecretStr | None = None
    """URL of the primary endpoint: ``redis://`` or ``rediss://``, with the database number. Needed for a broker."""
    key_prefix: str = ""
    """``global_keyprefix`` of the broker transport options, if the application sets one."""
    broker_name: str | None = None
    """``patchpilot_broker`` of the application, if it sets one."""
    region: Region | None = None


class Settings(BaseSettings):
    """Everything a command needs to know."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    environment: Filled = "default"
    reports: Path = Path("reports")
    postgres: Postgres = Postgres()
    aws: Aws = Aws()
    runbook: Runbook = Runbook()
    recovery: Recovery = Recovery()
    purge: Purge = Purge()
    celery: Celery = Celery()
    clusters: dict[str, Cluster] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _legible(cls, values: dict[str, Any]) -> dict[str, Any]:
        if key := illegible(values):
            raise ValueError(f"{key}: has a character in it that nobody can see (a control character): write it anew")
        return values

    @model_validator(mode="after")
    def _grace_leaves_something(self) -> Self:
        _refuse_too_long(self.runbook.grace, self.recovery.max_age)
        return self

    def with_grace(self, grace: timedelta) -> Self:
        """These settings with another ``runbook.grace``.

        :raises Usage: it cannot be so long.
        """
        try:
            runbook = Runbook.model_validate({**dict(self.runbook), "grace": grace})
            _refuse_too_long(grace, self.recovery.max_age)
        except ValidationError as error:
            raise Usage(f"--{_first(error)}") from None
        except ValueError as error:
            raise Usage(f"--grace: {error}") from None
        return self.model_copy(update={"runbook": runbook})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file's values arrive as init arguments, so the environment has to come first.
        return env_settings, init_settings

    def cluster(self, name: str) -> Cluster:
        """The cluster called ``name``.

        :raises Usage: if there is none; the message lists those there are.
        """
        try:
            return self.clusters[name]
        except KeyError:
            known = ", ".join(sorted(self.clusters)) or "none"
            raise Usage(f"there is no cluster {name!r} in the configuration (known: {known})") from None

    def postgres_dsn(self) -> str:
        """The DSN of the durable record.

        :raises Usage: if it is set nowhere.
        """
        if self.postgres.dsn is None or not self.postgres.dsn.get_secret_value():
            raise Usage("no PostgreSQL DSN: set postgres.dsn in the configuration file or PATCHPILOT_POSTGRES")
        return readable_dsn(self.postgres.dsn.get_secret_value())

    def endpoint(self, name: str) -> str:
        """The URL of the primary endpoint of the cluster called ``name``.

        :raises Usage: if it is set nowhere.
        """
        secret = self.cluster(name).endpoint
        if secret is None or not secret.get_secret_value():
            raise Usage(
                f"cluster {name!r} has no endpoint: set clusters.{name}.endpoint in the configuration file "
                f"or PATCHPILOT_CLUSTERS__{name.upper()}__ENDPOINT"
            )
        return readable_endpoint(secret.get_secret_value(), f"clusters.{name}.endpoint")

    def results_endpoint(self) -> str:
        """The URL of the Valkey of the application's result backend; empty if that is the broker.

        :raises Usage: if it is malformed.
        """
        url = self.celery.results.get_secret_value() if self.celery.results else ""
        return readable_endpoint(url, "celery.results") if url else ""


def _refuse_too_long(grace: timedelta, max_age: timedelta) -> None:
    if grace >= max_age:
        raise ValueError(
            f"runbook.grace {ago(grace)} must be below recovery.max_age {ago(max_age)}: what a failover lost would be "
            "too old for recovery when the grace ends"
        )


def load(path: Path | None = None) -> Settings:
    """Read the settings.

    :param path: the TOML file. Without it ``patchpilot.toml`` in the working directory is read if it is there.
    :raises Usage: for an unreadable or malformed file, an unknown key or a bad value, in one line.
    """
    source = path or (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
    values = _read(source) if source else {}
    # PATCHPILOT_POSTGRES is the name that workers use as well; here it means postgres.dsn.
    dsn = os.environ.get("PATCHPILOT_POSTGRES")
    try:
        with environ.without("PATCHPILOT_POSTGRES"):
            environ.refuse_unknown(PREFIX, Settings.model_fields)
            if dsn:
                values = {**values, "postgres": {**_table(values, "postgres"), "dsn": dsn}}
            return Settings(**values)
    except SettingsError as error:
        raise Usage(environ.unreadable(PREFIX, error)) from None
    except ValidationError as error:
        where = environ.source(PREFIX, error.errors()[0]["loc"])
        raise Usage(f"{where or source or 'configuration'}: {_first(error)}") from None


def _table(values: dict[str, Any], key: str) -> dict[str, Any]:
    table = values.get(key, {})
    return table if isinstance(table, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Usage(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise Usage(f"{path}: not valid TOML: {error}") from None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; see config/patchpilot.example.toml for those there are"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
