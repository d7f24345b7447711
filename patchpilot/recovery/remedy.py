"""Remedies. Each re-checks its guard in the statement that takes effect: a finding that no longer holds does nothing.

Order matters here as in the backend: first the row in PostgreSQL, committed, then the message. A recovery that dies in
between leaves a chord whose claim ends, or a message that is in the outbox and nowhere else: the next one finds both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from celery import Celery
from celery.exceptions import CeleryError
from kombu.exceptions import ContentDisallowed, KombuError, OperationalError
from redis.exceptions import RedisError

from patchpilot.backend.backend import Backend
from patchpilot.backend.chords import Note
from patchpilot.errors import NeedsOperator, Transient
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.evidence import Message
from patchpilot.recovery.findings import Finding, Remedy
from patchpilot.workers.application import backend_of, standing_in

SQL = queries("recovery")


class Remedies:
    """Applies remedies on one site.

    :param app_for: the stand-in application for a result serialiser.
    :param run_id: noted with each remedy.
    """

    def __init__(self, database: Database, app_for: Callable[[str], Celery], run_id: str | None) -> None:
        self._database = database
        self._app_for = app_for
        self._run_id = run_id

    def apply(self, finding: Finding, messages: Mapping[str, Message]) -> bool:
        """Do what ``finding`` asks for.

        :param messages: the evidence, by message id.
        :returns: whether anything was done; false if somebody else was first, or the world had moved on.
        :raises Transient: the broker or PostgreSQL went away. What was claimed is found again.
        :raises NeedsOperator: the chord cannot be decoded with this configuration.
        """
        try:
            match finding.remedy:
                case Remedy.DISPATCH_CALLBACK:
                    return self._dispatch(finding)
                case Remedy.RECORD_PART:
                    return self._record_parts(finding)
                case Remedy.REPUBLISH | Remedy.REQUEUE:
                    return self._send_again(finding, [messages[key] for key in finding.messages if key in messages])
                case Remedy.NONE:
                    return False
        except ContentDisallowed as error:
            raise NeedsOperator(
                f"{finding.kind} {finding.id} cannot be decoded: {error}; add its serialiser to celery.accept_content"
            ) from error
        except (OperationalError, RedisError, OSError) as error:
            raise Transient(f"the broker went away during recovery: {error}") from error
        except (KombuError, CeleryError) as error:
            raise NeedsOperator(f"{finding.kind} {finding.id} cannot be recovered: {error!r}") from error

    def _dispatch(self, finding: Finding) -> bool:
        return self._finish(self._backend(finding.id), finding)

    def _record_parts(self, finding: Finding) -> bool:
        backend = self._backend(finding.id)
        for row in self._database.fetch(SQL["ended_parts"], {"group_id": finding.id}):
            meta = backend.decode_result(row["meta"])
            backend.chords.return_part(finding.id, row["task_id"], meta["status"], meta["result"])
        # If that completes it, the chord is finished here; if not, its other parts go on as usual.
        return self._finish(backend, finding)

    def _finish(self, backend: Backend, finding: Finding) -> bool:
        with standing_in(backend.app):
            return backend.finish_chord(finding.id, self._note(finding))

    def _backend(self, group_id: str) -> Backend:
        [row] = self._database.fetch(SQL["serializer"], {"group_id": group_id}) or [{"result_serializer": "json"}]
        return backend_of(self._app_for(row["result_serializer"]))

    def _send_again(self, finding: Finding, messages: Iterable[Message]) -> bool:
        """Publish each message that is still ours to publish. The first one's row carries the note of the remedy."""
        note: Note | None = self._note(finding)
        done = False
        for message in messages:
            row = self._take(message, note)
            if row is None:
                continue
            done, note = True, None
            if message.tag is not None:
                self._requeue(message.tag)
            else:
                self._publish(row)
        return done

    def _take(self, message: Message, note: Note | None) -> Row | None:
        def write(connection: Connection) -> Row | None:
            row = connection.execute(
                SQL["take"], {"message_id": message.message_id, "resends": message.resends}
            ).fetchone()
            if row is not None and note is not None:
                note(connection)
            return row

        return self._database.run(write)

    def _publish(self, row: Row) -> None:
        app = self._app_for("json")
        with app.producer_pool.acquire(block=True) as producer:
            producer.publish(
                row["body"],
                exchange=row["exchange"],
                routing_key=row["routing_key"],
                headers=row["headers"],
                content_type=row["content_type"],
                content_encoding=row["content_encoding"],
                retry=True,
                retry_policy=app.conf.task_publish_retry_policy,
                **row["properties"],
            )

    def _requeue(self, tag: str) -> None:
        """As kombu does when the visibility timeout is over: out of the unacknowledged, back into the queue, in one."""
        with self._app_for("json").connection_for_write() as connection:
            connection.default_channel.qos.restore_by_tag(tag)

    def _note(self, finding: Finding) -> Note:
        row = {
            "run_id": self._run_id, "kind": finding.kind, "id": finding.id, "diagnosis": finding.diagnosis,
            "remedy": str(finding.remedy), "callback": finding.callback, "reason": finding.reason,
        }  # fmt: skip

        def note(connection: Connection) -> None:
            connection.execute(SQL["record"], row)

        return note
