"""The durable record, for whoever reads or writes it beside the workers: unless it needs another version than this one.

A schema that is newer than this version is no harm by itself: a rolling upgrade migrates first, and what ran before
goes on. A migration that versions without another one cannot live with says so in its name: ``split_outbox_needs_0012``
is the name of number 12, or ``drop_columns_needs_0012`` that of 14, if versions that know 12 already do without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from patchpilot.errors import Usage
from patchpilot.postgres.connection import Connection, Database
from patchpilot.postgres.migrate import migrations

_NEEDS = re.compile(r"_needs_(\d{4})$")


class Record(Database):
    """The durable record, which refuses each connection to a schema that needs another version.

    :raises Usage: from every method, if it does.
    """

    def _connected(self) -> Connection:
        connection = super()._connected()
        connection.patience = min(self._patience, self._left())
        try:
            newest = migrations()[-1].number
            sql = "SELECT name FROM patchpilot.migration WHERE number > %s"
            check((row["name"] for row in connection.execute(sql, [newest]).fetchall()), newest)
        except BaseException:
            connection.close()
            raise
        return connection


def check(newer: Iterable[str], newest: int) -> None:
    """See to it that a version whose newest migration is ``newest`` can use a schema that has those in ``newer`` too.

    :raises Usage: it cannot.
    """
    needed = max((int(found[1]) for name in newer if (found := _NEEDS.search(name))), default=0)
    if needed > newest:
        raise Usage(
            f"the schema of the record is for newer versions (it needs migration {needed:04}, this patchpilot has "
            f"{newest:04}): upgrade patchpilot"
        )
