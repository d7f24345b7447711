"""What the transport and `patchpilot.install` set, and what they leave to the user."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

import patchpilot
from patchpilot.backend.config import DSN, dsn_of
from patchpilot.backend.install import BROKER
from patchpilot.backend.transport import DEFAULTS, with_defaults
from patchpilot.transport import Transport

OURS = "patchpilot.transport:Transport"
BROKER_URL = "redis://127.0.0.1:1/0"
SECRET = "postgresql://u:hunter2@127.0.0.1:1/x"

pytestmark = pytest.mark.backend


def make(**options: Any) -> Celery:
    return Celery("somebody", set_as_current=False, **options)


@pytest.mark.parametrize(
    "users", [{}, {"socket_timeout": 3}, {"socket_timeout": None, "health_check_interval": 60, "priority_steps": [0]}]
)
def test_what_the_user_says_about_the_transport_stands(users: dict[str, Any]) -> None:
    given = dict(users)
    completed = with_defaults(users)
    assert {key: completed[key] for key in users} == users == given
    assert {key: value for key, value in completed.items() if key not in users} == {
        key: value for key, value in DEFAULTS.items() if key not in users
    }


@pytest.mark.parametrize(
    "url",
    [
        "redis://h", "redis://h:1234/3", "redis://u:hunter2@h:1234/3", "redis://:hunter2@h/1",
        "rediss://h:1/0?ssl_cert_reqs=required", "rediss://u:hunter2@h:1/0?ssl_cert_reqs=required&ssl_ca_certs=/ca",
        "redis://a:1/0;redis://b:2/1",
    ],
)  # fmt: skip
def test_a_url_means_what_it_means_to_kombu(url: str) -> None:
    ours, kombus = Connection(url, transport=OURS), Connection(url)
    for _ in range(2):
        assert type(ours.transport) is Transport
        assert told(ours) == told(kombus) == told(ours.clone())
        assert "hunter2" not in ours.as_uri() + repr(ours)
        assert ours.as_uri().partition("://")[0] == url.partition("://")[0]
        ours.maybe_switch_next()
        kombus.maybe_switch_next()


def told(connection: Connection) -> dict[str, Any]:
    return {key: value for key, value in connection.info().items() if key not in ("transport", "transport_options")}


def test_rediss_without_options_speaks_tls_as_with_kombu(caplog: pytest.LogCaptureFixture) -> None:
    assert told(Connection("rediss://h:1/0", transport=OURS)) == told(Connection("rediss://h:1/0"))
    assert Connection("rediss://h:1/0", transport=OURS).transport.client.ssl
    assert "insecure" in caplog.text


def before(app: Celery, settings: dict[str, Any]) -> None:
    app.conf.update(settings)
    patchpilot.install(app)


def after(app: Celery, settings: dict[str, Any]) -> None:
    patchpilot.install(app)
    app.conf.update(settings)


def after_it_was_read(app: Celery, settings: dict[str, Any]) -> None:
    patchpilot.install(app)
    assert app.conf.task_serializer
    app.conf.update(settings)
    app.finalize()


def from_an_object(app: Celery, settings: dict[str, Any]) -> None:
    patchpilot.install(app)
    app.config_from_object(type("settings", (), settings))


def from_django(app: Celery, settings: dict[str, Any]) -> None:
    patchpilot.install(app)
    named = {f"CELERY_{key.upper()}": value for key, value in settings.items()}
    app.config_from_object(type("settings", (), named), namespace="CELERY")


def by_old_names(app: Celery, settings: dict[str, Any]) -> None:
    old = {"task_publish_retry_policy": "CELERY_TASK_PUBLISH_RETRY_POLICY", **{name: name for name in DSN}}
    app.config_from_object(type("settings", (), {old.get(key, key.upper()): value for key, value in settings.items()}))
    patchpilot.install(app)


WAYS = [before, after, after_it_was_read, from_an_object, from_django, by_old_names]


@pytest.mark.parametrize("configure", WAYS)
def test_install_completes_what_the_user_has_not_set(configure: Callable[[Celery, dict[str, Any]], None]) -> None:
    app = make()
    configure(app, {"broker_url": BROKER_URL})
    assert {key: app.conf[key] for key in BROKER} == dict(BROKER)
    assert type(app.connection_for_write().transport) is Transport


@pytest.mark.parametrize("configure", WAYS)
def test_install_leaves_what_the_user_has_set(configure: Callable[[Celery, dict[str, Any]], None]) -> None:
    app = make()
    users: dict[str, Any] = {
        "broker_url": BROKER_URL, "broker_transport": "redis", "task_publish_retry_policy": {"max_retries": 1},
        "broker_connection_max_retries": 7,
    }  # fmt: skip
    configure(app, users)
    assert {key: app.conf[key] for key in users} == users
    assert app.conf.broker_connection_retry_on_startup is True


@pytest.mark.parametrize("name", DSN)
@pytest.mark.parametrize("configure", WAYS)
def test_install_hides_the_dsn_at_once(configure: Callable[[Celery, dict[str, Any]], None], name: str) -> None:
    app = make()
    configure(app, {"broker_url": BROKER_URL, name: SECRET})
    for shown in (app.conf.humanize(), app.conf.humanize(with_defaults=True), repr(app.conf.table(censored=False))):
        assert "hunter2" not in shown
    assert app.conf.get(name).dsn == dsn_of(app) == SECRET


def test_what_a_function_was_given_is_hidden_too() -> None:
    app = make()
    after(app, {"broker_url": BROKER_URL, "patchpilot_postgres": partial(str, SECRET)})
    assert "hunter2" not in app.conf.humanize() + repr(app.conf.table(censored=False))
    assert dsn_of(app) == SECRET
    assert "hunter2" not in app.conf.humanize() + repr(app.conf.table(censored=False))


def test_the_dsn_is_hidden_where_nothing_of_ours_is_loaded() -> None:
    script = f"""
import celery, sys
app = celery.Celery("user", broker="{BROKER_URL}", backend="patchpilot+{BROKER_URL}")
app.conf.patchpilot_database = "{SECRET}"
print(app.conf.humanize(), app.bugreport(), app.conf.table())
assert not any(name.startswith("patchpilot") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "patchpilot_database" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_a_dsn_that_is_fetched_is_not_fetched_by_install() -> None:
    app = make(broker=BROKER_URL)
    app.conf.patchpilot_postgres = lambda: pytest.fail("asked for")
    patchpilot.install(app)
    assert app.conf.broker_transport == OURS


@pytest.mark.parametrize("broker", ["amqp://127.0.0.1:1//", "sentinel://127.0.0.1:1/0", "memory://"])
def test_another_broker_keeps_its_transport(broker: str) -> None:
    app = make(broker=broker)
    patchpilot.install(app)
    assert app.conf.broker_transport is None
    assert app.conf.task_publish_retry_policy["max_retries"] == 3


def test_the_backend_has_timeouts_that_the_user_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHPILOT_POSTGRES", SECRET)
    url = "patchpilot+redis://127.0.0.1:1/0"
    plain = make(backend=url).backend.client.connection_pool.make_connection()
    assert (plain.socket_timeout, plain.socket_connect_timeout, plain.health_check_interval) == (10, 5, 5)
    assert plain.socket_keepalive
    assert plain.socket_keepalive_options
    assert plain.retry_on_timeout

    app = make(backend=f"{url}?socket_connect_timeout=2")
    app.conf.redis_socket_timeout = 30
    users = app.backend.client.connection_pool.make_connection()
    assert (users.socket_timeout, users.socket_connect_timeout, users.health_check_interval) == (30, 2, 5)
