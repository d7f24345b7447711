"""System checks: what is not set up, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.exceptions import ImproperlyConfigured as CeleryMisconfigured
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django calls it so
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.utils import DatabaseError
from psycopg.conninfo import conninfo_to_dict

from patchpilot.backend.config import dsn_of
from patchpilot.contrib.django.conf import alias, celery_app, dsn
from patchpilot.dsn import mask
from patchpilot.errors import NeedsOperator
from patchpilot.postgres.migrate import migrations
from patchpilot.recovery.at_hand import at_hand


@register("patchpilot")
def check_settings(**_: Any) -> list[CheckMessage]:
    """The Celery application, its broker, and the database."""
    found: list[CheckMessage] = []
    try:
        where = dsn()
    except ImproperlyConfigured as error:
        found.append(Error(str(error), id="patchpilot.E002"))
        where = ""
    try:
        app = celery_app()
    except ImproperlyConfigured as error:
        return [*found, Error(str(error), id="patchpilot.E001")]
    try:
        at_hand(app, where or "unknown")
    except (NeedsOperator, CeleryMisconfigured) as error:
        found.append(Error(str(error), id="patchpilot.E003"))
    if not str(app.conf.result_backend or "").startswith("patchpilot+"):
        found.append(
            Warning(
                "the Celery application's result_backend is not patchpilot's: nothing is written down, so nothing can "
                "be recovered",
                hint="set result_backend to 'patchpilot+redis://...'",
                id="patchpilot.W001",
            )
        )
    return [*found, *(_same_database(app, where) if where else ())]


def _same_database(app: Any, where: str) -> list[CheckMessage]:
    """Workers write where Celery's setting says; recovery from Django reads where Django's says."""
    try:
        workers = conninfo_to_dict(dsn_of(app))
    except CeleryMisconfigured as error:
        hint = "patchpilot_postgres may be the function patchpilot.contrib.django.dsn"
        return [Warning(str(error), hint=hint, id="patchpilot.W002")]
    ours = conninfo_to_dict(where)
    if all(workers.get(key) == ours.get(key) for key in ("host", "port", "dbname")):
        return []
    return [
        Warning(
            f"the Celery application writes to another PostgreSQL than the database {alias()!r}",
            hint="set patchpilot_postgres to the function patchpilot.contrib.django.dsn",
            id="patchpilot.W003",
        )
    ]


@register(Tags.database)
def check_tables(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """patchpilot's tables. Only asked for with ``manage.py check --database``, and by ``manage.py migrate``."""
    try:
        if alias() not in (databases or ()) or connections[alias()].vendor != "postgresql":
            return []
    except ImproperlyConfigured:
        return []  # the other check says so
    hint = "run `celery -A proj patchpilot db migrate`"
    try:
        with connections[alias()].cursor() as cursor:
            cursor.execute("SELECT to_regclass('patchpilot.migration') IS NOT NULL")
            if not cursor.fetchone()[0]:
                return [Warning("patchpilot's tables are missing", hint=hint, id="patchpilot.W004")]
            cursor.execute("SELECT coalesce(max(number), 0) FROM patchpilot.migration")
            number = cursor.fetchone()[0]
    except DatabaseError as error:
        words = f"patchpilot's tables cannot be looked for: {mask(str(error).splitlines()[0])}"
        return [Warning(words, id="patchpilot.W006")]
    if number < migrations()[-1].number:
        return [Warning("patchpilot's tables are those of an older version", hint=hint, id="patchpilot.W005")]
    return []
