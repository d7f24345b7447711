"""The broker of the test application and a recovery of it; stations, see :mod:`tests.support.station`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import redis

from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from patchpilot.recovery import Recovery, Site
from tests.support.processes import Shop
from tests.support.station import PLAIN, Station, Stations


@pytest.fixture(scope="module")
def stations(
    lab_roster: Roster, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres, migrated_template: str
) -> Iterator[Stations]:
    with Stations(lab_roster, tmp_path_factory.mktemp("stations"), postgres_server, migrated_template) as opened:
        yield opened


@pytest.fixture
def station(request: pytest.FixtureRequest, stations: Stations) -> Iterator[Station]:
    """The station with the setup that the test asks for (see :func:`tests.support.station.on`), or a plain one."""
    opened = stations.at(getattr(request, "param", PLAIN))
    with opened.used():
        yield opened


@pytest.fixture
def broker(shop: Shop) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(shop.broker) as client:
        yield client


@pytest.fixture
def forbidden(broker: redis.Redis) -> Iterator[str]:
    """A queue that the broker does not let anybody write to, until the test is over or says otherwise."""
    allowed = ("~*celery*", "~unacked*", "~_kombu*", "~patchpilot.canary*")
    broker.execute_command("ACL", "SETUSER", "default", "resetkeys", *allowed)
    yield "forbidden"
    broker.execute_command("ACL", "SETUSER", "default", "allkeys")


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """The key prefix of the application that ``recovery`` looks after. Parametrise a test indirectly to choose."""
    return str(getattr(request, "param", ""))


@pytest.fixture
def recovery(shop: Shop, prefix: str) -> Iterator[Recovery]:
    """Recovery of the test application, for which a worker is dead soon."""
    with Recovery(Site(shop.broker, shop.dsn, key_prefix=prefix), stale=timedelta(seconds=4)) as opened:
        yield opened
