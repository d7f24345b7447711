"""Where recovery looks for an application that is at hand: a worker's, a Django project's, or the celery command's."""

from __future__ import annotations

from dataclasses import replace

from celery import Celery

from patchpilot.backend.config import Config
from patchpilot.dsn import readable_endpoint
from patchpilot.errors import NeedsOperator
from patchpilot.workers.application import Site, site_of


def at_hand(app: Celery, dsn: str | None = None) -> tuple[Site, Config]:
    """The site of ``app``, and what its configuration says of how to recover there.

    :param dsn: where PostgreSQL is, if not where ``app`` says.
    :raises ImproperlyConfigured: PostgreSQL is configured nowhere, or a setting is wrong.
    :raises NeedsOperator: its broker is no Redis, or its address cannot be read.
    """
    config = Config.of(app, dsn)
    try:
        site = site_of(app, dsn)
    except ValueError:  # what cannot even be taken apart; quoted it would show the password
        raise NeedsOperator(
            "the application's broker URL, or that of its result backend, is malformed: write redis://host:6379/0"
        ) from None
    readable_endpoint(site.endpoint, "the application's broker URL", somewhere=False)
    if site.results:
        readable_endpoint(site.results, "the URL of the application's result backend", somewhere=False)
    return replace(site, dead_after=config.recovery_dead_after), config
