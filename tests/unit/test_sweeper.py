"""When a worker sweeps, without a server: the clock is ours, and what a sweep does is a list."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import timedelta

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from patchpilot.cli.at_hand import NAME, _of_application
from patchpilot.cli.recover import site
from patchpilot.clock import SYSTEM, FakeClock
from patchpilot.errors import NeedsOperator, Transient
from patchpilot.recovery.at_hand import at_hand
from patchpilot.recovery.findings import Applied, Finding, Remedy
from patchpilot.recovery.sweep import Sweep
from patchpilot.recovery.sweeper import PAUSE, Pace, Sweeper, _told
from patchpilot.recovery.turns import Turn
from patchpilot.settings import Recovery, Settings
from patchpilot.workers.application import Site, application, site_of

AGE = timedelta(minutes=5)
SLACK = 30.0
Answer = tuple[Turn, bool] | Exception


class Worker:
    """A sweeper whose thread does not run: :meth:`until` is the thread."""

    def __init__(self, *answers: Answer, every: timedelta | None = None) -> None:
        self.clock = FakeClock()
        self.tries: list[tuple[float, float]] = []
        """When, and how long after a sweep was due."""
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens during a sweep."""
        self._answers = list(answers)
        self.sweeper = Sweeper(self._once, Pace(AGE, every), self.clock)
        self.sweeper._thread = object()  # type: ignore[assignment] - one that has been started

    def _once(self, since: timedelta) -> tuple[Turn, bool]:
        self.tries.append((self.clock.monotonic(), since.total_seconds()))
        answer = self._answers.pop(0)
        self.meanwhile()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def until(self, seconds: float) -> None:
        while (pause := self.sweeper.try_now()) is not None and self.clock.monotonic() + pause <= seconds:
            self.clock.sleep(pause)
        self.clock.sleep(seconds - self.clock.monotonic())


def test_once_after_each_connection() -> None:
    worker = Worker((Turn.OURS, True), (Turn.COVERED, True))
    worker.until(1000)
    assert worker.tries == []
    worker.sweeper.connected()
    worker.until(2000)
    assert worker.tries == [(1330, SLACK)]
    worker.sweeper.connected()
    worker.until(3000)
    assert worker.tries[1:] == [(2330, SLACK)]


def test_a_connection_that_is_lost_again_postpones() -> None:
    worker = Worker((Turn.OURS, True))
    worker.sweeper.connected()
    worker.until(200)
    worker.sweeper.connected()
    worker.until(2000)
    assert worker.tries == [(530, SLACK)]


def test_a_connection_made_during_a_sweep_is_followed_by_another() -> None:
    worker = Worker((Turn.OURS, True), (Turn.OURS, True))
    worker.sweeper.connected()
    worker.meanwhile = worker.sweeper.connected
    worker.until(400)
    worker.meanwhile = lambda: None
    worker.until(5000)
    assert [at for at, _ in worker.tries] == [330, 660]


def test_a_turn_that_is_taken_is_asked_for_again() -> None:
    """It is due as of the same moment, so that a sweep that began too early does not count."""
    worker = Worker((Turn.TAKEN, True), (Turn.TAKEN, True), (Turn.OURS, True))
    worker.sweeper.connected()
    worker.until(5000)
    pause = PAUSE.total_seconds()
    assert worker.tries == [(330, SLACK), (330 + pause, SLACK + pause), (330 + 2 * pause, SLACK + 2 * pause)]


@pytest.mark.parametrize("error", [Transient("away"), KeyError("bug")])
def test_a_sweep_that_fails_is_a_line_in_the_log_and_tried_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(error, (Turn.OURS, True))
    worker.sweeper.connected()
    with caplog.at_level("WARNING"):
        worker.until(5000)
    assert [at for at, _ in worker.tries] == [330, 330 + PAUSE.total_seconds()]
    [record] = [it for it in caplog.records if "did not get through" in it.message]
    assert bool(record.exc_info) is isinstance(error, KeyError)


def test_what_could_not_be_settled_is_looked_at_again() -> None:
    worker = Worker((Turn.OURS, False), (Turn.OURS, True))
    worker.sweeper.connected()
    worker.until(5000)
    assert [at for at, _ in worker.tries] == [330, 660]


def finding(name: str, **changes: object) -> Finding:
    values: dict[str, object] = {"kind": "task", "diagnosis": "message-lost", "remedy": Remedy.REPUBLISH, "reason": "x"}
    return Finding(id=name, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "applied", "left"),
    [
        ("ab", "ab", 0), ("ab", "a", 1),
        # It took two remedies; something further out was remedied as well; there are two messages of one task.
        ("ab", "aa", 1), ("ab", "ac", 1), ("aa", "a", 1),
    ],
)  # fmt: skip
def test_what_is_left_is_told_by_what_it_is(found: str, applied: str, left: int) -> None:
    incurable = finding("incurable", remedy=Remedy.NONE)
    done = tuple(Applied.of(finding(it), SYSTEM.now()) for it in applied)
    sweep = Sweep((*map(finding, found), incurable), done)
    assert sweep.left == left
    assert _told(sweep) is (left == 0)
    assert not _told(Sweep((finding("x", diagnosis="unknown", remedy=Remedy.NONE),)))


def test_then_every_so_often_if_it_is_asked_for() -> None:
    worker = Worker(*[(Turn.OURS, True)] * 3, every=timedelta(hours=1))
    worker.sweeper.connected()
    worker.until(9000)
    assert [at for at, _ in worker.tries] == [330, 3960, 7590]


@pytest.mark.parametrize(
    ("url", "options", "endpoint"),
    [
        ("redis://:token@h:1/2", None, "redis://:token@h:1/2"),
        (["redis://h:1/2", "redis://other:1/2"], None, "redis://h:1/2"),
        ("redis://h:1/2;redis://other:1/2", None, "redis://h:1/2"),
        ("redis://h:1/2", True, "rediss://h:1/2"),
        (
            "rediss://h:1/2",
            {"ssl_cert_reqs": "required", "ssl_ca_certs": "/etc/a b.pem"},
            "rediss://h:1/2?ssl_cert_reqs=required&ssl_ca_certs=%2Fetc%2Fa+b.pem",
        ),
    ],
)
def test_the_site_of_an_application(url: object, options: object, endpoint: str) -> None:
    app = Celery("at-hand", set_as_current=False)
    app.conf.update(
        broker_url=url, broker_use_ssl=options, patchpilot_postgres="postgresql://h/x", accept_content=["json", "yaml"],
        broker_transport_options={"global_keyprefix": "shop:", "fanout_prefix": False}, patchpilot_broker="orders",
        control_exchange="mine",
    )  # fmt: skip
    site = site_of(app)
    assert (site.results, site.results_prefix, site.in_results) == ("", "", ("json", "yaml"))
    assert (site.endpoint, site.dsn, site.key_prefix) == (endpoint, "postgresql://h/x", "shop:")
    assert (site.accept_content, site.broker) == (("json", "yaml"), "orders")
    assert (site.control_exchange, site.fanout_prefix) == ("mine", False)


@pytest.mark.parametrize(
    ("backend", "options", "results"),
    [
        ("patchpilot+redis://:token@r:1/2", None, "redis://:token@r:1/2"),
        ("redis://r:1/2", None, "redis://r:1/2"),
        ("patchpilot+rediss://r:1/2?ssl_cert_reqs=CERT_NONE", None, "rediss://r:1/2?ssl_cert_reqs=none"),
        ("patchpilot+redis://r:1/2", {"ssl_cert_reqs": ssl.CERT_NONE}, "rediss://r:1/2?ssl_cert_reqs=none"),
        (
            "patchpilot+redis://r:1/2",
            {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": False},
            "rediss://r:1/2?ssl_cert_reqs=required&ssl_check_hostname=False",
        ),
        ("rpc://", None, ""),
    ],
)
def test_the_result_backend_of_an_application_is_part_of_its_site(backend: str, options: object, results: str) -> None:
    app = Celery("at-hand", broker="redis://h:1/2", backend=backend, set_as_current=False)
    app.conf.update(
        patchpilot_postgres="postgresql://h/x", redis_backend_use_ssl=options,
        result_accept_content=["json", "pickle"], result_backend_transport_options={"global_keyprefix": "shop:"},
    )  # fmt: skip
    here, config = at_hand(app)
    by_command = site(_of_application(Settings(), here, config), NAME)
    for it in (here, by_command):
        assert (it.endpoint, it.results, it.results_prefix) == ("redis://h:1/2", results, "shop:")
        assert (it.accept_content, it.in_results) == (("json",), ("json", "pickle"))
    stand_in = application(here)
    assert list(stand_in.conf.result_accept_content) == ["json", "pickle"]
    assert stand_in.conf.result_backend == f"patchpilot+{results or here.endpoint}"


def test_a_result_backend_whose_url_cannot_be_read_is_refused_without_its_secret() -> None:
    app = Celery("at-hand", broker="redis://h", backend="patchpilot+redis://:token@h/0?no=1", set_as_current=False)
    app.conf.patchpilot_postgres = "postgresql://h/x"
    with pytest.raises(NeedsOperator) as raised:
        at_hand(app)
    assert "result backend" in str(raised.value)
    assert "token" not in str(raised.value)


def test_an_application_without_redis_has_none() -> None:
    app = Celery("elsewhere", broker="amqp://h//", set_as_current=False)
    app.conf.patchpilot_postgres = "postgresql://h/x"
    with pytest.raises(NeedsOperator, match="nothing to recover"):
        site_of(app)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:token@h:abc/0", "redis://:token@[::1/0", "redis://:token@h/abc", "redis://:token@h/0?socket_timeout=abc",
        "rediss://:token@h/0?ssl_cert_reqs=bogus",
    ],
)  # fmt: skip
def test_a_broker_whose_url_cannot_be_read_is_refused_without_its_secret(url: str) -> None:
    app = Celery("at-hand", set_as_current=False)
    app.conf.update(broker_url=url, patchpilot_postgres="postgresql://h/x")
    with pytest.raises(NeedsOperator) as raised:
        at_hand(app)
    assert "broker URL" in str(raised.value)
    assert "token" not in str(raised.value)


def test_a_worker_counts_as_dead_after_as_long_as_for_the_command_line() -> None:
    app = Celery("at-hand", set_as_current=False)
    app.conf.update(broker_url="redis://", patchpilot_postgres="postgresql://h/x")
    assert at_hand(app)[0].dead_after == Recovery().dead_after == Site("redis://", "").dead_after
    app.conf.patchpilot_recovery_dead_after = 7
    assert at_hand(app)[0].dead_after == timedelta(seconds=7)
    app.conf.patchpilot_recovery_dead_after = 3
    with pytest.raises(ImproperlyConfigured, match=r"^patchpilot_recovery_dead_after is 3: it must be 4s or more"):
        at_hand(app)
