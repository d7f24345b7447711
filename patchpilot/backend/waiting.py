"""Waiting for results: woken by Valkey, told the truth by PostgreSQL.

``AsyncResult.get`` waits for a PUBLISH on Valkey, as on Celery's Redis backend. A failover can lose that message or
the subscription, so whoever waits also asks PostgreSQL from time to time, and no trouble with Valkey ever reaches the
caller: publishing a task must not fail because a subscription did. Nor does trouble with PostgreSQL reach a waiter: not
known yet is not known, and whoever waits with a timeout hears of that when it is over, as from Celery.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from celery.backends.redis import ResultConsumer as RedisResultConsumer
from celery.result import AsyncResult
from celery.utils.log import get_logger
from redis.exceptions import RedisError

from patchpilot.clock import SYSTEM
from patchpilot.errors import Transient

logger = get_logger(__name__)

ASK_EVERY = 2.0
"""Seconds after which a waiter that heard nothing asks PostgreSQL."""


AT_ONCE = 0.001
"""Seconds to wait of whoever's time is over. Zero, to Celery before 5.7, is no end at all."""


class _Inside(threading.local):
    """What this thread is in the middle of."""

    calls = 0
    """How many calls here that have to do with subscriptions."""

    ends_at = math.inf
    """When the wait that it has just begun is over."""


class ResultConsumer(RedisResultConsumer):  # type: ignore[misc]
    """Celery's consumer of result notifications, made safe against a Valkey that goes away."""

    _asked_at = 0.0
    _subscriptions: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._let_go: deque[str] = deque()
        self._inside = _Inside()

    @property
    def _pubsub(self) -> Any:
        """Celery's name for the subscriptions."""
        return self._subscriptions

    @_pubsub.setter
    def _pubsub(self, pubsub: Any) -> None:
        # redis-py 5.3 to 6.3 sends under a lock, and what finds its connection closed then subscribes anew under the
        # same one: whoever publishes a task after that waits for himself, for ever.
        if isinstance(getattr(pubsub, "_lock", None), type(threading.Lock())):
            pubsub._lock = threading.RLock()
        self._subscriptions = pubsub

    @contextmanager
    def reconnect_on_error(self) -> Iterator[None]:
        # Celery's waits up to 20 s for a connection here, in whoever's thread: a producer's, a finaliser's at exit.
        yield

    def start(self, initial_task_id: str, **kwargs: Any) -> None:
        self._calmly(lambda: super(ResultConsumer, self).start(initial_task_id, **kwargs))
        self._give_back()

    def consume_from(self, task_id: str) -> None:
        self._give_back()
        self._calmly(lambda: super(ResultConsumer, self).consume_from(task_id))
        self._give_back()

    def cancel_for(self, task_id: str) -> None:
        # The garbage collector calls this for a result that nobody has any more, perhaps in the middle of another call
        # here, and some versions of redis-py then wait for their own lock for ever. So that call does it at its end.
        self._let_go.append(task_id)
        self._give_back()

    def _give_back(self) -> None:
        while self._let_go and not self._inside.calls:
            self._calmly(self._unsubscribe)

    def _unsubscribe(self) -> None:
        while self._let_go:
            try:
                task_id = self._let_go.popleft()
            except IndexError:  # another thread was quicker
                return
            super().cancel_for(task_id)

    def _wait_for_pending(self, result: Any, **options: Any) -> Iterator[None]:
        # A set of results is waited for with the backend of the thread that waits. If another thread has sent the
        # tasks, this one has subscribed to nothing yet, and would wait for ever.
        foreign = [it for it in getattr(result, "results", None) or () if self._is_foreign(it)]
        for each in foreign:
            self.backend.add_pending_result(each)
        try:
            yield from super()._wait_for_pending(result, **options)
        finally:
            for each in foreign:
                self.backend.remove_pending_result(each)

    def _is_foreign(self, result: Any) -> bool:
        return isinstance(result, AsyncResult) and result._cache is None and result.backend is not self.backend

    def on_wait_for_pending(self, result: Any, timeout: float | None = None, **options: Any) -> None:
        ends_at = min(_end_of(timeout), self._inside.ends_at)
        with self._not_known_yet(ends_at):
            super().on_wait_for_pending(result, timeout=timeout, **options)
        self._inside.ends_at = ends_at  # Celery drains events next

    def drain_events_until(
        self, p: Any, timeout: float | None = None, on_interval: Callable[[], Any] | None = None
    ) -> Any:
        ends_at, self._inside.ends_at = self._inside.ends_at, math.inf

        def at_intervals() -> None:
            if on_interval is not None:
                with self._not_known_yet(ends_at):  # Celery's own asks how the parents stand
                    on_interval()

        return self.drainer.drain_events_until(
            p,
            timeout=timeout and min(timeout, max(ends_at - SYSTEM.monotonic(), AT_ONCE)),
            on_interval=at_intervals,
            wait=lambda timeout=None: self._drain(timeout, ends_at),
        )

    def get(self, plain: Callable[..., Any], result: Any, timeout: float | None, *args: Any, **options: Any) -> Any:
        """Celery's ``AsyncResult.get``, which asks how the parents stand before it waits."""
        self._inside.ends_at = _end_of(timeout)
        try:
            return plain(result, timeout, *args, **options)
        finally:
            self._inside.ends_at = math.inf

    def ask_parents(self, plain: Callable[[Any], None], result: Any) -> None:
        """What it does for that, at the beginning and at intervals."""
        with self._not_known_yet(self._inside.ends_at):
            plain(result)

    @contextmanager
    def _not_known_yet(self, ends_at: float) -> Iterator[None]:
        """Inside, PostgreSQL is asked until ``ends_at``, and to have no answer by then is no error."""
        try:
            with self.backend.database.within(ends_at - SYSTEM.monotonic()):
                yield
        except Transient as error:
            logger.debug("Waiting for results goes on: %s", error)

    def drain_events(self, timeout: float | None = None) -> None:
        self._drain(timeout, math.inf)

    def _drain(self, timeout: float | None, ends_at: float) -> None:
        timeout = timeout and min(timeout, max(ends_at - SYSTEM.monotonic(), AT_ONCE))
        try:
            self._calmly(lambda: super(ResultConsumer, self).drain_events(timeout=timeout))
        finally:
            self._give_back()
        now = SYSTEM.monotonic()
        if self._asked_at + ASK_EVERY <= now < ends_at:
            self._asked_at = now
            self._ask(ends_at)

    def _ask(self, ends_at: float) -> None:
        """Take the results that are ready from PostgreSQL, for every task somebody waits for."""
        waited_for = {task_id for pending in self._pending_results for task_id in pending}
        metas = []
        with self._not_known_yet(ends_at):
            metas = self.backend.ready_metas(waited_for)
        for meta in metas:
            self.on_state_change(meta, None)
        if self._pubsub is None:
            for task_id in waited_for:
                self.consume_from(task_id)

    def _calmly(self, work: Callable[[], Any]) -> bool:
        self._inside.calls += 1
        try:
            work()
        except (RedisError, OSError, RuntimeError, ImportError) as error:  # ImportError: at the interpreter's end
            if isinstance(error, TimeoutError):
                raise  # an ordinary poll that heard nothing
            logger.debug("Result notifications are interrupted: %r", error)
            # The next call subscribes on a new connection; what was subscribed to is asked of PostgreSQL.
            pubsub = self._pubsub
            self._pubsub = None
            self.subscribed_to.clear()
            if pubsub is not None:
                with suppress(RedisError, OSError):
                    pubsub.close()
            return False
        finally:
            self._inside.calls -= 1
        return True


def _end_of(timeout: float | None) -> float:
    return math.inf if timeout is None else SYSTEM.monotonic() + timeout


def _bound_results(get: Callable[..., Any], ask_parents: Callable[[Any], None]) -> None:
    """Have our consumer stand around what ``AsyncResult`` does before it calls any backend's method for waiting."""

    def consumer(result: Any) -> Any:
        found = getattr(result.backend, "result_consumer", None)
        return found if isinstance(found, ResultConsumer) else None

    @wraps(get)
    def bounded_get(self: Any, timeout: float | None = None, *args: Any, **options: Any) -> Any:
        ours = consumer(self)
        if ours is None:
            return get(self, timeout, *args, **options)
        return ours.get(get, self, timeout, *args, **options)

    @wraps(ask_parents)
    def calmly_ask_parents(self: Any) -> None:
        ours = consumer(self)
        if ours is None:
            ask_parents(self)
        else:
            ours.ask_parents(ask_parents, self)

    AsyncResult.get = AsyncResult.wait = bounded_get
    AsyncResult._maybe_reraise_parent_error = calmly_ask_parents


_bound_results(AsyncResult.get, AsyncResult._maybe_reraise_parent_error)
