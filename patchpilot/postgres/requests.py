"""Plans that a run can be held to, and what people ask of a run: rows that it sees from whatever host they come."""

from __future__ import annotations

import getpass
import uuid
from collections.abc import Mapping
from typing import Any

from psycopg.types.json import Jsonb

from patchpilot.dsn import mask
from patchpilot.engine.requests import Ask, Request
from patchpilot.errors import NothingToDo
from patchpilot.postgres.connection import Database, Row
from patchpilot.postgres.holder import Holder
from patchpilot.postgres.queries import queries


def ask(database: Database, run_id: str, what: Ask, *, reason: str = "", digest: str | None = None) -> Request:
    """Ask something of an unfinished run, in the name of whoever runs this process.

    :raises NothingToDo: the run is over.
    """
    asked = {
        "request_id": uuid.uuid4(),
        "run_id": run_id,
        "ask": str(what),
        "asked_by": whoever(),
        "reason": mask(reason),
        "digest": digest,
    }
    rows = database.fetch(queries("requests")["ask"], asked)
    if not rows:
        raise NothingToDo(f"run {run_id} is over")
    return _request(rows[0])


def requests(database: Database, run_id: str) -> tuple[Request, ...]:
    """What was asked of a run so far, oldest first."""
    return tuple(map(_request, database.fetch(queries("requests")["requests"], {"run_id": run_id})))


def unfinished(database: Database, environment: str, cluster: str) -> str:
    """The id of the cluster's unfinished run, whether a process works on it or not.

    :raises NothingToDo: there is none.
    """
    rows = database.fetch(queries("requests")["unfinished"], {"environment": environment, "cluster": cluster})
    if not rows:
        raise NothingToDo(f"no run of cluster {cluster!r} is under way; see `patchpilot status`")
    run_id: str = rows[0]["id"]
    return run_id


def keep_plan(database: Database, environment: str, cluster: str, digest: str, content: Mapping[str, Any]) -> None:
    """Put a plan on record, so that a run can be held to it and say what has changed since."""
    place = {"environment": environment, "cluster": cluster, "digest": digest}
    database.execute(queries("requests")["keep_plan"], {**place, "content": Jsonb(dict(content))})


def plan(database: Database, environment: str, cluster: str, digest: str) -> dict[str, Any] | None:
    """The plan with this digest, if one was made for this cluster; with ``carried_out_by``, the run that came to its
    end with it, if there is one."""
    place = {"environment": environment, "cluster": cluster, "digest": digest}
    rows = database.fetch(queries("requests")["plan"], place)
    return {**rows[0]["content"], "carried_out_by": rows[0]["carried_out_by"]} if rows else None


def whoever() -> str:
    """Who asks: the user and the host of this process."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        name = "somebody"
    return f"{name} on {Holder.here().host}"


def _request(row: Row) -> Request:
    return Request(Ask(row["ask"]), row["asked_by"], row["asked_at"], row["reason"], row["digest"])
