"""Stages for whoever wants one; see :mod:`tests.support.stage`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres
from tests.support.stage import (
    Stage,
    Stages,
)


@pytest.fixture(scope="module")
def stages(
    lab_roster: Roster, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres, migrated_template: str
) -> Iterator[Stages]:
    with Stages(lab_roster, tmp_path_factory.mktemp("stages"), postgres_server, migrated_template) as opened:
        yield opened


@pytest.fixture
def stage(request: pytest.FixtureRequest, stages: Stages) -> Iterator[Stage]:
    with stages.at(request.param).used() as opened:
        yield opened
