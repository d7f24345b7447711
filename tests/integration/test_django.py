"""The Django app, in a real project on real servers."""

from __future__ import annotations

import json
import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from patchpilot.errors import Exit
from patchpilot.lab.processes import until
from patchpilot.lab.roster import Roster
from patchpilot.lab.servers import Postgres, ValkeyNode
from patchpilot.postgres.connection import Database
from tests.support.project import Project

SECRET = "hunter2"
WAIT = 60


@pytest.fixture(scope="module")
def broker(lab_roster: Roster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    node = ValkeyNode("django-broker", tmp_path_factory.mktemp("django-broker"), roster=lab_roster)
    try:
        node.start()
        yield node.url
    finally:
        node.stop()


@pytest.fixture(scope="module")
def bare(postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Project]:
    """A project whose database is empty."""
    name = f"django_{uuid.uuid4().hex[:12]}"
    dsn = postgres_server.create_database(name)
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    database = {
        "NAME": name, "USER": parts["user"], "PASSWORD": SECRET, "HOST": parts["host"], "PORT": parts["port"],
        "OPTIONS": {"sslmode": "disable", "isolation_level": 2},
    }  # fmt: skip
    yield Project(tmp_path_factory.mktemp("project"), broker, database)
    postgres_server.drop_database(name)


@pytest.fixture(scope="module")
def project(bare: Project) -> Project:
    """A project with its tables and ours."""
    before = bare.manage("check", "--database", "default")
    assert "patchpilot.W004" in before.stderr
    assert "celery -A proj patchpilot db migrate" in before.stderr
    ours = bare.run("-m", "celery", "-A", "proj", "patchpilot", "db", "migrate")
    assert (ours.returncode, "0001" in ours.stderr) == (0, True), ours.stderr
    theirs = bare.manage("migrate", "--verbosity", "0")
    assert theirs.returncode == 0, theirs.stderr
    after = bare.manage("check", "--database", "default")
    assert (after.returncode, "patchpilot." in after.stderr) == (0, False), after.stderr
    nothing = bare.manage("makemigrations", "--check", "--dry-run")
    assert nothing.returncode == 0, nothing.stdout  # a project's own checks for missing migrations stay quiet
    return bare


@pytest.fixture
def lost(project: Project, broker: str) -> list[str]:
    """Three chords whose header's messages are lost, an hour ago. Their group ids."""
    with Database(dsn_of(project)) as database:
        database.execute("DELETE FROM patchpilot.outbox")
        database.execute("DELETE FROM patchpilot.chord")
        group_ids = project.script("""
import json
from celery import chord
from proj.tasks import add, total
print(json.dumps([chord([add.s(n, n), add.s(1, 1)], total.s()).apply_async().parent.id for n in range(3)]))
""")
        database.execute("UPDATE patchpilot.chord SET created_at = now() - interval '1 h'")
        database.execute("UPDATE patchpilot.outbox SET sent_at = now() - interval '1 h'")
    with redis.Redis.from_url(broker) as client:
        client.delete("celery")
    return list(group_ids)


def dsn_of(project: Project) -> str:
    return str(project.script("import json, patchpilot.contrib.django as it\nprint(json.dumps(it.dsn()))"))


def test_the_dsn_is_that_of_databases(project: Project) -> None:
    parts = psycopg.conninfo.conninfo_to_dict(dsn_of(project))
    assert (parts["password"], parts["sslmode"]) == (SECRET, "disable")
    assert "isolation_level" not in parts


def test_the_dsn_leads_to_where_django_itself_connects_to(project: Project) -> None:
    script = """
import django, json, psycopg
django.setup()
from django.db import connection
import patchpilot.contrib.django as ours
asked = "SELECT current_database(), current_setting('application_name'), current_user"
with connection.cursor() as cursor, psycopg.connect(ours.dsn()) as other:
    print(json.dumps([cursor.execute(asked).fetchone(), other.execute(asked).fetchone()]))
"""
    given = json.loads(project.environment["PROJ_DATABASES"])["default"]
    user = {"user": "nobody", "application_name": "orders", "dbname": given["NAME"]}
    for changed, database in (
        ({"NAME": "postgres", "OPTIONS": user}, given["NAME"]),
        ({"NAME": None}, "postgres"),
        ({"NAME": None, "OPTIONS": {**user, "service": "none", "pool": False}}, given["NAME"]),
    ):
        done = project.run("-c", script, DATABASES={"default": {**given, **changed}})
        assert done.returncode == 0, done.stderr
        theirs, ours = json.loads(done.stdout)
        assert ours == theirs
        assert ours[0] == database
    nowhere = project.manage("check", DATABASES={"default": {**given, "NAME": "", "OPTIONS": {}}})
    assert ("patchpilot.E002" in nowhere.stderr, "Traceback" in nowhere.stderr) == (True, False), nowhere.stderr


def test_the_command_says_what_it_would_do_and_does_it_once(project: Project, lost: list[str]) -> None:
    dry = project.manage("recover_stuck_chords", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert all(f"chord {group_id} proj.tasks.total 0/2, 1h 0m: header-message-lost" in dry.stdout for group_id in lost)
    assert dry.stdout.count("would republish") == 3
    assert "nothing is stuck" in project.manage("recover_stuck_chords", "--min-age", "2h").stdout
    assert "nothing is stuck" in project.manage("recover_stuck_chords", "--max-age", "30m").stdout
    done = project.manage("recover_stuck_chords")
    assert done.stdout.count("republish: done") == 3
    worker = project.worker()
    try:
        with Database(dsn_of(project)) as database:
            over = "SELECT group_id FROM patchpilot.chord WHERE state = 'dispatched'"
            until(lambda: len(database.fetch(over)) == 3, seconds=WAIT, what="every chord was over")
            results = "SELECT 1 FROM patchpilot.result JOIN patchpilot.chord ON callback_id = task_id"
            until(lambda: len(database.fetch(results)) == 3, seconds=WAIT, what="every callback had run")
        assert "nothing is stuck" in project.manage("recover_stuck_chords").stdout
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def test_the_command_shows_names_and_does_not_obey_them(
    project: Project, lost: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database(dsn_of(project)) as database:
        database.execute("UPDATE patchpilot.chord SET callback_name = %s", ["evil\x1b[2J\r\nINJECTED é"])
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    dry = project.manage("recover_stuck_chords", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count(r" evil\x1b[2J\r\nINJECTED \xe9 0/2, ") == len(lost)


ADMIN = """
import json, sys
from django.contrib.auth.models import Permission, User
from django.test import Client
User.objects.filter(username=sys.argv[1]).delete()
user = User.objects.create_user(sys.argv[1], is_staff=True, is_superuser=sys.argv[1] == "root")
user.user_permissions.set(Permission.objects.filter(codename__in=sys.argv[2].split(",")))
client = Client()
client.force_login(user)
url = "/admin/patchpilot/chord/"
def get(path):
    answer = client.get(url + path)
    return [answer.status_code, answer.content.decode()]
def post(path, **data):
    answer = client.post(url + path, data, follow=True)
    return [answer.status_code, answer.content.decode()]
"""


def admin(project: Project, who: str, permissions: str, *steps: str) -> list[Any]:
    """What the admin answers to these steps of a user."""
    answers = project.script(f"{ADMIN}\nprint(json.dumps([{', '.join(steps)}]))", who, permissions)
    return list(answers)


def messages(page: str) -> list[str]:
    """What it says at the top."""
    return re.findall(r"<li class=.(?:success|info|warning|error).>(.*?)</li>", page, re.DOTALL)


def rows(page: str) -> set[str]:
    """The chords that a list shows."""
    return set(re.findall(r"/admin/patchpilot/chord/([^/]+)/change/", page))


def test_the_admin_shows_chords_and_recovers_the_chosen_ones(project: Project, lost: list[str]) -> None:
    first, second, third = lost
    with Database(dsn_of(project)) as database:
        database.execute(
            "UPDATE patchpilot.chord SET state = 'dispatched', finished_at = now() WHERE group_id = %s", (third,)
        )
        [row] = database.fetch("SELECT callback_id FROM patchpilot.chord WHERE group_id = %s", (second,))
    action = f"'', action='recover', _selected_action={[first]!r}"
    listed, over, everything, found, one, add, refused, recovered = admin(
        project, "root", "", "get('')", "get('?state=dispatched')", "get('?state=all')",
        f"get('?q={row['callback_id']}')", f"get('{first}/change/')", "get('add/')",
        f"post('{first}/delete/', post='yes')", f"post({action})",
    )  # fmt: skip
    assert (rows(listed[1]), rows(over[1]), rows(everything[1])) == ({first, second}, {third}, set(lost))
    assert "0/2" in listed[1]
    assert "proj.tasks.total" in listed[1]
    assert "1h 0m" in listed[1]
    assert rows(found[1]) == {second}
    assert "2 of 2 header tasks have not returned" in one[1]
    assert 'name="_save"' not in one[1]
    assert (add[0], refused[0]) == (403, 403)
    assert f"{first} recovered by republish (header-message-lost)" in recovered[1], messages(recovered[1])
    assert second not in re.findall(r"recovered by[^<]*", recovered[1])
    with Database(dsn_of(project)) as database:
        assert [
            it["subject"] for it in database.fetch("SELECT subject FROM patchpilot.remedy ORDER BY id DESC LIMIT 1")
        ] == [first]
        sent = {it["group_id"] for it in database.fetch("SELECT group_id FROM patchpilot.outbox WHERE resends > 0")}
        assert sent == {first}


def test_what_is_no_state_is_no_error_of_the_server(project: Project, lost: list[str]) -> None:
    bogus, lookup, good = admin(
        project, "root", "", "get('?state=bogus')", "get('?state__exact=bogus')", "get('?state=open')"
    )
    assert (bogus[0], lookup[0]) == (302, 400)  # Django's own answers to what cannot be looked up
    assert rows(good[1]) == set(lost)


def test_the_admin_says_what_became_of_each_chord_also_if_somebody_else_was_first(
    project: Project, lost: list[str]
) -> None:
    first, second, third = lost
    with Database(dsn_of(project)) as database:
        database.execute("UPDATE patchpilot.outbox SET sent_at = now() WHERE group_id = %s", (third,))
    meanwhile = f"""
from patchpilot.recovery import Recovery
apply = Recovery._try
def late(self, *args, **options):
    Recovery._try = apply
    others.append(post('', action='recover', _selected_action={[second]!r}))
    return apply(self, *args, **options)
others, Recovery._try = [], late
"""
    script = f"{ADMIN}\n{meanwhile}\nanswer = post('', action='recover', _selected_action={lost!r})\n"
    answer, other = project.script(f"{script}print(json.dumps([answer, *others]))", "root", "")
    assert [said[:57] for said in messages(other[1])] == [f"Chord {second} recovered by r"]
    found, moved, well = messages(answer[1])
    assert found.startswith(f"Chord {first} recovered by republish")
    assert moved.startswith(
        f"Chord {second} was stuck (header-message-lost), and was not recovered here: somebody else"
    )
    assert well.startswith(f"1 of 3: nothing is stuck of {third}, or it made progress in the last 5m")


def test_recovering_is_a_permission_of_its_own(project: Project, lost: list[str]) -> None:
    action = f"'', action='recover', _selected_action={lost!r}"
    hidden, _ = admin(project, "nobody", "", "get('')", f"post({action})")
    assert hidden[0] == 403
    seen, _ = admin(project, "reader", "view_chord", "get('')", f"post({action})")
    assert (rows(seen[1]), "Recover what is stuck" in seen[1]) == (set(lost), False)
    with Database(dsn_of(project)) as database:
        assert database.fetch("SELECT 1 FROM patchpilot.outbox WHERE resends > 0") == []
    offered, done = admin(project, "helper", "view_chord,recover_chord", "get('')", f"post({action})")
    assert "Recover what is stuck" in offered[1]
    assert done[1].count("recovered by republish") == 3


def test_the_checks_say_what_is_not_set_up(project: Project, tmp_path: Path) -> None:
    assert project.manage("check").returncode == 0

    def check(**settings: Any) -> str:
        done = project.manage("check", **settings)
        assert SECRET not in done.stderr
        return done.stderr

    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "x.sqlite3")}
    elsewhere = {"DATABASES": {"default": sqlite}}
    assert re.search("(?s)patchpilot.E002.*is sqlite: patchpilot's tables are in a PostgreSQL", check(**elsewhere))
    named = check(PATCHPILOT={"database": "orders", "celery_app": "proj.celery:nobody"})
    assert "which is not in DATABASES" in named
    assert "patchpilot.E001" in named
    astray = check(
        CELERY_BROKER_URL="amqp://u:hunter2@h//", CELERY_RESULT_BACKEND="redis://127.0.0.1:1/0",
        CELERY_PATCHPILOT_POSTGRES="postgresql://u:hunter2@127.0.0.1:1/other",
    )  # fmt: skip
    assert all(f"patchpilot.{each}" in astray for each in ("E003", "W001", "W003"))
    for broker in ("abc/0", "6379/abc", "6379/0?socket_timeout=abc"):
        said = check(CELERY_BROKER_URL=f"redis://:{SECRET}@127.0.0.1:{broker}")
        assert ("patchpilot.E003" in said, "Traceback" in said) == (True, False), said
    malformed = check(CELERY_PATCHPILOT_POSTGRES=f"host=a password={SECRET} nonsense")
    assert ("is malformed" in malformed, "Traceback" in malformed) == (True, False), malformed
    assert "PATCHPILOT is no dict" in check(PATCHPILOT="proj.celery:app")
    unreachable = project.environment["PROJ_DATABASES"].replace('"PORT": "', '"PORT": "1')
    gone = project.manage("check", "--database", "default", DATABASES=json.loads(unreachable))
    assert "patchpilot.W006" in gone.stderr
    # The command does not begin either.
    wrong = project.manage("recover_stuck_chords", **elsewhere)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (1, False)


def test_what_may_go_wrong_with_the_command_is_one_line(project: Project) -> None:
    for arguments, code, words in (
        (("--min-age", "soon"), Exit.USAGE, "'soon' is not a duration"),
        (("--min-age", "2h", "--max-age", "1h"), Exit.USAGE, "the window is empty"),
    ):
        done = project.manage("recover_stuck_chords", *arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert words in done.stderr
    away = project.manage("recover_stuck_chords", CELERY_BROKER_URL=f"redis://:{SECRET}@127.0.0.1:1/0")
    assert (away.returncode, away.stderr.count("\n")) == (Exit.RESUME_LATER, 1), away.stderr
    assert SECRET not in away.stderr


def test_without_a_celery_application_it_says_so(project: Project) -> None:
    (project.directory / "proj" / "__init__.py").rename(project.directory / "proj" / "kept.py")
    try:
        (project.directory / "proj" / "__init__.py").write_text("")
        done = project.manage("check")
        assert "patchpilot.E001" in done.stderr
        assert "PATCHPILOT['celery_app'] = 'proj.celery:app'" in done.stderr
        assert project.manage("check", PATCHPILOT={"celery_app": "proj.celery:app"}).returncode == 0
    finally:
        (project.directory / "proj" / "kept.py").replace(project.directory / "proj" / "__init__.py")
