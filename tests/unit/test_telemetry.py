"""Secrets never reach a log."""

from __future__ import annotations

import pytest

from patchpilot.dsn import mask


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:hunter2@h:5432/d",
        "rediss://:hunter2@h:6379/0 refused",
        "two redis://:hunter2@a/0 and redis://u:hunter2@b/0",
        "host=h password=hunter2 dbname=d",
        "host=h password='hunter2 hunter2' dbname=d",
        "auth_token: hunter2",
        "redis://h/0?password=hunter2&db=1",
        "postgresql://u:p@hunter2@h/d",
    ],
)
def test_credentials_are_masked(text: str) -> None:
    assert "hunter2" not in mask(text)


def test_what_is_no_secret_stays() -> None:
    text = "chord 123 on redis://127.0.0.1:6379/0 at dbname=d"
    assert mask(text) == text
