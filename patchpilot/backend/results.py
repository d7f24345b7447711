"""Results, in PostgreSQL: stored, read and purged there; Valkey only tells those who wait."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from celery import Celery, states
from celery.backends.redis import RedisBackend
from celery.exceptions import TaskRevokedError
from celery.result import result_from_tuple
from celery.utils.log import get_logger
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from redis.exceptions import ReadOnlyError, RedisError

from patchpilot.backend import errbacks
from patchpilot.backend.chords import waiting
from patchpilot.backend.config import MESSAGE_ID, Config
from patchpilot.backend.deferred import defer
from patchpilot.backend.ending import Endings
from patchpilot.backend.install import RESULTS, set_unless_set
from patchpilot.backend.purge import purge
from patchpilot.backend.sockets import insisting
from patchpilot.backend.versions import check_celery
from patchpilot.backend.waiting import ResultConsumer
from patchpilot.backend.whose import whose
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.connection import database
from patchpilot.postgres.queries import queries

logger = get_logger(__name__)

SQL = queries("results")


class Results(RedisBackend):  # type: ignore[misc]
    """The part of the backend that has to do with results."""

    ResultConsumer = ResultConsumer

    # PostgreSQL keeps results until they are purged: by `patchpilot db purge`, or by Celery beat's daily clean-up.
    supports_autoexpire = False

    def __init__(self, *args: Any, app: Celery, **kwargs: Any) -> None:
        check_celery()
        set_unless_set(app.conf, RESULTS)
        super().__init__(*args, app=app, **kwargs)
        self.connparams: dict[str, Any] = insisting(self.connparams)
        self.config = Config.of(self.app)
        self.connection_errors: tuple[type[Exception], ...] = (*self.connection_errors, ReadOnlyError)
        self.database = database(
            self.config.dsn,
            budget=self.config.postgres_budget,
            patience=self.config.patience,
            prepare=self.config.prepared_statements,
        )
        self.endings = Endings(self.config.journal)

    def _store_result(
        self, task_id: str | None, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        if task_id is None:  # nobody can ask for it: the error of a chord with a chain for a body, before Celery 5.6
            return result
        payload = self._meta(task_id, result, state, traceback, request)
        row = {"task_id": str(task_id), "state": state, "meta": ensure_bytes(payload), "expires": self.lifetime(state)}
        row |= whose(task_id, state, request)
        if defer(row, request):
            return result
        try:
            if getattr(request, "patchpilot_done", None) == task_id:
                row |= self._end(request, result)
                request.patchpilot_part = waiting(self.endings.record(lambda: self.database.fetch(SQL["finish"], row)))
                request.patchpilot_ended = True
            elif request is not None and state in states.READY_STATES:
                self.endings.record(lambda: self.database.execute(SQL["store"], row))
            else:
                self.database.execute(SQL["store"], row)
        except PatchpilotError as error:
            if state not in states.READY_STATES:  # STARTED, RETRY, progress: not worth a task
                logger.warning("State %s of %s was not recorded: %s", state, task_id, error)
                return result
            raise
        self.notify(task_id, payload)
        return result

    def _meta(self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        if errbacks.are_called_elsewhere():
            meta["children"] = []  # recovery stores what a worker would have: there, a task is current
        return self.encode(meta)

    def revoked(self, task_id: str, reason: str) -> bytes:
        """The result of a task that was revoked or has expired, as it is stored."""
        error = self.encode_result(TaskRevokedError(reason), states.REVOKED)
        payload: bytes = ensure_bytes(self._meta(task_id, error, states.REVOKED))
        return payload

    def _end(self, request: Any, result: Any) -> dict[str, Any]:
        """What a successful task leaves behind besides its result: a part of a chord, a message, a start."""
        in_chord = request.chord is not None and request.group
        start = getattr(request, "patchpilot_start", None)
        nothing = {"scope": None, "attempt": None, "owner": None}
        return {
            **(nothing if start is None else start.row()),
            "group_id": str(request.group) if in_chord else None,
            "position": request.group_index or 0,
            "payload": ensure_bytes(self.encode(result)) if in_chord else None,
            "message_id": getattr(request, MESSAGE_ID, None),
        }

    def lifetime(self, state: str) -> timedelta | None:
        """How long a result is kept; None for ever."""
        failures = getattr(self, "failure_expires", self.expires)  # since Celery 5.7
        seconds = failures if state == states.FAILURE else self.expires
        return timedelta(seconds=seconds) if seconds else None

    def notify(self, task_id: str, payload: Any) -> bool:
        """Wake whoever waits for the result, and tell ``on_message`` of a state. A hint: it is in PostgreSQL anyway.

        :returns: whether Valkey took it.
        """
        try:
            self.client.publish(self.get_key_for_task(task_id), payload)
        except (RedisError, OSError) as error:
            logger.debug("Nobody was notified of the result of %s: %r", task_id, error)
            return False
        return True

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        for row in self.database.fetch(SQL["get"], {"task_ids": [str(task_id)]}):
            meta: dict[str, Any] = self.decode_result(row["meta"])
            return meta
        return {"status": states.PENDING, "result": None}

    def task_result_exists(self, task_id: str) -> bool:
        return bool(self.database.fetch(SQL["get"], {"task_ids": [str(task_id)]}))

    def mget(self, keys: Iterable[Any]) -> list[Any]:
        """The encoded results under Celery's keys, None where there is none."""
        task_ids = [self._strip_prefix(key) for key in keys]
        found = {row["task_id"]: row["meta"] for row in self.database.fetch(SQL["get"], {"task_ids": task_ids})}
        return [found.get(task_id) for task_id in task_ids]

    def ready_metas(self, task_ids: Iterable[str]) -> list[dict[str, Any]]:
        """The decoded results of those of ``task_ids`` that are done."""
        rows = self.database.fetch(SQL["get"], {"task_ids": [str(task_id) for task_id in task_ids]})
        metas = [self.decode_result(row["meta"]) for row in rows]
        return [meta for meta in metas if meta["status"] in states.READY_STATES]

    def _forget(self, task_id: str) -> None:
        self.database.execute(SQL["forget"], {"task_id": str(task_id)})

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = ensure_bytes(self.encode({"result": result.as_tuple()}))
        row = {"group_id": str(group_id), "meta": payload, "expires": self.lifetime(states.SUCCESS)}
        self.database.execute(SQL["save_group"], row)
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        for row in self.database.fetch(SQL["get_group"], {"group_id": str(group_id)}):
            meta: dict[str, Any] = self.decode(row["meta"])
            meta["result"] = result_from_tuple(meta["result"], self.app)
            return meta
        return None

    def _delete_group(self, group_id: str) -> None:
        self.database.execute(SQL["delete_group"], {"group_id": str(group_id)})

    def cleanup(self) -> None:
        """Remove what is over. Celery beat calls this once a day, by its task ``celery.backend_cleanup``."""
        removed = purge(self.database, self.config.retention)
        logger.info("Purged %s", ", ".join(f"{number} {what}" for what, number in removed.items()))
