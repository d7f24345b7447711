"""What users' workers import stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend


def test_the_backend_loads_neither_the_cloud_nor_the_command_line() -> None:
    script = (
        "import sys, patchpilot.backend\n"
        "heavy = {'boto3', 'botocore', 'typer', 'moto', 'structlog', 'pydantic', 'patchpilot.engine'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_backend_is_found_by_its_url() -> None:
    from celery.app import backends

    cls, url = backends.by_url("patchpilot+redis://h:1/0")
    assert (cls.__name__, url) == ("Backend", "redis://h:1/0")


def test_without_postgresql_the_backend_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery import Celery
    from celery.exceptions import ImproperlyConfigured

    monkeypatch.delenv("PATCHPILOT_POSTGRES", raising=False)
    app = Celery("nowhere", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False)
    with pytest.raises(ImproperlyConfigured, match="patchpilot_postgres"):
        _ = app.backend


def test_no_report_or_inspection_shows_the_dsn() -> None:
    from celery import Celery

    app = Celery(
        "secretive", broker="redis://127.0.0.1:1/0", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False
    )
    app.conf.patchpilot_postgres = "postgresql://u:hunter2@127.0.0.1:1/x"
    backend = app.backend
    assert backend.config.dsn == "postgresql://u:hunter2@127.0.0.1:1/x"
    for shown in (app.conf.humanize(), app.bugreport(), repr(app.conf.table()), repr(backend.config)):
        assert "hunter2" not in shown
    # Another thread makes a backend of its own, from the same configuration.
    assert type(backend)(app=app, url="redis://127.0.0.1:1/0").config.dsn == backend.config.dsn
