"""One boto3 client, reached as the settings say, with our errors in place of botocore's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

from patchpilot import __version__
from patchpilot.elasticache.faults import EXPIRED, code_of, translated
from patchpilot.settings import Aws

if TYPE_CHECKING:
    from botocore.client import BaseClient

T = TypeVar("T")
C = TypeVar("C", bound="BaseClient")

CONNECT_TIMEOUT = 5
READ_TIMEOUT = 20
"""Seconds. botocore's own defaults of 60 each would make one look longer than the lease on the run lasts."""


class Calls(Generic[C]):
    """The calls of one service in one account and region.

    Every method of a subclass raises :class:`~patchpilot.errors.Transient` when AWS cannot be reached or throttles,
    :class:`~patchpilot.errors.Refused` when it refuses this one request, and
    :class:`~patchpilot.errors.NeedsOperator` when a person has to change something first.

    :param fresh: makes a client, from credentials read anew; with true, one whose calls are never repeated.
    """

    def __init__(self, fresh: Callable[[bool], C]) -> None:
        self._fresh = fresh
        self._clients: dict[bool, C] = {}
        self._accepted = False  # whether AWS has accepted our credentials once

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, action: str, ask: Callable[[C], T], *, once: bool = False) -> T:
        with translated(action, self._region, renewable=self._accepted):
            try:
                answer = ask(self._client(once))
            except ClientError as error:
                if code_of(error) not in EXPIRED:
                    raise
                # Whoever renews credentials in a file or a cache does so without telling us. AWS did nothing: ask
                # again, and if they are not renewed yet, with those that lie there at the next look.
                self.close()
                try:
                    answer = ask(self._client(once))
                except ClientError as again:
                    if code_of(again) in EXPIRED:
                        self.close()
                    raise
            self._accepted = True
            return answer

    def _region(self) -> str | None:
        return next((client.meta.region_name for client in self._clients.values()), None)

    def _client(self, once: bool) -> C:
        if once not in self._clients:
            self._clients[once] = self._fresh(once)
        return self._clients[once]


def clients(service: str, aws: Aws, region: str | None, session_name: str) -> Callable[[bool], Any]:
    """What makes clients of ``service``: see :class:`Calls`.

    :param region: the cluster's own region, if it has one; else ``aws.region``, else boto3's own rules.
    :param session_name: what CloudTrail shows when a profile assumes a role: ``patchpilot-<run id>``.
    """

    def fresh(once: bool) -> Any:
        made: Any = session(aws, session_name)
        return made.client(
            service,
            region_name=region or aws.region,
            endpoint_url=aws.endpoint_url,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                retries={"mode": "standard", "total_max_attempts": 1 if once else 3},
                user_agent_extra=f"patchpilot/{__version__}",
            ),
        )

    return fresh


def session(aws: Aws, session_name: str) -> boto3.Session:
    """Credentials as ``aws`` says, read anew. Roles are assumed as ``session_name``, of which 64 characters count."""
    core = botocore.session.Session(profile=aws.profile)
    if aws.credentials_file:
        core.set_config_variable("credentials_file", str(aws.credentials_file))
    for profile in core.full_config.get("profiles", {}).values():
        if "role_arn" in profile:
            profile.setdefault("role_session_name", session_name[:64])
    return boto3.Session(botocore_session=core)
