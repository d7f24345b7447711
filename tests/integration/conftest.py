"""Stations for whoever wants one; see :mod:`tests.support.station`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
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
