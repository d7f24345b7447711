"""A Celery application that can publish for another one, without its code.

It has the broker, the result backend and the serialisers of the application it stands in for. Where a task's messages
go was recorded with each chord by the application itself.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlencode, urlsplit, urlunsplit

from celery import Celery, _state

from patchpilot.backend.backend import Backend
from patchpilot.backend.config import BROKER, Config
from patchpilot.backend.install import TRANSPORT
from patchpilot.backend.routes import as_recorded
from patchpilot.errors import NeedsOperator
from patchpilot.postgres.connection import PATIENCE
from patchpilot.valkey.broker import SEPARATOR, UNACKED

_UNACKED_OPTIONS = ("unacked_key", "unacked_index_key")

_PUBLISH_RETRIES = {"max_retries": 10, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 2.0}


@dataclass(frozen=True)
class Site:
    """Where the application's broker and durable record are, and what may be decoded."""

    endpoint: str
    """URL of the primary endpoint, with the database number."""
    dsn: str
    key_prefix: str = ""
    accept_content: tuple[str, ...] = ("json",)
    result_accept_content: tuple[str, ...] = ()
    """In results, if that is something else."""
    claim_lease: timedelta = timedelta(seconds=30)
    results: str = ""
    """URL of the Valkey of the application's result backend, if that is another one."""
    results_prefix: str = ""
    """The ``global_keyprefix`` of its result backend transport options."""
    dead_after: timedelta = Config.recovery_dead_after
    """A worker that gave no sign of life for this long counts as dead, and what it had as lost."""
    control_exchange: str = "celery"
    """Over which its workers are asked."""
    fanout_prefix: bool | str = True
    """Of its broker transport options."""
    broker: str | None = None
    """What the application calls its broker in the record (``patchpilot_broker``), if not by its address."""
    result_serializer: str = ""
    """Of the application, if it is known. Otherwise that of a chord is on record."""
    sep: str = SEPARATOR
    """Of its broker transport options, as the next."""
    priority_steps: tuple[int, ...] = ()
    """Kombu's own, if there are none."""
    unacked: tuple[str, str] = UNACKED
    """``unacked_key`` and ``unacked_index_key`` of the options."""

    @property
    def in_results(self) -> tuple[str, ...]:
        """What may be decoded of results."""
        return self.result_accept_content or self.accept_content


def application(site: Site, serializer: str = "json") -> Celery:
    """The stand-in for applications whose result serialiser is ``serializer``."""
    app = Celery("patchpilot-recovery", set_as_current=False)
    endpoint = _verified(site.endpoint)
    options: dict[str, Any] = {"global_keyprefix": site.key_prefix} if site.key_prefix else {}
    if site.fanout_prefix is not True:
        options["fanout_prefix"] = site.fanout_prefix
    if site.sep != SEPARATOR:
        options["sep"] = site.sep
    if site.priority_steps:
        options["priority_steps"] = list(site.priority_steps)
    if site.unacked != UNACKED:
        options |= dict(zip(_UNACKED_OPTIONS, site.unacked, strict=True))
    app.conf.update(
        broker_url=endpoint,
        broker_transport=TRANSPORT,
        result_backend=f"patchpilot+{_verified(site.results) if site.results else endpoint}",
        result_backend_transport_options={"global_keyprefix": site.results_prefix} if site.results_prefix else {},
        patchpilot_postgres=site.dsn,
        patchpilot_claim_lease=site.claim_lease,
        patchpilot_postgres_budget=10.0,
        patchpilot_postgres_timeout=PATIENCE,
        patchpilot_valkey_budget=10.0,
        accept_content=list(site.accept_content),
        result_accept_content=list(site.in_results),
        result_serializer=serializer,
        task_routes=(as_recorded,),
        task_publish_retry_policy=_PUBLISH_RETRIES,
        broker_transport_options=options,
        control_exchange=site.control_exchange,
        patchpilot_broker=site.broker,
        patchpilot_fence="off",  # it runs no tasks, and what watches over them would keep it alive for ever
    )
    return app


def site_of(app: Celery, dsn: str | None = None) -> Site:
    """The site of an application that is at hand, from its own configuration.

    :param dsn: where PostgreSQL is, if not where ``app`` says.

    :raises ImproperlyConfigured: PostgreSQL is configured nowhere, or a setting is wrong.
    :raises NeedsOperator: its broker is no Redis.
    """
    conf, config = app.conf, Config.of(app, dsn)
    url = conf.broker_read_url
    url = str((url[0] if isinstance(url, list | tuple) else url) or "").split(";", maxsplit=1)[0]
    if not url.startswith(("redis://", "rediss://")):
        raise NeedsOperator("the application's broker is no redis:// or rediss:// URL: there is nothing to recover")
    options = conf.broker_transport_options or {}
    return Site(
        endpoint=_encrypted(url, conf.broker_use_ssl),
        dsn=config.dsn,
        key_prefix=options.get("global_keyprefix") or "",
        accept_content=tuple(conf.accept_content),
        result_accept_content=tuple(conf.result_accept_content or ()),
        claim_lease=config.claim_lease,
        results=_results(conf),
        results_prefix=(conf.result_backend_transport_options or {}).get("global_keyprefix") or "",
        control_exchange=conf.control_exchange,
        fanout_prefix=options.get("fanout_prefix", True),
        broker=conf.get(BROKER),
        sep=options.get("sep") or SEPARATOR,
        result_serializer=conf.result_serializer,
        priority_steps=tuple(options.get("priority_steps") or ()),
        unacked=_unacked(options),
    )


def _results(conf: Any) -> str:
    """The URL of the Valkey of the result backend; empty if it is none, and chords have no keys but the broker's."""
    url = str(conf.result_backend or "").removeprefix("patchpilot+")
    return _encrypted(url, conf.redis_backend_use_ssl) if url.startswith(("redis://", "rediss://")) else ""


def _unacked(options: Mapping[str, Any]) -> tuple[str, str]:
    key, index = (options.get(name) or usual for name, usual in zip(_UNACKED_OPTIONS, UNACKED, strict=True))
    return key, index


def _encrypted(url: str, options: Any) -> str:
    """``url`` with what ``broker_use_ssl`` or ``redis_backend_use_ssl`` says, as redis-py reads it."""
    url = re.sub(r"(?<=ssl_cert_reqs=)CERT_(\w+)", lambda it: it[1].lower(), url)
    if not options:
        return url
    said = options if isinstance(options, Mapping) else {}
    given = {key: value for key, value in said.items() if value not in (None, "")}  # CERT_NONE and False say something
    names = {ssl.CERT_NONE: "none", ssl.CERT_OPTIONAL: "optional", ssl.CERT_REQUIRED: "required"}
    query = urlencode(
        {key: value if isinstance(value, bool) else names.get(value, value) for key, value in given.items()}
    )
    parts = urlsplit(url)
    return urlunsplit(parts._replace(scheme="rediss", query="&".join(filter(None, (parts.query, query)))))


def _verified(endpoint: str) -> str:
    """The endpoint with the check of its certificate spelled out: Celery refuses to guess, kombu would make none."""
    parts = urlsplit(endpoint)
    if parts.scheme != "rediss" or "ssl_cert_reqs=" in parts.query:
        return endpoint
    return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, "ssl_cert_reqs=required")))))


@contextmanager
def standing_in(app: Celery) -> Iterator[None]:
    """Inside, ``app`` is the current application: signatures within a callback that belong to no application use it."""
    before = getattr(_state._tls, "current_app", None)
    app.set_current()
    try:
        yield
    finally:
        _state._set_current_app(before)


def backend_of(app: Celery) -> Backend:
    """The application's result backend, which is ours."""
    return cast("Backend", app.backend)
