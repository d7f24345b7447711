"""What a monitor can ask a continuous recovery: ``/healthz``, and ``/metrics`` for Prometheus.

Labels carry kinds, diagnoses, remedies and classes of errors; never an id, a name of a task, or an address.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from patchpilot.clock import SYSTEM, Clock
from patchpilot.dsn import mask
from patchpilot.errors import NeedsOperator, Usage
from patchpilot.recovery.watch import Pass

MISSED = 3
"""After so many intervals without the end of a pass, and :data:`LONGEST`, something is wrong."""

LONGEST = timedelta(minutes=1)
"""How long a pass may take beside that: it waits for workers that are alive and do not answer."""


class Health:
    """Whether recovery works."""

    def __init__(self, every: timedelta, clock: Clock = SYSTEM) -> None:
        self._patience = (MISSED * every + LONGEST).total_seconds()
        self._clock = clock
        self._ended = clock.monotonic()
        self._problem: str | None = "no pass has ended yet"

    def passed(self, _done: Pass) -> None:
        self._ended, self._problem = self._clock.monotonic(), None

    def failed(self, error: Exception) -> None:
        self._ended, self._problem = self._clock.monotonic(), f"the last pass failed: {mask(str(error))}"

    @property
    def problem(self) -> str | None:
        """What is wrong, for a person; None if nothing is."""
        silence = self._clock.monotonic() - self._ended
        return f"no pass has ended for {silence:.0f} s" if silence > self._patience else self._problem


class Metrics:
    """The numbers, in a registry of their own."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self.registry = CollectorRegistry()
        where: dict[str, Any] = {"namespace": "patchpilot", "subsystem": "recovery", "registry": self.registry}
        self._passes = Counter("passes", "Passes over the site, by how they ended", ("outcome",), **where)
        self._seconds = Histogram("pass_seconds", "How long a pass took that came to its end", **where)
        self._findings = Gauge("findings", "What the last pass found", ("kind", "diagnosis"), **where)
        self._remedies = Counter("remedies", "Remedies applied", ("kind", "remedy"), **where)
        self._open = Gauge("open_chords", "Chords whose callback is not out yet", **where)
        self._oldest = Gauge("oldest_open_chord_age_seconds", "Age of the oldest open chord", **where)
        self._stuck = Gauge("stuck", "Findings of the last pass that can be recovered and were not", **where)
        self._unrecoverable = Gauge("unrecoverable_chords", "Open chords whose callback could not be stored", **where)
        self._success = Gauge("last_success_timestamp_seconds", "When a pass last came to its end, Unix time", **where)
        self._errors = Counter("errors", "Passes that failed, by the class of the error", ("error",), **where)
        for outcome in ("ok", "failed"):
            self._passes.labels(outcome)

    def passed(self, done: Pass) -> None:
        self._passes.labels("ok").inc()
        self._seconds.observe(done.seconds)
        self._findings.clear()
        for (kind, diagnosis), number in Tally((it.kind, it.diagnosis) for it in done.sweep.findings).items():
            self._findings.labels(kind, diagnosis).set(number)
        for each in done.sweep.applied:
            self._remedies.labels(each.kind, each.remedy).inc()
        self._open.set(done.backlog.open)
        self._oldest.set(done.backlog.oldest.total_seconds())
        self._unrecoverable.set(done.backlog.unrecoverable)
        self._stuck.set(done.sweep.left)
        self._success.set(self._clock.now().timestamp())

    def failed(self, error: Exception) -> None:
        self._passes.labels("failed").inc()
        self._errors.labels(type(error).__name__).inc()


class _Server(ThreadingMixIn, TCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, where: tuple[str, int], health: Health, metrics: Metrics) -> None:
        self.address_family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        self.health, self.metrics = health, metrics
        super().__init__(where, _Handler)

    def handle_error(self, *_: object) -> None:
        """Who asked has gone away before the answer: nobody needs to know."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, generate_latest(self.server.metrics.registry), CONTENT_TYPE_LATEST)
        elif path == "/healthz":
            problem = self.server.health.problem
            self._answer(503 if problem else 200, f"{problem or 'ok'}\n".encode())
        else:
            self._answer(404, b"ask for /healthz or /metrics\n")

    def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not one line for each time that somebody asks."""


def address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``[::1]:PORT`` or ``:PORT``, which is all interfaces.

    :raises Usage: if it is none of these.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = host[1:-1] if bracketed else host
    good = colon and port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535
    if not good or set(plain) & {"[", "]"} or (bracketed and not plain):
        raise Usage(f"--listen: {text!r} is no address; write it like 127.0.0.1:9090 or :9090")
    return plain, int(port)


@contextmanager
def serving(where: tuple[str, int], health: Health, metrics: Metrics) -> Iterator[str]:
    """Answer for as long as the block lasts. Yields the address, with the port that it has if port 0 was asked for.

    :raises NeedsOperator: if the address cannot be had.
    """
    try:
        server = _Server(where, health, metrics)
    except OSError as error:
        raise NeedsOperator(f"--listen: cannot listen on {where[0]}:{where[1]}: {error.strerror or error}") from None
    thread = threading.Thread(target=server.serve_forever, name="patchpilot-monitor", daemon=True)
    thread.start()
    try:
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
        yield f"{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
