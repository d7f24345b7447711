"""Running a command for a Celery application that is at hand: its configuration takes the place of a file."""

from __future__ import annotations

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from pydantic import SecretStr

from patchpilot.backend.config import Config
from patchpilot.cli.app import run_app
from patchpilot.cli.console import say, settings_from
from patchpilot.errors import NeedsOperator
from patchpilot.recovery.at_hand import at_hand
from patchpilot.settings import Celery as CelerySettings
from patchpilot.settings import Cluster, Postgres, Settings
from patchpilot.workers.application import Site

NAME = "celery"
"""What the application's broker is called where a command asks for a cluster."""


def run_for(app: Celery, arguments: list[str]) -> int:
    """Run the command line for ``app``, and return its exit code."""
    try:
        site, config = at_hand(app)
    except (ImproperlyConfigured, NeedsOperator) as error:
        say(f"patchpilot: {error}")
        return 2
    with settings_from(lambda settings: _of_application(settings, site, config)):
        return run_app(arguments, prog_name="celery patchpilot")


def _of_application(settings: Settings, site: Site, config: Config) -> Settings:
    """``settings``, with what the application says in place of what they say of it."""
    broker = Cluster(
        replication_group=NAME, role="broker", endpoint=SecretStr(site.endpoint), key_prefix=site.key_prefix,
        broker_name=site.broker,
    )  # fmt: skip
    ages = {
        "min_age": config.recovery_min_age, "max_age": config.recovery_max_age, "claim_lease": config.claim_lease,
        "dead_after": config.recovery_dead_after,
    }  # fmt: skip
    return settings.model_copy(
        update={
            "postgres": Postgres(dsn=SecretStr(site.dsn)),
            "clusters": {NAME: broker},
            "celery": CelerySettings.model_construct(  # what the application works with is not refused here
                accept_content=site.accept_content,
                result_accept_content=site.result_accept_content,
                results=SecretStr(site.results) if site.results else None,
                results_prefix=site.results_prefix,
                control_exchange=site.control_exchange,
                fanout_prefix=site.fanout_prefix,
                sep=site.sep,
                priority_steps=site.priority_steps or None,
                unacked_key=site.unacked[0],
                unacked_index_key=site.unacked[1],
                result_serializer=site.result_serializer,
            ),
            "recovery": settings.recovery.model_copy(update=ages),
            "purge": settings.purge.model_copy(update={"retention": config.retention}),
        }
    )
