"""The application that recovery publishes with."""

from __future__ import annotations

import ssl

import pytest
import redis

from patchpilot.transport import Transport
from patchpilot.workers.application import Site, application, backend_of


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


def test_a_plain_endpoint_stays_as_it_is() -> None:
    app = application(Site("redis://127.0.0.1:1/2", "postgresql://127.0.0.1:1/x", key_prefix="shop:"))
    with app.connection_for_write() as broker:
        assert type(broker.transport) is Transport
        assert not broker.ssl
        assert broker.transport_options["global_keyprefix"] == "shop:"
