"""A DSN that libpq cannot read, or reads as something else, is refused without being quoted."""

from __future__ import annotations

import logging
import socketserver
import traceback
from collections.abc import Callable

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from patchpilot.dsn import is_readable, mask, masked, refusal
from patchpilot.errors import NeedsOperator, PatchpilotError
from patchpilot.postgres.connection import Database

MALFORMED = [
    "postgresql://u:hunter2@tail@h/db",
    "postgresql://u:12/hunter2@h/db",
    "postgresql://u:hunter2/tail@h/db",
    "postgresql://u:hunter2%tail@h/db",
    "postgresql+psycopg://u:hunter2@h/db",
    "host=h password=a hunter2",
]
GOOD = [
    "postgresql://u:hunter2@h/db",
    "postgresql://u:hunter2%40tail@h1:1,h2:2/db",
    "postgresql://u:hunter2#:?tail@[::1]:5432/db?sslmode=require",
    "postgresql:///db?host=/tmp",
    "host=h port=1 password='hunter 2@'",
    "postgresql://u:hunter2@h/db?connect_timeout=1.5&keepalives=1&keepalives_idle=30&tcp_user_timeout=9000",
    "host=h connect_timeout='' keepalives=",
    "service=db",
]

pytestmark = pytest.mark.backend


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def application(dsn: str | Callable[[], str] | None) -> Celery:
    app = Celery(
        "dsn", broker="redis://127.0.0.1:1/0", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False
    )
    app.conf.patchpilot_postgres = dsn
    return app


@pytest.mark.parametrize("dsn", MALFORMED)
def test_a_malformed_dsn_is_not_quoted(dsn: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="percent-encoded") as of_the_backend:
        _ = application(dsn).backend
    with Database(dsn, budget=0) as database, pytest.raises(NeedsOperator, match="percent-encoded") as of_the_database:
        database.fetch("SELECT 1")
    for refused in (of_the_backend, of_the_database):
        assert len(str(refused.value).splitlines()) == 1
        assert not any(word in said(refused.value) for word in ("hunter2", "tail"))


@pytest.mark.parametrize("dsn", GOOD)
def test_a_dsn_that_libpq_reads_is_taken(dsn: str) -> None:
    assert is_readable(dsn)


@pytest.mark.parametrize("dsn", GOOD[:-1])
def test_libpq_would_try_it(dsn: str) -> None:
    assert refusal(dsn) == ""


@pytest.mark.parametrize("option", ["sslmode=nonsense", "keepalives=often"])
def test_what_libpq_does_not_take_is_not_tried_again(option: str) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        dsn = f"host=127.0.0.1 port={server.server_address[1]} {option}"
        with Database(dsn, budget=600) as database, pytest.raises(NeedsOperator, match="invalid"):
            database.fetch("SELECT 1")


@pytest.mark.parametrize("dsn", ["postgresql://u:hunter2@127.0.0.1:1/db", "postgresql://u:hunter2@nowhere.invalid/db"])
def test_a_connection_that_fails_says_nothing_of_the_password(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Database(dsn, budget=0) as database, pytest.raises(PatchpilotError) as failed:
        database.fetch("SELECT 1")
    assert "hunter2" not in said(failed.value) + caplog.text + repr(database)
    assert "PostgreSQL is away" in caplog.text


def test_the_dsn_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHPILOT_POSTGRES", GOOD[0])
    app = application(None)
    assert app.backend.config.dsn == GOOD[0]
    assert "hunter2" not in app.conf.humanize() + app.bugreport()


def test_the_dsn_may_come_from_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is asked once: a secrets manager may take its time, and money."""
    asked: list[str] = []

    def secret() -> str:
        asked.append("asked")
        return GOOD[0]

    app = application(secret)
    assert "hunter2" not in app.conf.humanize() + app.bugreport()
    assert asked == []
    assert app.backend.config.dsn == GOOD[0]
    assert type(app.backend)(app=app, url="redis://127.0.0.1:1/0").config.dsn == GOOD[0]
    assert "hunter2" not in app.conf.humanize() + app.bugreport() + repr(app.conf) + repr(app.backend)
    assert asked == ["asked"]


@pytest.mark.parametrize(
    "text",
    [
        "rediss://h:6379/0?ssl_password=hunter2&ssl_keyfile=/k",
        "rediss://h:6379/0?ssl_cert_reqs=none&password=hunter2",
        "rediss://h:6379/0?ssl%5Fpassword=hunter2",
        "redis://:hunter2@h/0",
        "redis://u:a/hunter2@h/0 and postgresql://u:b@hunter2@h/db",
        "postgresql://h/db?sslpassword=hunter2&passfile=/p",
        "postgresql://h/db?oauth_client_secret=hunter2&scram_client_key=hunter2",
        "host=h password = 'a \\' hunter2' sslpassword=hunter2",
        "host=h password=a,hunter2;hunter2",
        'PGPASSWORD="a hunter2" psql; REDISCLI_AUTH_TOKEN=hunter2 REDIS_PWD: hunter2',
        "https://s3/x?X-Amz-Security-Token=hunter2&X-Amz-Signature=hunter2&X-Amz-Credential=hunter2",
        "aws_secret_access_key=hunter2 aws_session_token = hunter2 AWS_ACCESS_KEY=hunter2",
        '{"password": "hunter2"}',
        "{'user': 'u', 'password':'a hunter2'}",
        '{"body": "{\\"password\\": \\"hunter2\\"}"}',
    ],
)
def test_what_may_be_secret_is_masked_and_stays_so(text: str) -> None:
    assert "hunter2" not in mask(text)
    assert "***" in mask(text)
    assert mask(mask(text)) == mask(text)
    assert masked({text: [text, (text,), 1]}) == {mask(text): [mask(text), [mask(text)], 1]}


@pytest.mark.parametrize(
    "text",
    [
        "the broker at redis://h:6379/0 cannot be read: Connection refused",
        "no token: the session's credentials have expired",
        "key 'celery' holds 3 messages; access key rotation",
        "rediss://h:6379/0?ssl_cert_reqs=required&health_check_interval=5",
        "write to ops@example.com",
    ],
)
def test_what_is_not_is_left(text: str) -> None:
    assert mask(text) == text
