"""What users' workers import stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend


def test_the_package_alone_loads_nothing() -> None:
    script = (
        "import sys, patchpilot\n"
        "print(sorted({'celery', 'kombu', 'redis', 'psycopg', 'patchpilot.backend'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    # The last one is loaded by every `celery` command.
    ["patchpilot.backend", "patchpilot.transport", "patchpilot.recovery.step", "patchpilot.cli.celery_command"],
)
def test_what_workers_import_loads_neither_the_cloud_nor_the_command_line(module: str) -> None:
    script = (
        f"import sys, {module}\n"
        "heavy = {'boto3', 'botocore', 'typer', 'moto', 'structlog', 'pydantic', 'prometheus_client'}\n"
        "heavy |= {'patchpilot.engine', 'patchpilot.settings'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_a_worker_that_is_asked_to_recover_loads_recovery() -> None:
    script = (
        "import sys, celery, patchpilot\n"
        "app = celery.Celery('light', broker='redis://127.0.0.1:1/0')\n"
        "patchpilot.install(app, recover=True)\n"
        "print('patchpilot.recovery' in sys.modules, sorted(app.steps['consumer']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "False ['patchpilot.backend.children:Listening', 'patchpilot.recovery.step:Recovering']"
    )


def test_the_backend_is_found_by_its_url() -> None:
    from celery.app import backends

    from patchpilot.backend import create

    assert backends.by_url("patchpilot+redis://h:1/0") == (create, "redis://h:1/0")


def test_without_postgresql_the_backend_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery import Celery
    from celery.exceptions import ImproperlyConfigured

    monkeypatch.delenv("PATCHPILOT_POSTGRES", raising=False)
    app = Celery("nowhere", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False)
    with pytest.raises(ImproperlyConfigured, match="patchpilot_postgres"):
        _ = app.backend


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("patchpilot_mode", "durabel", "durable, shadow"),
        ("patchpilot_counting", "redis", "postgres, valkey"),
        ("patchpilot_fence", True, "off, callbacks, all"),
        ("patchpilot_journal_messages", "no", "required, warn, off"),
        ("patchpilot_strict", "yes", "True or False"),
        ("patchpilot_claim_lease", "soon", "could not convert"),
        ("patchpilot_retention", -1, "negative"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(key: str, value: object, words: str) -> None:
    from celery import Celery
    from celery.exceptions import ImproperlyConfigured

    app = Celery("wrong", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.update({"patchpilot_postgres": "postgresql://u:hunter2@127.0.0.1:1/x", key: value})
    with pytest.raises(ImproperlyConfigured, match=f"^{key} is .*{words}") as refused:
        _ = app.backend
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("ages", [{"min_age": 60, "max_age": 60}, {"max_age": 300}, {"min_age": 90000}])
def test_a_window_with_nothing_in_it_is_a_wrong_setting(ages: dict[str, int]) -> None:
    from celery import Celery
    from celery.exceptions import ImproperlyConfigured

    app = Celery("light", broker="memory://", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.patchpilot_postgres = "postgresql://h/d"
    app.conf.update({f"patchpilot_recovery_{name}": value for name, value in ages.items()})
    with pytest.raises(ImproperlyConfigured, match=r"patchpilot_recovery_min_age .* must be below"):
        _ = app.backend


@pytest.mark.parametrize(("given", "meant"), [(True, "required"), (False, "off"), ("warn", "warn"), (None, "required")])
def test_journalling_is_on_off_or_a_warning(given: object, meant: str) -> None:
    from celery import Celery

    from patchpilot.backend.config import Config

    app = Celery("journalling", set_as_current=False)
    app.conf.update(patchpilot_postgres=lambda: "postgresql://127.0.0.1:1/x", patchpilot_journal_messages=given)
    assert Config.of(app).journal == meant
    assert Config.of(app).dsn == "postgresql://127.0.0.1:1/x"


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
