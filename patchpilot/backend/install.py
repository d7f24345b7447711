"""What :func:`patchpilot.install` does to a Celery application. Whatever the user has set stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery

from patchpilot.backend import sockets
from patchpilot.backend.config import mask
from patchpilot.backend.versions import check_celery

TRANSPORT = "patchpilot.transport:Transport"

LISTENING = "patchpilot.backend.children:Listening"

RECOVERING = "patchpilot.recovery.step:Recovering"
"""By name: it is above this package, and only a worker that is asked to recover has to load it."""

BROKER: Mapping[str, Any] = {
    "broker_transport": TRANSPORT,
    # About a minute of refused connections; where an attempt itself takes time, longer.
    "task_publish_retry_policy": {"max_retries": 60, "interval_start": 0.05, "interval_step": 0.1, "interval_max": 1.0},
    # Caps a producer's first connection, whatever its retry policy says. Celery's own backend multiplies the two into
    # how long it takes a chord for claimed, which has to stay below the usual visibility timeout of an hour.
    "broker_connection_timeout": 50.0,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
}
"""Settings of an application whose broker is Valkey or Redis."""

RESULTS: Mapping[str, Any] = {
    "redis_socket_timeout": sockets.SOCKET_TIMEOUT,
    "redis_socket_connect_timeout": sockets.CONNECT_TIMEOUT,
    "redis_socket_keepalive": True,
    "redis_retry_on_timeout": True,
    "redis_backend_health_check_interval": sockets.HEALTH_CHECK_INTERVAL,
}
"""Settings of an application whose results go through our backend."""

_UNSET = object()


def install(app: Celery, *, recover: bool = False) -> None:
    """Set ``app`` up now if it is configured, and whenever its configuration is loaded.

    :raises ImproperlyConfigured: under a Celery that is not supported.
    """
    check_celery()

    def complete(**_: Any) -> None:
        mask(app.conf)
        if _is_redis(app.conf.broker_read_url) and _is_redis(app.conf.broker_write_url):
            set_unless_set(app.conf, BROKER)

    # The second is for what was set after the first.
    app.on_after_configure.connect(complete, weak=False)
    app.on_after_finalize.connect(complete, weak=False)
    if app.configured:
        complete()
    app.steps["consumer"].add(LISTENING)
    if recover:
        app.steps["consumer"].add(RECOVERING)
    _load_backend_first(app)


def _load_backend_first(app: Celery) -> None:
    """Have the backend loaded before the first message is published, also if that ignores its result: the outbox comes
    with it."""
    acquire = app.producer_or_acquire

    def producer_or_acquire(producer: Any = None) -> Any:
        if app.producer_or_acquire is not producer_or_acquire:  # the backend is loaded, and stands in front of this
            return acquire(producer)
        app.producer_or_acquire = acquire
        if str(app.conf.result_backend or "").startswith("patchpilot+"):
            _ = app.backend
        return app.producer_or_acquire(producer)

    app.producer_or_acquire = producer_or_acquire


def set_unless_set(conf: Any, settings: Mapping[str, Any]) -> None:
    """Set those of ``settings`` in a Celery configuration that the user has not set, by whatever of their names."""
    users = type(conf)({}, conf.maps[:-1], conf._keys, conf.prefix)  # the last one is Celery's defaults
    for key, value in settings.items():
        if users.get(key, _UNSET) is _UNSET:
            conf[key] = value


def _is_redis(url: str | None) -> bool:
    return (url or "").startswith(("redis://", "rediss://"))
