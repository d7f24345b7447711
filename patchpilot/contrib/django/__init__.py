"""A Django app: put ``patchpilot.contrib.django`` into INSTALLED_APPS.

It brings the management command ``recover_stuck_chords``, system checks, and the chords in the admin. Its one setting,
all of it optional::

    PATCHPILOT = {
        "celery_app": "proj.celery:app",    # by default the Celery application that the project has made current
        "database": "default",              # the alias in DATABASES where patchpilot's tables are
    }
"""

from __future__ import annotations


def dsn() -> str:
    """The DSN of patchpilot's database, from DATABASES. For the Celery setting ``patchpilot_postgres``, as a function:
    ``patchpilot_postgres = patchpilot.contrib.django.dsn``.

    :raises ImproperlyConfigured: Django's, if that database is no PostgreSQL.
    """
    from patchpilot.contrib.django.conf import dsn as of_databases

    return of_databases()
