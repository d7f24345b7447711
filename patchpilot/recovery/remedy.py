"""Remedies. Each re-checks its guard in the statement that takes effect: a finding that no longer holds does nothing.

Order matters here as in the backend: first the row in PostgreSQL, committed, then the message. A recovery that dies in
between leaves a chord whose claim ends, or a message that is in the outbox and nowhere else: the next one finds both.
They come in batches, each with a constant number of statements.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from celery import Celery
from celery.exceptions import CeleryError
from kombu.exceptions import ContentDisallowed, KombuError, OperationalError
from redis.exceptions import RedisError

from patchpilot.backend.backend import Backend
from patchpilot.backend.message import Part
from patchpilot.errors import NeedsOperator, PatchpilotError, Transient
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.evidence import Message
from patchpilot.recovery.findings import Finding, Remedy
from patchpilot.workers.application import backend_of, standing_in

SQL = queries("recovery")

Complain = Callable[[Finding, PatchpilotError], None]


class Remedies:
    """Applies remedies on one site.

    :param app_for: the stand-in application for a result serialiser.
    :param run_id: noted with each remedy.
    :param complain: told about a finding that could not be remedied, and why.
    """

    def __init__(
        self, database: Database, app_for: Callable[[str], Celery], run_id: str | None, complain: Complain
    ) -> None:
        self._database = database
        self._app_for = app_for
        self._run_id = run_id
        self._complain = complain

    def apply(self, findings: Sequence[Finding], messages: Mapping[str, Message]) -> list[Finding]:
        """Do what a batch of findings asks for.

        :param messages: the evidence, by message id.
        :returns: those of the findings about which something was done; not those where somebody else was first, or
            where the world had moved on.
        :raises Transient: PostgreSQL or the broker went away. What was claimed is found again.
        """
        by_remedy: defaultdict[Remedy, list[Finding]] = defaultdict(list)
        for finding in findings:
            by_remedy[finding.remedy].append(finding)
        self._record_parts(by_remedy[Remedy.RECORD_PART])
        # If that completes a chord, it is finished here; if not, its other parts go on as usual.
        done = self._dispatch([*by_remedy[Remedy.DISPATCH_CALLBACK], *by_remedy[Remedy.RECORD_PART]])
        done += self._send_again([*by_remedy[Remedy.REPUBLISH], *by_remedy[Remedy.REQUEUE]], messages)
        return done

    # -- chords -------------------------------------------------------------------------------------------------

    def _dispatch(self, findings: Sequence[Finding]) -> list[Finding]:
        by_id = {finding.id: finding for finding in findings}
        done: list[Finding] = []
        for serializer, group_ids in self._by_serializer(by_id).items():
            backend = backend_of(self._app_for(serializer))

            def note(connection: Connection, ours: Collection[str]) -> None:
                self._note(connection, [by_id[group_id] for group_id in ours])

            with standing_in(backend.app), _broker_errors():
                finished = backend.finish_chords(group_ids, note)
            for group_id, error in finished.failed.items():
                self._complain(by_id[group_id], _explained(by_id[group_id], error))
            done += [by_id[group_id] for group_id in sorted(finished.done)]
        return done

    def _record_parts(self, findings: Sequence[Finding]) -> None:
        by_id = {finding.id: finding for finding in findings}
        if not by_id:
            return
        backends: dict[str, Backend] = {
            group_id: backend_of(self._app_for(serializer))
            for serializer, group_ids in self._by_serializer(by_id).items()
            for group_id in group_ids
        }
        for row in self._database.fetch(SQL["ended_parts"], {"group_ids": sorted(by_id)}):
            backend = backends[row["group_id"]]
            try:
                meta = backend.decode_result(row["meta"])
                part = Part(row["group_id"], row["task_id"], row["position"])
                backend.chords.return_part(part, meta["status"], meta["result"])
            except (KombuError, CeleryError) as error:
                self._complain(by_id[row["group_id"]], _explained(by_id[row["group_id"]], error))

    def _by_serializer(self, group_ids: Iterable[str]) -> dict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        asked = sorted(group_ids)
        for row in self._database.fetch(SQL["serializers"], {"group_ids": asked}) if asked else ():
            found[row["result_serializer"]].append(row["group_id"])
        return found

    # -- messages -----------------------------------------------------------------------------------------------

    def _send_again(self, findings: Sequence[Finding], messages: Mapping[str, Message]) -> list[Finding]:
        """Publish each message that is still ours to publish."""
        of = {key: finding for finding in findings for key in finding.messages if key in messages}
        if not of:
            return []
        taken = {row["message_id"]: row for row in self._take([messages[key] for key in of], of)}
        with _broker_errors():
            self._requeue([tag for key in taken if (tag := messages[key].tag) is not None])
            self._publish([row for key, row in taken.items() if messages[key].tag is None])
        return _distinct(of[key] for key in taken)

    def _take(self, seen: Sequence[Message], of: Mapping[str, Finding]) -> list[Row]:
        params = {"message_ids": [it.message_id for it in seen], "resends": [it.resends for it in seen]}

        def write(connection: Connection) -> list[Row]:
            rows = connection.execute(SQL["take"], params).fetchall()
            self._note(connection, _distinct(of[row["message_id"]] for row in rows))
            return rows

        return self._database.run(write)

    def _publish(self, rows: Sequence[Row]) -> None:
        app = self._app_for("json")
        if not rows:
            return
        with app.producer_pool.acquire(block=True) as producer:
            for row in rows:
                producer.publish(
                    row["body"],
                    exchange=row["exchange"],
                    routing_key=row["routing_key"],
                    headers=json.loads(row["headers"]),
                    content_type=row["content_type"],
                    content_encoding=row["content_encoding"],
                    retry=True,
                    retry_policy=app.conf.task_publish_retry_policy,
                    **json.loads(row["properties"]),
                )

    def _requeue(self, tags: Sequence[str]) -> None:
        """As kombu does when the visibility timeout is over: out of the unacknowledged, back into the queue, in one."""
        if not tags:
            return
        with self._app_for("json").connection_for_write() as connection:
            for tag in tags:
                connection.default_channel.qos.restore_by_tag(tag)

    def _note(self, connection: Connection, findings: Sequence[Finding]) -> None:
        names = ("kind", "id", "diagnosis", "remedy", "callback", "reason")
        columns = {name: [getattr(finding, name) for finding in findings] for name in names}
        if findings:
            connection.execute(SQL["record"], {**columns, "run_id": self._run_id})


def _distinct(findings: Iterable[Finding]) -> list[Finding]:
    return list({(finding.kind, finding.id, finding.messages): finding for finding in findings}.values())


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except (OperationalError, RedisError, OSError) as error:
        raise Transient(f"the broker went away during recovery: {error}") from error


def _explained(finding: Finding, error: Exception) -> PatchpilotError:
    """What a person has to know about a finding that could not be remedied."""
    what = f"{finding.kind} {finding.id}"
    if isinstance(error, PatchpilotError):
        return error
    if isinstance(error, ContentDisallowed):
        return NeedsOperator(f"{what} cannot be decoded: {error}; add its serialiser to celery.accept_content")
    if isinstance(error, OperationalError | RedisError | OSError):
        return Transient(f"the broker went away during recovery: {error}")
    return NeedsOperator(f"{what} cannot be recovered: {error!r}")
