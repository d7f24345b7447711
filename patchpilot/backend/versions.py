"""Which versions of Celery the backend works with."""

from __future__ import annotations

from collections.abc import Sequence

from celery import VERSION
from celery.exceptions import ImproperlyConfigured

SUPPORTED = ">=5.4,<5.8"
"""The range, as in pyproject.toml. Every minor version in it is tested (`make matrix`)."""


def check_celery(version: Sequence[object] = VERSION) -> None:
    """Refuse a Celery that the backend was never tested with: what it builds on is private to Celery in part.

    :raises ImproperlyConfigured: if ``version`` is outside of :data:`SUPPORTED`.
    """
    if not (5, 4) <= tuple(version[:2]) < (5, 8):
        raise ImproperlyConfigured(
            f"patchpilot supports Celery {SUPPORTED}, and this is Celery {'.'.join(map(str, version[:3]))}: "
            "install one of those"
        )
