"""Remedies. Each re-checks its guard in the statement that takes effect: a finding that no longer holds does nothing.

Order matters here as in the backend: first the row in PostgreSQL, committed, then the message. A recovery that dies in
between leaves a chord whose claim ends, or a message that is in the outbox and nowhere else: the next one finds both.
They come in batches, each with a constant number of statements.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from celery import Celery
from celery.exceptions import CeleryError
from celery.states import REVOKED
from kombu.exceptions import ContentDisallowed, DecodeError, KombuError, OperationalError
from redis.exceptions import RedisError

from patchpilot.backend.backend import Backend
from patchpilot.backend.errbacks import called_by_workers
from patchpilot.errors import NeedsOperator, PatchpilotError, Transient
from patchpilot.postgres.connection import Connection, Database, Row
from patchpilot.postgres.queries import queries
from patchpilot.recovery.evidence import Message
from patchpilot.recovery.findings import Finding, Remedy
from patchpilot.recovery.standing import task_ids
from patchpilot.recovery.stock import names
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

    def apply(
        self, findings: Sequence[Finding], messages: Mapping[str, Message], *, outwards: bool = False
    ) -> list[Finding]:
        """Do what a batch of findings asks for.

        :param messages: the evidence, by message id.
        :param outwards: go on with the chords around those that are ended here as failed.
        :returns: those of the findings about which something was done; not those where somebody else was first, or
            where the world had moved on. Going outwards adds findings.
        :raises Transient: PostgreSQL or the broker went away. What was claimed is found again.
        """
        by_remedy: defaultdict[Remedy, list[Finding]] = defaultdict(list)
        for finding in findings:
            by_remedy[finding.remedy].append(finding)
        interrupted = [*by_remedy[Remedy.RECORD_PART], *by_remedy[Remedy.REVOKE_PART]]
        revoked = self._revoke(by_remedy[Remedy.REVOKE_PART], messages)
        done = self._end_chords(by_remedy[Remedy.DISPATCH_CALLBACK], interrupted, revoked)
        ended = done
        while outwards and ended:
            ended = self._end_chords((), self._around(ended))
            done += ended
        lost = _still_wanted(by_remedy[Remedy.REVOKE_PART], messages)
        done += self._send_again([*by_remedy[Remedy.REPUBLISH], *by_remedy[Remedy.REQUEUE], *lost], messages)
        return done

    # -- chords -------------------------------------------------------------------------------------------------

    def _end_chords(
        self, complete: Sequence[Finding], interrupted: Sequence[Finding], revoked: Collection[str] = ()
    ) -> list[Finding]:
        """Dispatch the complete ones; record the parts of the interrupted ones, which may complete them. If it does
        not, their other parts go on as usual.

        :param revoked: those whose remedy is on record already.
        """
        recorded = self._record_parts(interrupted, revoked)
        finished = self._dispatch([*complete, *interrupted], recorded)
        return [*finished, *(finding for finding in interrupted if finding.id in recorded and finding not in finished)]

    def _around(self, ended: Sequence[Finding]) -> list[Finding]:
        """The chords that wait for the callback of one of these, which will never run."""
        failed = self._database.fetch(SQL["failed"], {"group_ids": [finding.id for finding in ended]})
        accept = self._app_for("json").conf.accept_content
        tasks = sorted({task_id for row in failed for task_id in (row["callback_id"], *task_ids(row, accept))})
        around = self._database.fetch(SQL["around"], {"task_ids": tasks}) if tasks else ()
        return [
            Finding(
                kind="chord", id=row["group_id"], diagnosis="part-return-interrupted", remedy=Remedy.RECORD_PART,
                reason=f"its part {row['task_id']} is the callback of a chord that failed: nobody returns it",
                callback=row["callback_name"],
            )
            for row in around
        ]  # fmt: skip

    def _dispatch(self, findings: Sequence[Finding], recorded: Collection[str]) -> list[Finding]:
        """Finish those that are complete.

        :param recorded: those whose remedy is on record already.
        """
        by_id = {finding.id: finding for finding in findings}
        done: list[Finding] = []
        for serializer, group_ids in self._by_serializer(by_id).items():
            backend = backend_of(self._app_for(serializer))

            def note(connection: Connection, ours: Collection[str]) -> None:
                self._note(connection, [by_id[group_id] for group_id in ours if group_id not in recorded])

            with standing_in(backend.app), called_by_workers(), _broker_errors():
                finished = backend.finish_chords(group_ids, note)
            for group_id, error in finished.failed.items():
                self._complain(by_id[group_id], _explained(by_id[group_id], error))
            done += [by_id[group_id] for group_id in sorted(finished.done)]
        return done

    def _record_parts(self, findings: Sequence[Finding], revoked: Collection[str]) -> set[str]:
        """Record the parts whose tasks have ended.

        :returns: the chords of which one was recorded, those in ``revoked`` included.
        """
        by_id = {finding.id: finding for finding in findings}
        if not by_id:
            return set()
        serializers = {key: name for name, keys in self._by_serializer(by_id).items() for key in keys}
        parts = []
        for row in self._database.fetch(SQL["ended_parts"], {"group_ids": sorted(by_id)}):
            backend = backend_of(self._app_for(serializers[row["group_id"]]))
            try:
                parts.append((row["group_id"], row["task_id"], row["created_at"], *_as_part(backend, row["meta"])))
            except (KombuError, CeleryError) as error:
                self._complain(by_id[row["group_id"]], _explained(by_id[row["group_id"]], error))
        columns = {
            name: [part[number] for part in parts]
            for number, name in enumerate(("group_ids", "task_ids", "created_at", "states", "payloads"))
        }

        def write(connection: Connection) -> set[str]:
            recorded = {row["group_id"] for row in connection.execute(SQL["record_parts"], columns).fetchall()}
            self._note(connection, [by_id[group_id] for group_id in sorted(recorded.difference(revoked))])
            return recorded

        return {*revoked, *(self._database.run(write) if parts else ())}

    def _revoke(self, findings: Sequence[Finding], messages: Mapping[str, Message]) -> set[str]:
        """End tasks as a worker does that meets them when they have expired or were revoked, parts and all. Their
        results say so, unless another message of the same task id has ended meanwhile.

        :returns: the chords of which one was.
        """
        by_id = {finding.id: finding for finding in findings}
        recorded: set[str] = set()
        for serializer, group_ids in self._by_serializer(by_id).items():
            backend = backend_of(self._app_for(serializer))
            lost = [messages[key] for group_id in group_ids for key in by_id[group_id].messages]
            dead = [it for it in lost if it.awaited and it.dead]
            metas = [backend.revoked(it.task_id, "expired" if it.expired else "revoked") for it in dead]
            columns = {
                "message_ids": [it.message_id for it in dead],
                "resends": [it.resends for it in dead],
                "metas": metas,
                "payloads": [_as_part(backend, meta)[1] for meta in metas],
                "expires": backend.lifetime(REVOKED),
            }

            def write(connection: Connection, columns: Mapping[str, Any] = columns) -> set[str]:
                ours = {row["group_id"] for row in connection.execute(SQL["revoke"], columns).fetchall()}
                self._note(connection, [by_id[group_id] for group_id in sorted(ours)])
                return ours

            recorded |= self._database.run(write)
        return recorded

    def _by_serializer(self, group_ids: Iterable[str]) -> dict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        asked = sorted(group_ids)
        for row in self._database.fetch(SQL["serializers"], {"group_ids": asked}) if asked else ():
            found[self._serializer(row)].append(row["group_id"])
        return found

    def _serializer(self, row: Row) -> str:
        """That which all samples can be decoded with; the recorded one, if none can or there are none."""
        recorded: str = row["result_serializer"]
        for name in dict.fromkeys((recorded, *names(self._app_for(recorded).conf.result_accept_content))):
            backend = backend_of(self._app_for(name))
            with suppress(KombuError):
                for sample in row["samples"]:
                    backend.decode(sample)
                return name
        return recorded

    # -- messages -----------------------------------------------------------------------------------------------

    def _send_again(self, findings: Sequence[Finding], messages: Mapping[str, Message]) -> list[Finding]:
        """Publish each message that is still ours to publish.

        :returns: the findings of those that were.
        """
        of = {key: finding for finding in findings for key in finding.messages if key in messages}
        routes = {key: (messages[key].exchange, messages[key].routing_key) for key in of}
        unbound = self._unbound({route: of[key] for key, route in routes.items()})
        of = {key: finding for key, finding in of.items() if routes[key] not in unbound}
        if not of:
            return []
        taken = {row["message_id"]: row for row in self._take([messages[key] for key in of], of)}
        pushed: list[str] = []
        try:
            with _broker_errors():
                back = self._requeue(
                    [(messages[key], row) for key, row in taken.items() if messages[key].tag is not None]
                )
                self._publish([row for key, row in taken.items() if messages[key].tag is None], of, pushed)
        finally:
            if pushed:
                with suppress(PatchpilotError):  # counted too low it is sent once more before it counts as refused
                    self._database.execute(SQL["pushed"], {"message_ids": pushed})
        return _distinct(of[key] for key in (*back, *pushed))

    def _unbound(self, routes: Mapping[tuple[str, str], Finding]) -> set[tuple[str, str]]:
        """Exchanges, each with a routing key, for which no queue is bound: what is published there goes nowhere.

        :param routes: with a finding for which each matters.
        """
        asked = sorted(route for route in routes if route[0])
        if not asked:
            return set()
        with _broker_errors(), self._app_for("json").producer_pool.acquire(block=True) as producer:
            unbound = {route for route in asked if not _queues(producer.channel, *route)}
        for exchange, routing_key in sorted(unbound):
            self._complain(
                routes[exchange, routing_key],
                NeedsOperator(
                    f"no queue is bound to exchange {exchange!r} for routing key {routing_key!r}: what was sent there "
                    "is sent again once a worker has declared one"
                ),
            )
        return unbound

    def _take(self, seen: Sequence[Message], of: Mapping[str, Finding]) -> list[Row]:
        params = {
            "message_ids": [it.message_id for it in seen], "resends": [it.resends for it in seen],
            "sent_at": [it.sent_at for it in seen],
        }  # fmt: skip

        def write(connection: Connection) -> list[Row]:
            rows = connection.execute(SQL["take"], params).fetchall()
            self._note(connection, _distinct(of[row["message_id"]] for row in rows))
            return rows

        return self._database.run(write)

    def _publish(self, rows: Sequence[Row], of: Mapping[str, Finding], pushed: list[str]) -> None:
        app = self._app_for("json")
        if not rows:
            return
        with app.producer_pool.acquire(block=True) as producer:
            for row in rows:
                try:
                    _know_type(producer.channel, row["exchange"])
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
                except (OperationalError, RedisError, OSError):
                    raise
                except Exception as error:  # noqa: BLE001 - one that cannot be pushed must not keep the others from it
                    finding = of[row["message_id"]]
                    self._complain(finding, _explained(finding, error))
                else:
                    pushed.append(row["message_id"])

    def _requeue(self, abandoned: Sequence[tuple[Message, Row]]) -> list[str]:
        """As kombu does when the visibility timeout is over: out of the unacknowledged, back into the queue, in one.
        Not what somebody has taken since it was looked at.

        :returns: the ids of those that are back.
        """
        back: list[str] = []
        if not abandoned:
            return back
        with self._app_for("json").connection_for_write() as connection:
            channel = connection.default_channel
            for message, row in abandoned:
                _know_type(channel, row["exchange"])
                # zscore is none of the commands that kombu puts its prefix before.
                taken = channel.client.zscore(f"{channel.global_keyprefix}{channel.unacked_index_key}", message.tag)
                if taken == message.taken:
                    channel.qos.restore_by_tag(message.tag)
                    back.append(message.message_id)
        return back

    def _note(self, connection: Connection, findings: Sequence[Finding]) -> None:
        names = ("kind", "id", "diagnosis", "remedy", "callback", "reason")
        columns = {name: [getattr(finding, name) for finding in findings] for name in names}
        if findings:
            connection.execute(SQL["record"], {**columns, "run_id": self._run_id})


def _queues(channel: Any, exchange: str, routing_key: str) -> Collection[str]:
    """Into which queues kombu would put a message."""
    _know_type(channel, exchange)
    found: Collection[str] = channel._lookup(exchange, routing_key)
    return found


def _know_type(channel: Any, exchange: str) -> None:
    """Have a channel match the patterns by which queues are bound to a topic exchange.

    kombu knows the type of what was declared over the same connection only, and takes the rest for direct. In the
    broker only the bindings of a topic exchange have patterns.
    """
    known = not exchange or exchange in channel.state.exchanges
    if not known and any(pattern for _, pattern, _ in channel.get_table(exchange)):
        channel.state.exchanges[exchange] = {"type": "topic", "table": []}


def _still_wanted(findings: Sequence[Finding], messages: Mapping[str, Message]) -> list[Finding]:
    """What is lost as well of headers of which some tasks are ended as revoked: that is sent again."""
    lost = [(it, tuple(key for key in it.messages if not messages[key].dead)) for it in findings]
    name, remedy = "header-message-lost", Remedy.REPUBLISH
    return [replace(it, diagnosis=name, remedy=remedy, messages=keys) for it, keys in lost if keys]


def _distinct(findings: Iterable[Finding]) -> list[Finding]:
    return list({(finding.kind, finding.id, finding.messages): finding for finding in findings}.values())


def _as_part(backend: Backend, meta: bytes) -> tuple[str, bytes]:
    """The state and the payload of the part that a stored result is."""
    decoded = backend.decode_result(meta)
    return decoded["status"], backend.chords.payload(decoded["status"], decoded["result"])


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
    if isinstance(error, DecodeError):  # which would show what could not be decoded
        return NeedsOperator(f"{what} cannot be decoded: add its serialiser to celery.accept_content")
    if isinstance(error, OperationalError | RedisError | OSError):
        return Transient(f"the broker went away during recovery: {error}")
    return NeedsOperator(f"{what} cannot be recovered: {error!r}")
