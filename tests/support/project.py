"""A Django project as a user would write it, made in a folder of the test's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.commands import environment

FILES = {
    "manage.py": """
import os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
""",
    "proj/__init__.py": """
from proj.celery import app
""",
    "proj/celery.py": """
import os
from celery import Celery
import patchpilot
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")
app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["proj"])
patchpilot.install(app)
""",
    "proj/tasks.py": """
from celery import shared_task
@shared_task
def add(x, y):
    return x + y
@shared_task
def total(values):
    return sum(values)
""",
    "proj/urls.py": """
from django.contrib import admin
from django.urls import path
urlpatterns = [path("admin/", admin.site.urls)]
""",
    "proj/settings.py": """
import json, os
import patchpilot.contrib.django
SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["testserver"]
ROOT_URLCONF = "proj.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes",
    "django.contrib.sessions", "django.contrib.messages", "patchpilot.contrib.django"]
MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware", "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware", "django.contrib.messages.middleware.MessageMiddleware"]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True, "OPTIONS": {
    "context_processors": ["django.template.context_processors.request", "django.contrib.auth.context_processors.auth",
    "django.contrib.messages.context_processors.messages"]}}]
DATABASES = json.loads(os.environ["PROJ_DATABASES"])
CELERY_BROKER_URL = os.environ["PROJ_BROKER"]
CELERY_RESULT_BACKEND = f"patchpilot+{CELERY_BROKER_URL}"
CELERY_PATCHPILOT_POSTGRES = patchpilot.contrib.django.dsn
CELERY_PATCHPILOT_RECOVERY_DEAD_AFTER = 5  # a worker that a test has killed is not waited for
globals().update(json.loads(os.environ.get("PROJ_SETTINGS", "{}")))
""",
}


class Project:
    """The project, on one broker and one database.

    :param database: its entry in DATABASES, without the engine.
    """

    def __init__(self, directory: Path, broker: str, database: dict[str, Any]) -> None:
        self.directory = directory
        for name, text in FILES.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        databases = {"default": {"ENGINE": "django.db.backends.postgresql", **database}}
        self.environment = {
            "PROJ_BROKER": broker, "PROJ_DATABASES": json.dumps(databases), "PYTHONPATH": str(directory),
        }  # fmt: skip

    def run(self, *command: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments in the project's folder.

        :param settings: more of its Django settings.
        """
        extra = {**self.environment, "PROJ_SETTINGS": json.dumps(settings), "DJANGO_SETTINGS_MODULE": "proj.settings"}
        return subprocess.run(
            [sys.executable, *command], cwd=self.directory, env={**environment(**extra), "LC_ALL": "C.UTF-8"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def manage(self, *command: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run ``manage.py``."""
        return self.run("manage.py", *command, **settings)

    def script(self, text: str, *arguments: str) -> Any:
        """Run a script in the project, and return what it printed as JSON last."""
        done = self.run("-c", f"import django\ndjango.setup()\n{text}", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def worker(self) -> subprocess.Popen[bytes]:
        """Start a worker. The caller ends it."""
        with (self.directory / "worker.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "proj", "worker", "-c", "1", "--without-gossip",
                 "--without-mingle"],
                cwd=self.directory, env={**os.environ, **self.environment}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
