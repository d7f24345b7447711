"""``manage.py recover_stuck_chords``."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from datetime import timedelta
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from patchpilot.contrib.django.conf import site
from patchpilot.dsn import mask
from patchpilot.durations import ago, parse_duration
from patchpilot.errors import Exit, PatchpilotError
from patchpilot.legible import encodable, legible
from patchpilot.recovery import Finding, Recovery, Window
from patchpilot.recovery.findings import Kind
from patchpilot.recovery.quiet import headline, rest

KINDS: tuple[Kind, ...] = ("chord", "callback")


class Command(BaseCommand):
    """Recovery of chords; that of tasks which belong to none is `celery -A proj patchpilot recover`'s."""

    help = "Find chords that a failover of the broker left stuck, and finish them, each once. Safe beside workers."
    # It asks the record by a connection of its own; the project's other checks are none of its business.
    requires_system_checks = ("patchpilot",)
    _failed = 0

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="say what is stuck and why; change nothing")
        parser.add_argument("--min-age", type=_span, metavar="DURATION", help="leave alone what made progress later")
        parser.add_argument("--max-age", type=_span, metavar="DURATION", help="leave alone what made none for longer")

    def handle(self, *_: Any, **options: Any) -> None:
        try:
            self._recover(**options)
        except ImproperlyConfigured as error:
            raise CommandError(mask(str(error)), returncode=int(Exit.USAGE)) from None
        except PatchpilotError as error:
            raise CommandError(mask(str(error)), returncode=int(error.exit_code)) from None

    def _recover(self, dry_run: bool, min_age: timedelta | None, max_age: timedelta | None, **_: Any) -> None:
        where, config = site()
        window = Window(
            config.recovery_min_age if min_age is None else min_age,
            config.recovery_max_age if max_age is None else max_age,
        )
        if window.min_age >= window.max_age:
            raise CommandError("the window is empty: --min-age must be below --max-age", returncode=int(Exit.USAGE))
        with Recovery(where, complain=self._complain) as recovery:
            sweep = recovery.look(window, KINDS) if dry_run else recovery.sweep(window, only=KINDS)
        done = None if dry_run else {(it.kind, it.id) for it in sweep.applied}
        for finding in sweep.findings:
            self.stdout.write(encodable(_line(finding, done), self.stdout))
        if not sweep.findings:
            self.stdout.write(headline(sweep.quiet, KINDS))
        for line in rest(sweep.findings, sweep.quiet, window, KINDS):
            self.stdout.write(line)
        if self._failed:
            raise CommandError(f"{self._failed} could not be recovered", returncode=int(Exit.ERROR))

    def _complain(self, finding: Finding, error: PatchpilotError) -> None:
        self._failed += 1
        self.stderr.write(f"not recovered: {finding.kind} {finding.id}: {mask(str(error))}")


def _line(finding: Finding, done: set[tuple[Kind, str]] | None) -> str:
    if not finding.curable:
        what = "left alone"
    elif done is None:
        what = f"would {finding.remedy}"
    else:
        what = f"{finding.remedy}: {'done' if (finding.kind, finding.id) in done else 'not done'}"
    parts = "" if finding.total is None else f" {finding.returned}/{finding.total}"
    who = f"{finding.kind} {finding.id} {finding.callback or ''}{parts}"
    return legible(f"{who}, {ago(finding.age)}: {finding.diagnosis}, {what}: {finding.reason}")


def _span(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
