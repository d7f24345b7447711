"""What a worker holds: the messages it has taken and that are not at their end.

Celery's own answer (``inspect query_task``) goes by task id and forgets a retry or a replaced task, which has the id of
the task before it, and does not know what waits for its ETA or its rate limit on older versions. So workers answer for
themselves, by message: everything that the channel has delivered and nobody acknowledged, whatever it waits for, and
everything acknowledged early that is being run.

There is one more place. A worker asks for its next message and waits for it, and by the time that one comes it may
have no hands free. The reply, and with it a message that is in no queue any more, then stays unread in the socket for
as long as what the worker is doing takes. So a worker looks there too, without taking it out.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable
from typing import Any

from kombu.utils.eventio import READ, poll

from patchpilot.backend.config import MESSAGE_ID
from patchpilot.backend.instance import this_worker
from patchpilot.clock import SYSTEM

COMMAND = "patchpilot_held"
"""The remote control command: which of these messages does this worker hold?"""


def install() -> None:
    """Teach this process's worker the command. Only for worker processes: it loads Celery's worker."""
    from celery.worker.control import Panel, inspect_command

    if COMMAND not in Panel.data:
        inspect_command(name=COMMAND, args=[("message_ids", list)])(_held)


def _held(state: Any, message_ids: Iterable[str] = (), task_ids: Iterable[str] = (), **_: Any) -> dict[str, Any]:
    """Answer the command: this worker instance, and those of ``message_ids`` that it holds.

    Of the tasks ``task_ids`` also those that are running here, and those that it knows to be revoked. ``began``: how
    many seconds ago it began with those that are being run. ``unread``: it has been sent something that nobody has read
    yet, and that it cannot look into.
    """
    from celery.worker import state as worker

    asked, tasks = set(message_ids), set(task_ids)
    unread, whole = _unread(state.consumer)
    running = dict(_running())
    held = {*_delivered(state.consumer), *running, *_within(unread, asked)}
    now = SYSTEM.now().timestamp()
    return {
        "instance": this_worker(),
        "held": sorted(held & asked),
        "began": {key: now - at for key, at in running.items() if key in asked and at is not None},
        "active": sorted(tasks.intersection(request.id for request in worker.active_requests)),
        "revoked": sorted(task_id for task_id in tasks if task_id in worker.revoked),
        "unread": not whole,
    }


def _delivered(consumer: Any) -> Iterable[str]:
    # kombu's record of what was delivered and not yet acknowledged; it strikes what was acknowledged ("dirty") lazily.
    qos = getattr(getattr(getattr(consumer, "task_consumer", None), "channel", None), "qos", None)
    delivered, acknowledged = getattr(qos, "_delivered", None) or {}, getattr(qos, "_dirty", ())
    for tag, message in list(delivered.items()):
        if tag not in acknowledged and (found := (message.headers or {}).get(MESSAGE_ID)):
            yield found


def _running() -> Iterable[tuple[str, float | None]]:
    """What is being run or is about to be, and since when, by this machine's clock."""
    from celery.worker import state

    for request in (*state.reserved_requests, *state.active_requests):
        if found := request.request_dict.get(MESSAGE_ID):
            yield found, request.time_start


PEEK = 1 << 20
"""How many bytes of an unread reply are looked at."""


def _unread(consumer: Any) -> tuple[bytes, bool]:
    """The message that the broker has sent and nobody has read, and whether that is all of it."""
    channel = getattr(getattr(consumer, "task_consumer", None), "channel", None)
    asking = getattr(getattr(channel, "_in_poll", None), "_sock", None)
    if asking is None:
        return b"", True
    try:
        if not _readable(asking):  # reading would wait
            return b"", True
        found = bytes(asking.recv(PEEK, socket.MSG_PEEK))
    except (OSError, ValueError):  # lost, or TLS, where nothing can be seen without taking it out
        return b"", False
    return found, _is_whole(found)


def _readable(connection: Any) -> bool:
    poller = poll()  # kombu's: eventlet takes the standard library's away
    try:
        poller.register(connection, READ)
        return bool(getattr(connection, "pending", int)()) or bool(poller.poll(0))
    finally:
        poller.close()


def _is_whole(reply: bytes) -> bool:
    """Whether a reply to BRPOP is there to its end: ``*-1``, or ``*2``, a key and a message, each with its length."""
    lines = reply.split(b"\r\n", 3)
    if not reply or lines[0] in (b"*-1", b"_"):
        return True
    if lines[0] != b"*2" or len(lines) < 4:
        return False
    length, found, message = lines[3].partition(b"\r\n")
    return bool(found) and len(message) >= int(length[1:])


def _within(reply: bytes, message_ids: Collection[str]) -> Iterable[str]:
    return (message_id for message_id in message_ids if message_id.encode() in reply) if reply else ()
