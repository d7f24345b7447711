"""`celery -A proj patchpilot ...` by the real executable: the application says where everything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import redis
from celery import chord

from patchpilot.errors import Exit
from patchpilot.postgres.connection import Database
from patchpilot.valkey.keys import ChordKeys
from tests.integration.test_adopt import Stock
from tests.support.commands import environment
from tests.support.processes import ROOT, Shop
from tests.support.shop import add, total

EXECUTABLE = Path(sys.executable).with_name("celery")


def celery(*arguments: str, app: str = "tests.support.shop", **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EXECUTABLE, "-A", app, "patchpilot", *arguments], cwd=ROOT, env=environment(**extra), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_recover_and_chords_for_an_application(shop: Shop) -> None:
    result = chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async()
    with redis.Redis.from_url(shop.broker) as broker:
        broker.delete("celery")
    too_young = celery("recover", "--output", "json", **shop.environment)
    assert (too_young.returncode, json.loads(too_young.stdout)["findings"]) == (0, [])
    # The application's own settings stand where the command line says nothing.
    own = {**shop.environment, "SHOP_SETTINGS": json.dumps({"patchpilot_recovery_min_age": 0})}
    told = json.loads(celery("chords", "--output", "json", **own).stdout)
    assert (told["open"], [it["id"] for it in told["stuck"]]) == (1, [result.parent.id])
    life = celery("chords", "show", result.id, **shop.environment)
    assert "2 of 2 header tasks have not returned" in life.stdout
    dry = celery("recover", "--min-age", "0s", "--dry-run", **shop.environment)
    assert "header-message-lost" in dry.stdout
    done = celery("recover", "--min-age", "0s", "--output", "json", **shop.environment)
    assert [it["id"] for it in json.loads(done.stdout)["applied"]] == [result.parent.id]
    shop.worker("-c", "1")
    shop.await_line("total 6")


def test_keys_of_chords_are_where_the_application_has_them(shop: Shop) -> None:
    """On the Valkey of its results, under the prefix of its result backend. Others keep theirs beside them."""
    results = shop.broker.removesuffix("/0") + "/5"
    prefix = {"result_backend_transport_options": {"global_keyprefix": "mine:"}}
    own = {**shop.environment, "SHOP_BACKEND": f"patchpilot+{results}", "SHOP_SETTINGS": json.dumps(prefix)}
    stock = Stock(shop, results)
    stock.app.conf.update(prefix)
    sent = stock.chord([stock.s("add", 1, 1), stock.s("add", 2, 2)], "end")
    with redis.Redis.from_url(results) as client:
        client.set("celery-taskset-meta-other.s", 1)
        [found] = json.loads(celery("recover", "--adopt", "--dry-run", "--output", "json", **own).stdout)["chords"]
        assert (found["group_id"], found["total"], found["reason"]) == (sent.parent.id, 2, None)
        client.set(ChordKeys(results, "mine:").key("stray", ".s"), 1)
        done = json.loads(celery("recover", "--strays", "0s", "--output", "json", **own).stdout)
        assert ([it["group_id"] for it in done["strays"]], done["removed"]) == (["stray"], 1)
        assert len(client.keys("*taskset-meta*")) == 2
    stock.close()


def test_tables_are_made_for_an_application(shop: Shop, dsn: str) -> None:
    done = celery("db", "migrate", **{**shop.environment, "SHOP_POSTGRES": dsn})
    assert done.returncode == 0, done.stderr
    with Database(dsn) as database:
        assert database.fetch("SELECT group_id FROM patchpilot.chord") == []


def test_help_and_what_may_be_wrong(shop: Shop, tmp_path: Path) -> None:
    assert {"recover", "chords", "db"} <= set(celery("--help").stdout.split())
    assert "--min-age" in celery("recover", "--help", **shop.environment).stdout
    wrong = celery("recover", "--min-age", "soon", **shop.environment)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (Exit.USAGE, 1), wrong.stderr
    (tmp_path / "elsewhere.py").write_text("import celery\napp = celery.Celery(broker='amqp://u:hunter2@h//')\n")
    nowhere = celery("recover", app="elsewhere", PYTHONPATH=str(tmp_path))
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (Exit.USAGE, 1), nowhere.stderr
    assert "patchpilot_postgres" in nowhere.stderr
    no_redis = celery("recover", app="elsewhere", PYTHONPATH=str(tmp_path), PATCHPILOT_POSTGRES=shop.dsn)
    assert (no_redis.returncode, "no redis://" in no_redis.stderr) == (Exit.USAGE, True)
    assert "hunter2" not in no_redis.stderr


def test_without_the_command_line_s_extra_it_says_what_to_install(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
    done = celery("recover", **shop.environment, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "typer is missing: install the command line with `pip install 'patchpilot[pilot]'`" in done.stderr
