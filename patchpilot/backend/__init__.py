"""What lives in users' workers: results, chords, the outbox and the fence. Small, fast and boring.

Importing this loads Celery, redis-py and psycopg, and nothing else of patchpilot but its PostgreSQL connection.
"""

from __future__ import annotations

from typing import Any

from patchpilot.backend.backend import Backend
from patchpilot.backend.config import Config, Mode
from patchpilot.backend.shadow import ShadowBackend

__all__ = ["Backend", "ShadowBackend", "create"]


def create(app: Any, **options: Any) -> Backend | ShadowBackend:
    """The result backend of ``app``, as its settings ask for: what Celery finds under ``patchpilot+redis://``."""
    shadow = Config.of(app).mode is Mode.SHADOW
    return (ShadowBackend if shadow else Backend)(app=app, **options)
