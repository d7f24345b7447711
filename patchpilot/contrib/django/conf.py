"""Where everything is, from Django's settings and the Celery application's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery, _state
from celery.exceptions import ImproperlyConfigured as CeleryMisconfigured
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.connection import ConnectionDoesNotExist
from kombu.utils.imports import symbol_by_name
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo

from patchpilot.backend.config import Config
from patchpilot.errors import NeedsOperator
from patchpilot.recovery.at_hand import at_hand
from patchpilot.workers.application import Site


def setting(name: str, default: Any = None) -> Any:
    """One entry of the setting PATCHPILOT.

    :raises ImproperlyConfigured: it is no dict.
    """
    entries = getattr(settings, "PATCHPILOT", {})
    if not isinstance(entries, Mapping):
        raise ImproperlyConfigured(
            "PATCHPILOT is no dict; write it like PATCHPILOT = {'celery_app': 'proj.celery:app'}"
        )
    return entries.get(name, default)


def alias() -> str:
    """The alias of patchpilot's database in DATABASES."""
    return str(setting("database", "default"))


def dsn() -> str:
    """Where patchpilot's database is: as Django connects to it, with what libpq knows of its options.

    :raises ImproperlyConfigured: there is no such database, it is no PostgreSQL, or Django cannot connect to it so.
    """
    try:
        connection = connections[alias()]
    except ConnectionDoesNotExist:
        raise ImproperlyConfigured(f"PATCHPILOT['database'] is {alias()!r}, which is not in DATABASES") from None
    if connection.vendor != "postgresql":
        raise ImproperlyConfigured(
            f"the database {alias()!r} is {connection.vendor}: patchpilot's tables are in a PostgreSQL; "
            "say which one with PATCHPILOT['database']"
        )
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    parts = connection.get_connection_params()
    return make_conninfo(**{key: value for key, value in parts.items() if key in known and value is not None})


def celery_app() -> Celery:
    """The Celery application: the one that is named, or the one that the project has made current.

    :raises ImproperlyConfigured: there is none.
    """
    named = setting("celery_app")
    if named is not None:
        return _named(named)
    # Asking Celery for the current one would make one up.
    app = getattr(_state._tls, "current_app", None) or _state.default_app
    if app is None or (app.main == "default" and not app.set_as_current):  # one that Celery made up already
        raise ImproperlyConfigured(
            "no Celery application: import it in the project's __init__.py, "
            "or name it with PATCHPILOT['celery_app'] = 'proj.celery:app'"
        )
    found: Celery = app
    return found


def _named(name: Any) -> Celery:
    try:
        app = symbol_by_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImproperlyConfigured(f"PATCHPILOT['celery_app'] is {name!r}, which cannot be imported: {error}") from None
    if not isinstance(app, Celery):
        raise ImproperlyConfigured(f"PATCHPILOT['celery_app'] is {name!r}, which is no Celery application")
    return app


def site() -> tuple[Site, Config]:
    """Where recovery looks, and what the application says of how.

    :raises ImproperlyConfigured: something is not set up; the message says what.
    """
    try:
        return at_hand(celery_app(), dsn())
    except (NeedsOperator, CeleryMisconfigured) as error:
        raise ImproperlyConfigured(str(error)) from None
