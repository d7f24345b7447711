"""``patchpilot recover``."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Annotated, Any

import typer

from patchpilot.cli.console import (
    ClusterOption,
    ConfigOption,
    Output,
    OutputOption,
    ago,
    duration,
    emit,
    emit_json,
    emit_table,
    read_settings,
    say,
    the_broker,
)
from patchpilot.errors import PatchpilotError, Usage
from patchpilot.recovery import Applied, Finding, Recovery, Site, Window
from patchpilot.settings import Settings


def site(settings: Settings, cluster: str) -> Site:
    """Where recovery looks for the broker called ``cluster``."""
    return Site(
        endpoint=settings.endpoint(cluster),
        dsn=settings.postgres_dsn(),
        key_prefix=settings.cluster(cluster).key_prefix,
        accept_content=settings.celery.accept_content,
        claim_lease=settings.recovery.claim_lease,
    )


def complain(finding: Finding, error: PatchpilotError) -> None:
    """Say that a finding could not be remedied."""
    say(f"not recovered: {finding.kind} {finding.id}: {error}")


def recover(
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is stuck and why; change nothing.")] = False,
    min_age: Annotated[
        str | None,
        typer.Option("--min-age", metavar="DURATION", help="Leave alone what made progress later [default: 5m]."),
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option("--max-age", metavar="DURATION", help="Leave alone what made none for longer [default: 24h]."),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Find what a failover lost (stuck chords, lost callbacks, lost task messages) and re-create exactly that, once.

    Compares what PostgreSQL says should exist with what the broker and the workers hold. Age counts from the last
    progress: a part that returned, a message that was sent. Durations are written 0s, 5m, 24h. Safe beside workers
    and any number of other recoveries: what is found stuck is claimed in PostgreSQL before it is sent again.
    """
    settings = read_settings(config)
    window = _window(settings, min_age, max_age)
    with Recovery(site(settings, the_broker(settings, cluster)), complain=complain) as recovery:
        if dry_run:
            findings, applied = recovery.survey(window), None
        else:
            findings, applied = recovery.sweep(window)
    if output is Output.JSON:
        emit_json(_as_data(findings, applied))
    else:
        _show(findings, applied)


def _window(settings: Settings, min_age: str | None, max_age: str | None) -> Window:
    window = Window(
        duration(min_age, settings.recovery.min_age, "--min-age"),
        duration(max_age, settings.recovery.max_age, "--max-age"),
    )
    if window.min_age >= window.max_age or window.min_age < timedelta():
        raise Usage(
            f"the window is empty: --min-age {ago(window.min_age)} must be below --max-age {ago(window.max_age)}"
        )
    return window


def _as_data(findings: tuple[Finding, ...], applied: tuple[Applied, ...] | None) -> dict[str, Any]:
    data: dict[str, Any] = {"findings": [finding.as_dict() for finding in findings]}
    if applied is not None:
        data["applied"] = [each.as_dict() for each in applied]
    return data


def _show(findings: tuple[Finding, ...], applied: tuple[Applied, ...] | None) -> None:
    if not findings:
        say("nothing is stuck")
        return
    done: set[tuple[str, str, str]] = {(each.kind, each.id, each.diagnosis) for each in applied or ()}
    emit_table(
        ("KIND", "ID", "CALLBACK", "PARTS", "AGE", "DIAGNOSIS", "REMEDY"),
        [
            (it.kind, it.id, it.callback or "-", _parts(it), ago(it.age), it.diagnosis, _remedy(it, applied, done))
            for it in findings
        ],
    )
    emit("")
    for finding in findings:
        emit(f"{finding.id}: {finding.reason}")
    curable = sum(finding.curable for finding in findings)
    if applied is None:
        say(f"{curable} of {len(findings)} can be recovered: run the same command without --dry-run")
    else:
        say(f"recovered {len(applied)} of {len(findings)}")


def _parts(finding: Finding) -> str:
    return "-" if finding.total is None else f"{finding.returned}/{finding.total}"


def _remedy(finding: Finding, applied: tuple[Applied, ...] | None, done: Collection[tuple[str, str, str]]) -> str:
    if applied is None or not finding.curable:
        return str(finding.remedy)
    return f"{finding.remedy}: " + ("done" if (finding.kind, finding.id, finding.diagnosis) in done else "not done")
