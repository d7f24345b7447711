"""Settings: what is refused, in which words, and what goes before what."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from patchpilot.durations import parse_duration
from patchpilot.errors import Usage
from patchpilot.settings import Celery, Metric, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("PATCHPILOT_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("300ms", 0.3),
        ("45s", 45),
        ("5m", 300),
        ("1h30m", 5400),
        ("24h", 86400),
        ("1.5h", 5400),
        ("7d", 604800),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "5", "5 m", "m", "-5m", "5m!", "five minutes", "5M", "1e3s", "99999999999d", "\u0663s"]
)
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|longer than ten years"):
        parse_duration(text)


def test_the_example_shows_four_clusters_of_which_one_is_the_broker() -> None:
    settings = load(ROOT / "config/patchpilot.example.toml")
    roles = sorted(cluster.role for cluster in settings.clusters.values())
    assert roles == ["broker", "cache", "cache", "volatile"]
    assert settings.runbook.grace == timedelta(minutes=5)


@pytest.mark.parametrize(("text", "value"), [("false", False), ("True", True), ("shop-{db}-", "shop-{db}-")])
def test_the_fanout_prefix_from_the_environment(text: str, value: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHPILOT_CELERY__FANOUT_PREFIX", text)
    assert load(ROOT / "config/patchpilot.example.toml").celery.fanout_prefix == value


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('accept_content = ["json", "nope"]', "no serialiser 'nope' here"),
        ("priority_steps = []", "from the lowest to the highest"),
        ("priority_steps = [-1]", "none below 0"),
        ("priority_steps = [3, 1]", "from the lowest to the highest"),
        ("priority_steps = [3, 3]", "from the lowest to the highest"),
    ],
)
def test_what_no_application_has_is_refused(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "patchpilot.toml"
    path.write_text(f"[celery]\n{line}\n")
    with pytest.raises(Usage, match=re.escape(why)):
        load(path)
    path.write_text('[celery]\naccept_content = ["json", "pickle", "application/json"]\npriority_steps = [0, 5]\n')
    assert load(path).celery.priority_steps == (0, 5)


def test_what_the_example_comments_out_can_be_commented_in(tmp_path: Path) -> None:
    text = (ROOT / "config/patchpilot.example.toml").read_text()
    block = re.search(r"# (\[runbook\.abort_metric\]\n(?:# .+\n)+)", text)
    assert block
    path = tmp_path / "patchpilot.toml"
    path.write_text(text.replace(block[0], block[0].replace("# ", "", 1).replace("\n# ", "\n")))
    metric = load(path).runbook.abort_metric
    assert metric is not None
    assert (metric.points, metric.above, metric.statistic) == (3, 100, "Sum")


def test_the_labs_configuration_is_the_one_that_lab_up_writes() -> None:
    from patchpilot.lab import background
    from patchpilot.lab.scenario import CALM

    facts = {"postgres": "x", "region": "eu-central-1", "elasticache": "http://x",
             "replication_group": "lab-broker", "endpoint": "redis://x"}  # fmt: skip
    written = ROOT / "config/lab.toml"
    import tomllib

    ours = tomllib.loads(written.read_text())
    theirs = tomllib.loads(background.configuration(facts, Path("/x"), CALM))
    del theirs["postgres"], theirs["aws"]["endpoint_url"], theirs["aws"]["credentials_file"]
    del theirs["clusters"]["broker"]["endpoint"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[runbook]\ngarce = '5m'", "runbook.garce: unknown key"),
        ("[runbok]\n", "runbok: unknown key"),
        ("[runbook]\ngrace = '5 minutes'", "runbook.grace: '5 minutes' is not a duration"),
        ("[recovery]\ndead_after = '3s'", "recovery.dead_after: it must be 4s or more"),
        ("[runbook]\ngrace = 300", "runbook.grace: 300 is not a duration"),
        ("[clusters.b]\nrole = 'queue'\nreplication_group = 'x'", "clusters.b.role: Input should be"),
        ("[clusters.b]\nrole = 'broker'", "clusters.b.replication_group: Field required"),
        (
            "[clusters.b]\nrole = 'broker'\nreplication_group = '9x'",
            "clusters.b.replication_group: String should match",
        ),
        ("[runbook]\nabort_stuck = -1", "runbook.abort_stuck: Input should be greater than or equal to 0"),
        ("[runbook.abort_metric]\nnamespace = 'n'\nname = 'm'", "runbook.abort_metric: set one of above and below"),
        (
            "[runbook.abort_metric]\nnamespace = 'n'\nname = 'm'\nabove = 1\nbelow = 1",
            "runbook.abort_metric: set one of above and below",
        ),
        (
            "[runbook.abort_metric]\nnamespace = 'n'\nname = 'm'\nabove = nan",
            "runbook.abort_metric.above: Input should be a finite number",
        ),
        ("[aws]\nendpoint_url = 'not-a-url'", "aws.endpoint_url: is no URL like https://"),
        ("[aws]\nendpoint_url = 'ftp://h'", "aws.endpoint_url: is no URL like https://"),
        ("[aws]\nendpoint_url = ''", "aws.endpoint_url: String should match"),
        ("[aws]\nregion = 'not a region!'", "aws.region: String should match"),
        ("[aws]\nprofile = ' '", "aws.profile: String should match"),
        ("[clusters.b]\nrole='broker'\nreplication_group='x'\nregion=''", "clusters.b.region: String should match"),
        ("[runbook]\npoll_interval = '0s'", "runbook.poll_interval: must be between 100ms and 1h"),
        ("[runbook]\npoll_interval = '2h'", "runbook.poll_interval: must be between 100ms and 1h"),
        ("[runbook]\ngrace = '-5m'", "runbook.grace: '-5m' is not a duration"),
        ("[runbook]\ngrace = '24h'", "runbook.grace 1d 0h must be below recovery.max_age 1d 0h"),
        ("[runbook]\nsettle = '0s'", "runbook.settle: must be between 1s and 24h"),
        ("[runbook]\nstall = '0s'", "runbook.stall: must be between 1s and 14d"),
        ("[runbook]\nnode_stall = '15d'", "runbook.node_stall: must be between 1s and 14d"),
        ("[runbook]\nobserve = '0s'", "runbook.observe: must be between 1s and 14d"),
        ("[runbook]\nquiet = '0ms'", "runbook.quiet: must be between 1s and 14d"),
        ("[runbook]\nverify_timeout = '0s'", "runbook.verify_timeout: must be between 1s and 14d"),
        ("[runbook]\ntime_budget = '0s'", "runbook.time_budget: must be between 1s and 14d"),
        ("[recovery]\nclaim_lease = '0s'", "recovery.claim_lease: must be between 1s and 24h"),
        ("[recovery]\ndead_after = '2d'", "recovery.dead_after: must be between 1s and 24h"),
        ("[recovery]\nmin_age = '25h'", "recovery: min_age 1d 1h must be below max_age 1d 0h"),
        ("[recovery]\nmin_age = '5m'\nmax_age = '5m'", "recovery: min_age 5m 0s must be below max_age 5m 0s"),
        ("[purge]\nretention = '0s'", "purge.retention: must be between 1s and 3650d"),
        *(
            (f"[runbook.abort_metric]\nnamespace='n'\nname='m'\nabove=1\n{line}", f"runbook.abort_metric.{complaint}")
            for line, complaint in (
                ("statistic = 'Avg'", "statistic: 'Avg' is no statistic of CloudWatch"),
                ("statistic = 'average'", "statistic: 'average' is no statistic"),
                ("statistic = ''", "statistic: '' is no statistic"),
                ("statistic = 'p101'", "statistic: 'p101' is no statistic"),
                ("period = '0s'", "period: is no period of CloudWatch"),
                ("period = '90s'", "period: is no period of CloudWatch"),
                ("period = '2d'", "period: is no period of CloudWatch"),
            )
        ),
        (r'environment = "a\u0000b"', "bad.toml: environment: has a character in it that nobody can see"),
        (r'reports = "a\u0000b"', "reports: has a character in it that nobody can see"),
        (r'environment = "a\nb"', "environment: has a character"),
        (r'reports = "a\u0085b"', "reports: has a character"),
        (r'aws.profile = "a\u007f"', "aws.profile: has a character"),
        (r'celery.accept_content = ["json", "a\u0001"]', "celery.accept_content: has a character"),
        (r'celery.sep = "\u0000"', "celery.sep: has a character"),
        (r'postgres.dsn = "host=h\u0000password=hunter2"', "postgres.dsn: has a character"),
        (r'clusters."a\u0000".role = "broker"', r"clusters.a\x00: has a character"),
        ("environment = ''", "environment: String should match"),
        ("environment = ' '", "environment: String should match"),
        ("this is not toml", "not valid TOML"),
        ("postgres = 'x'", "postgres: Input should be"),
    ],
)
def test_a_bad_file_gets_one_line_with_the_file_and_the_key(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(Usage) as caught:
        load(path)
    line = str(caught.value)
    assert str(path) in line
    assert complaint in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "statistic",
    [
        "SampleCount", "Average", "Sum", "Minimum", "Maximum", "IQM", "p0", "p99.9", "p100", "tm90", "TM(10%:90%)",
        "PR(:300)", "WM(:95%)", "TS(80%:)", "TC(0.005:0.030)",
    ],
)  # fmt: skip
def test_statistics_of_cloudwatch(statistic: str) -> None:
    assert Metric(namespace="n", name="m", above=1, statistic=statistic).statistic == statistic


def test_control_characters_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "patchpilot.toml"
    path.write_text('celery.sep = "\\u0006\\u0016"\n[postgres]\ndsn = """\nhost=h\n\tdbname=d\n"""\n')
    settings = load(path)
    assert settings.celery.sep == "\x06\x16"
    assert "dbname=d" in settings.postgres_dsn()


@pytest.mark.parametrize("value", ["", "a\x01", "a\udcff"])
def test_an_environment_that_is_no_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PATCHPILOT_ENVIRONMENT", value)
    with pytest.raises(Usage, match=r"environment: ") as caught:
        load(ROOT / "config/lab.toml")
    assert caught.value.exit_code == 2


def test_another_grace_of_the_command_line_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(ROOT / "config/patchpilot.example.toml")
    monkeypatch.setenv("PATCHPILOT_RUNBOOK__SETTLE", "7s")  # read already: what is there later changes nothing
    changed = settings.with_grace(timedelta(seconds=9))
    assert (changed.runbook.grace, changed.runbook.settle) == (timedelta(seconds=9), timedelta(minutes=1))
    for grace, complaint in (
        (timedelta(days=15), "must be between 0s and 14d"),
        (timedelta(days=1), "below recovery.max"),
    ):
        with pytest.raises(Usage, match=rf"^--grace: .*{complaint}"):
            settings.with_grace(grace)


def test_a_missing_file_and_a_missing_cluster(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="no such configuration file"):
        load(tmp_path / "nowhere.toml")
    settings = load(ROOT / "config/lab.toml")
    with pytest.raises(Usage, match=r"no cluster 'brokr' .* \(known: broker\)"):
        settings.cluster("brokr")
    with pytest.raises(Usage, match="PATCHPILOT_CLUSTERS__BROKER__ENDPOINT"):
        settings.endpoint("broker")
    with pytest.raises(Usage, match="PATCHPILOT_POSTGRES"):
        settings.postgres_dsn()


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHPILOT_POSTGRES", "postgresql://a:secret@b/c")
    monkeypatch.setenv("PATCHPILOT_RUNBOOK__GRACE", "7s")
    monkeypatch.setenv("PATCHPILOT_CLUSTERS__BROKER__ENDPOINT", "redis://:token@h:1/0")
    settings = load(ROOT / "config/lab.toml")
    assert settings.runbook.grace == timedelta(seconds=7)
    assert settings.runbook.settle == timedelta(seconds=3)
    assert settings.endpoint("broker") == "redis://:token@h:1/0"
    assert settings.clusters["broker"].replication_group == "lab-broker"
    assert "secret" not in repr(settings)
    assert "token" not in repr(settings)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:hunter2%zz@h/d",
        "postgresql://u:hunter2 x@h/d",
        "postgresql://u:p@hunter2@h/d",
        "host=h password='hunter2",
    ],
)
def test_a_malformed_dsn_is_refused_without_being_quoted(monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
    monkeypatch.setenv("PATCHPILOT_POSTGRES", dsn)
    with pytest.raises(Usage, match="malformed") as caught:
        load(ROOT / "config/lab.toml").postgres_dsn()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://h/0", "redis://h:x/0", "redis://:hunter2/x@h:1/0", "redis://h:1/abc", "nonsense", "redis://:hunter2@h:99999",
        "unix:///s?password=hunter2", "redis+sentinel://h/0", "redis://h ost/0", "redis:///0", "redis://:hunter2#@h/0",
    ],
)  # fmt: skip
def test_a_malformed_endpoint_is_refused_without_being_quoted(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PATCHPILOT_CLUSTERS__BROKER__ENDPOINT", url)
    with pytest.raises(Usage, match=r"clusters\.broker\.endpoint is malformed") as caught:
        load(ROOT / "config/lab.toml").endpoint("broker")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://h/0?ssl_cert_reqs=hunter2", "ssl_cert_reqs"),
        ("rediss://h/0?ssl_cert_reqs=hunter2", "ssl_cert_reqs"),
        ("redis://h/0?socket_timeout=1&nonsense=hunter2", "nonsense"),
        ("redis://h/0?db=hunter2", "db"),
        ("redis://h/0?socket_timeout=hunter2", "socket_timeout"),
        ("redis://h/0?protocol=9", "protocol"),
        ("redis://h/0?credential_provider=hunter2", "credential_provider"),
        ("redis://h/0?host=hunter2", "host"),
    ],
)
def test_a_parameter_that_nobody_takes_is_named(monkeypatch: pytest.MonkeyPatch, url: str, name: str) -> None:
    settings = load(ROOT / "config/lab.toml").model_copy(update={"celery": Celery(results=SecretStr(url))})
    monkeypatch.setenv("PATCHPILOT_CLUSTERS__BROKER__ENDPOINT", url)
    for ask in (lambda: load(ROOT / "config/lab.toml").endpoint("broker"), settings.results_endpoint):
        with pytest.raises(Usage, match=rf"takes? the parameter {name}, or not with this value") as caught:
            ask()
        assert "hunter2" not in str(caught.value)


def test_parameters_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "rediss://u:p@h/0?ssl_cert_reqs=none&ssl_password=x&socket_timeout=5&health_check_interval=5&client_name=x"
    monkeypatch.setenv("PATCHPILOT_CLUSTERS__BROKER__ENDPOINT", url)
    assert load(ROOT / "config/lab.toml").endpoint("broker") == url


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:p@h/d?sslmode=hunter2",
        "host=h target_session_attrs=hunter2",
        "host=h service=hunter2",
        "host=h channel_binding=hunter2 password=hunter2",
        "postgresql://u:p@h/d?connect_timeout=hunter2",
        "host=h connect_timeout=1s password=hunter2",
        "host=h keepalives=hunter2",
        "host=h keepalives_idle=1.5 password=hunter2",
        "postgresql://u:hunter2@h:70000/d",
        "postgresql://u:hunter2@h:5432,h2:0/d",
    ],
)
def test_a_value_that_libpq_does_not_take_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
    """Not a server that is away: nothing would change that."""
    monkeypatch.setenv("PATCHPILOT_POSTGRES", dsn)
    with pytest.raises(Usage, match=r"PATCHPILOT_POSTGRES\) has a value that libpq does not take: ") as caught:
        load(ROOT / "config/lab.toml").postgres_dsn()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("PATCHPILOT_RUNBOK__GRACE", "7s", r"PATCHPILOT_RUNBOK__GRACE: there is no section 'runbok' \(sections: aws, "),
        ("PATCHPILOT_RUNBOOK__GRACE", "7", r"PATCHPILOT_RUNBOOK__GRACE: runbook\.grace: '7' is not a duration"),
        ("PATCHPILOT_ENVIRONMENT", "", r"PATCHPILOT_ENVIRONMENT: environment: "),
        ("PATCHPILOT_RUNBOOK", "x", r"PATCHPILOT_RUNBOOK: write one variable .* like PATCHPILOT_RUNBOOK__NAME"),
        ("PATCHPILOT_CLUSTERS__BROKER__ROLE", "x", r"PATCHPILOT_CLUSTERS__BROKER__ROLE: clusters\.broker\.role: "),
    ],
)
def test_a_bad_value_in_the_environment_is_not_blamed_on_the_file(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(Usage, match=f"^{complaint}"):
        load(ROOT / "config/lab.toml")


def test_a_typo_in_the_environment_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHPILOT_RUNBOOK__GARCE", "7s")
    with pytest.raises(Usage, match=r"runbook\.garce: unknown key"):
        load(ROOT / "config/lab.toml")
