"""The supported range of Celery: stated once, the same everywhere, and refused outside of it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable

import celery
import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

import patchpilot
from patchpilot.backend.versions import SUPPORTED, check_celery
from tests.matrix.__main__ import CELERYS, PYTHONS
from tests.matrix.cell import ROOT

pytestmark = pytest.mark.backend

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(celery, "VERSION", tuple(map(int, version.split("."))))
    monkeypatch.setattr(celery, "__version__", version)


def without_install(app: Celery) -> None:
    _ = app.backend


@pytest.mark.parametrize("use", [without_install, patchpilot.install])
@pytest.mark.parametrize("version", ["4.4.7", "5.3.6", "5.8.0", "6.0.0"])
def test_another_celery_is_refused_in_one_line(
    version: str, use: Callable[[Celery], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery("elsewhere", backend="patchpilot+redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.patchpilot_postgres = "postgresql://127.0.0.1:1/x"
    pretend(monkeypatch, version)
    with pytest.raises(ImproperlyConfigured) as refused:
        use(app)
    assert str(refused.value) == (
        f"patchpilot supports Celery >=5.4,<5.8, and this is Celery {version}: install one of those"
    )


@pytest.mark.parametrize("version", ["5.4.0", "5.7.99", *(f"{minor}.0" for minor in CELERYS)])
def test_what_is_inside_the_range_is_not_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, version)
    check_celery()


def test_the_range_is_the_same_wherever_it_is_stated() -> None:
    assert f"celery[redis]{SUPPORTED}" in PROJECT["dependencies"]
    assert f"`{SUPPORTED}`" in README
    lowest, highest = re.findall(r"5\.(\d+)", SUPPORTED)
    assert tuple(f"5.{minor}" for minor in range(int(lowest), int(highest))) == CELERYS


def test_every_python_that_is_named_is_tested() -> None:
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert tuple(named) == PYTHONS
