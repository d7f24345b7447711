"""A Celery application that can publish for another one, without its code.

It has the broker, the result backend and the serialisers of the application it stands in for. Where a task's messages
go was recorded with each chord by the application itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast
from urllib.parse import urlsplit, urlunsplit

from celery import Celery, _state

from patchpilot.backend.backend import Backend
from patchpilot.backend.heartbeat import STALE
from patchpilot.backend.install import TRANSPORT
from patchpilot.backend.routes import as_recorded

_PUBLISH_RETRIES = {"max_retries": 10, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 2.0}


@dataclass(frozen=True)
class Site:
    """Where the application's broker and durable record are, and what may be decoded."""

    endpoint: str
    """URL of the primary endpoint, with the database number."""
    dsn: str
    key_prefix: str = ""
    accept_content: tuple[str, ...] = ("json",)
    claim_lease: timedelta = timedelta(seconds=30)
    results: str = ""
    """URL of the Valkey of the application's result backend, if that is another one."""
    results_prefix: str = ""
    """The ``global_keyprefix`` of its result backend transport options."""
    dead_after: timedelta = STALE
    """A worker that gave no sign of life for this long counts as dead, and what it had as lost."""


def application(site: Site, serializer: str = "json") -> Celery:
    """The stand-in for applications whose result serialiser is ``serializer``."""
    app = Celery("patchpilot-recovery", set_as_current=False)
    endpoint = _verified(site.endpoint)
    options = {"global_keyprefix": site.key_prefix} if site.key_prefix else {}
    app.conf.update(
        broker_url=endpoint,
        broker_transport=TRANSPORT,
        result_backend=f"patchpilot+{_verified(site.results) if site.results else endpoint}",
        result_backend_transport_options={"global_keyprefix": site.results_prefix} if site.results_prefix else {},
        patchpilot_postgres=site.dsn,
        patchpilot_claim_lease=site.claim_lease,
        patchpilot_postgres_budget=10.0,
        patchpilot_valkey_budget=10.0,
        accept_content=list(site.accept_content),
        result_accept_content=list(site.accept_content),
        result_serializer=serializer,
        task_routes=(as_recorded,),
        task_publish_retry_policy=_PUBLISH_RETRIES,
        broker_transport_options=options,
    )
    return app


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
