"""How long the backend waits for Valkey."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

pytestmark = pytest.mark.backend


def patience(url: str = "patchpilot+redis://127.0.0.1:1/0", **settings: Any) -> tuple[float, float]:
    app = Celery("patience", backend=url, set_as_current=False)
    app.conf.update(patchpilot_postgres="host=127.0.0.1 port=1", **settings)
    parameters = app.backend.connparams
    return parameters["socket_timeout"], parameters["socket_connect_timeout"]


def test_a_task_does_not_hang_on_a_valkey_that_is_silent() -> None:
    assert patience() == (10.0, 5.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"redis_socket_timeout": 33.0, "redis_socket_connect_timeout": 44.0}, (33.0, 44.0)),
        ({"url": "patchpilot+redis://127.0.0.1:1/0?socket_timeout=33&socket_connect_timeout=44"}, (33.0, 44.0)),
        ({"redis_socket_timeout": None}, (None, 5.0)),
    ],
    ids=["settings", "url", "for ever"],
)
def test_what_the_application_says_stands(given: dict[str, Any], expected: tuple[float, float]) -> None:
    assert patience(**given) == expected
