"""The application that recovery publishes with."""

from __future__ import annotations

import ssl

import pytest
import redis
from celery import Celery

from patchpilot.backend.config import Config
from patchpilot.cli.at_hand import NAME, _of_application
from patchpilot.cli.recover import site
from patchpilot.settings import Settings
from patchpilot.transport import Transport
from patchpilot.workers.application import Site, application, backend_of, site_of


@pytest.mark.parametrize(
    ("query", "check"),
    [
        ("", ssl.CERT_REQUIRED), ("?ssl_cert_reqs=none", ssl.CERT_NONE),
        ("?ssl_ca_certs=/ca.pem", ssl.CERT_REQUIRED),
    ],
)  # fmt: skip
def test_a_tls_endpoint_is_checked_unless_it_says_otherwise(query: str, check: ssl.VerifyMode) -> None:
    app = application(Site(f"rediss://:token@127.0.0.1:1/2{query}", "postgresql://127.0.0.1:1/x"))
    params = backend_of(app).connparams
    assert issubclass(params["connection_class"], redis.SSLConnection)
    assert (params["ssl_cert_reqs"], params["password"], params["db"]) == (check, "token", 2)
    with app.connection_for_write() as broker:
        assert type(broker.transport) is Transport
        assert broker.ssl["ssl_cert_reqs"] == check


def test_workers_are_asked_where_the_site_says() -> None:
    app = application(
        Site("redis://127.0.0.1:1/2", "postgresql://127.0.0.1:1/x", control_exchange="mine", fanout_prefix=False)
    )
    with app.connection_for_write() as broker:
        assert broker.transport_options["fanout_prefix"] is False
    assert app.control.mailbox.namespace == "mine"


def test_the_command_of_an_application_asks_as_the_application_does() -> None:
    app = Celery("at-hand", broker="redis://h:1/2", set_as_current=False)
    app.conf.update(
        patchpilot_postgres="postgresql://h/x", control_exchange="mine", result_serializer="pickle",
        broker_transport_options={
            "fanout_prefix": False, "sep": ":", "priority_steps": [0, 5], "unacked_key": "taken",
        },
    )  # fmt: skip
    settings = _of_application(Settings(), site_of(app), Config.of(app))
    found = site(settings, NAME)
    assert (found.control_exchange, found.fanout_prefix) == ("mine", False)
    assert found.result_serializer == "pickle"
    assert (found.sep, found.priority_steps) == (":", (0, 5))
    assert found.unacked == ("taken", "unacked_index")


def test_a_plain_endpoint_stays_as_it_is() -> None:
    app = application(Site("redis://127.0.0.1:1/2", "postgresql://127.0.0.1:1/x", key_prefix="shop:"))
    with app.connection_for_write() as broker:
        assert type(broker.transport) is Transport
        assert not broker.ssl
        assert broker.transport_options["global_keyprefix"] == "shop:"
