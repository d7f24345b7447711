"""Which versions of Celery the backend works with."""

from __future__ import annotations

import celery
from celery.exceptions import ImproperlyConfigured

SUPPORTED = ">=5.4,<5.8"
"""The range, as in pyproject.toml. Every minor version in it is tested (`make matrix`)."""


def check_celery() -> None:
    """Refuse a Celery that the backend was never tested with: it builds on much that Celery promises nobody.

    :raises ImproperlyConfigured: if the version is not :data:`SUPPORTED`.
    """
    if not (5, 4) <= celery.VERSION[:2] < (5, 8):
        raise ImproperlyConfigured(
            f"patchpilot supports Celery {SUPPORTED}, and this is Celery {celery.__version__}: install one of those"
        )
