"""What a broker is called, whoever asks."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from patchpilot.backend.identity import Identity
from patchpilot.backend.install import TRANSPORT
from patchpilot.broker_name import name_of_url
from patchpilot.valkey.broker import Broker


@pytest.mark.parametrize(
    ("url", "prefix", "name"),
    [
        ("redis://h/0", "", "h:6379/0"),
        ("redis://h", "", "h:6379/0"),
        ("rediss://user:hunter2@Master.Prod.:6380/3?ssl_cert_reqs=required", "", "master.prod:6380/3"),
        ("redis://127.0.0.1:1/0", "", "localhost:1/0"),
        ("redis://[::1]:1/0", "shop:", "localhost:1/0#shop:"),
        ("redis://a/1;redis://b/1", "", "a:6379/1"),
        ("amqp://h//", "", None),
        ("", "", None),
    ],
)
def test_a_name_is_the_address_without_its_secret(url: str, prefix: str, name: str | None) -> None:
    assert name_of_url(url, prefix) == name


def application(url: str, **settings: Any) -> Celery:
    app = Celery("named", broker=url, set_as_current=False)
    app.conf.update(broker_transport_options={"global_keyprefix": "shop:"}, **settings)
    return app


@pytest.mark.parametrize("transport", [None, TRANSPORT])
def test_application_connection_and_recovery_agree(transport: str | None) -> None:
    url = "redis://:hunter2@Localhost:7/2"
    app = application(url, **({"broker_transport": transport} if transport else {}))
    identity = Identity(app)
    with app.connection_for_write() as connection:
        assert identity.of(connection) == identity.home == "localhost:7/2#shop:"
    assert Broker(url, "shop:")._own == {identity.home}


def test_a_given_name_is_that_of_the_application_s_own_broker_alone() -> None:
    app = application("redis://localhost:7/2", patchpilot_broker="orders")
    identity = Identity(app)
    assert identity.home == "orders"
    with app.connection_for_write() as own, app.connection_for_write("redis://elsewhere:7/2") as other:
        assert identity.of(own) == "orders"
        assert identity.of(other) == "elsewhere:7/2#shop:"


def test_what_is_no_redis_has_no_name() -> None:
    app = application("memory://", patchpilot_broker="orders")
    with app.connection_for_write() as connection:
        assert (Identity(app).home, Identity(app).of(connection)) == (None, None)
