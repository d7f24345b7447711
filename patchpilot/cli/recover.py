"""``patchpilot recover``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from patchpilot.cli import housekeeping
from patchpilot.cli.console import (
    ClusterOption,
    ConfigOption,
    Output,
    OutputOption,
    duration,
    emit,
    emit_json,
    emit_table,
    read_settings,
    say,
    shortened,
    the_broker,
)
from patchpilot.cli.watch import Orders, go_on
from patchpilot.durations import ago
from patchpilot.errors import Exit, PatchpilotError, Usage
from patchpilot.recovery import Finding, Recovery, Site, Sweep, Window
from patchpilot.recovery.findings import KINDS, Kind
from patchpilot.recovery.inventory import Elsewhere
from patchpilot.recovery.plan import Plan, as_data, hold_to
from patchpilot.recovery.plan import read as read_plan
from patchpilot.recovery.quiet import headline, many, rest
from patchpilot.settings import Settings


def site(settings: Settings, cluster: str) -> Site:
    """Where recovery looks for the broker called ``cluster``."""
    return Site(
        endpoint=settings.endpoint(cluster),
        dsn=settings.postgres_dsn(),
        key_prefix=settings.cluster(cluster).key_prefix,
        accept_content=settings.celery.accept_content,
        result_accept_content=settings.celery.result_accept_content,
        claim_lease=settings.recovery.claim_lease,
        dead_after=settings.recovery.dead_after,
        results=settings.results_endpoint(),
        results_prefix=settings.celery.results_prefix,
        control_exchange=settings.celery.control_exchange,
        fanout_prefix=settings.celery.fanout_prefix,
        broker=settings.cluster(cluster).broker_name,
        sep=settings.celery.sep,
        priority_steps=settings.celery.priority_steps or (),
        unacked=(settings.celery.unacked_key, settings.celery.unacked_index_key),
        result_serializer=settings.celery.result_serializer,
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
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="KINDS", help="Only these, with commas between: chords, callbacks, tasks."),
    ] = None,
    assume_lost: Annotated[
        bool,
        typer.Option(
            "--assume-lost",
            help="Take for lost what a worker may have that is alive and does not answer, or that workers seem to "
            "refuse: it may run twice.",
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE", help="Do exactly what this dry run's JSON says, as far as it is still so."
        ),
    ] = None,
    strays: Annotated[
        str | None,
        typer.Option(
            "--strays",
            metavar="IDLE",
            help="Instead, remove the keys of chords that are on no record and that nobody has touched for so long. "
            "A chord of Celery's own backend touches its keys with each part: longer than your longest task.",
        ),
    ] = None,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Instead, take over the chords that Celery's own Redis backend has begun."),
    ] = False,
    watch: Annotated[
        str | None,
        typer.Option("--watch", metavar="INTERVAL", help="Go on: a pass each time that this is over, until a signal."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="HOST:PORT", help="With --watch: serve /healthz, and /metrics for Prometheus."
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """Find what a failover lost (stuck chords, lost callbacks, lost task messages) and re-create exactly that, once.

    Compares what PostgreSQL says should exist with what the broker and the workers hold. Age counts from the last
    progress: a part that returned, a message that was sent. Durations are written 0s, 5m, 24h. Safe beside workers
    and any number of other recoveries: what is found stuck is claimed in PostgreSQL before it is sent again.

    To decide first and act later: `recover --dry-run --output json > plan.json`, read it, `recover --plan plan.json`.
    What is in the plan is looked for again, in the plan's window; what is no longer so is listed, and left alone: of a
    finding that has other messages by now, those of the plan are sent and no others.

    `recover --watch 5s` goes on until SIGTERM or Ctrl-C and then exits with code 0. It says each thing once, a line
    each (with `--output json` a line of JSON each), and outlives a PostgreSQL or a broker that is away.

    `recover --strays 48h` and `recover --adopt` do something else in place of this, once in a while; `--dry-run` shows
    what. See docs/adopting.md.

    The exit code is 1 if something that can be recovered could not be, "not recovered: ...".
    """
    settings = read_settings(config)
    instead = strays is not None or adopt
    if strays is not None and adopt:
        raise Usage("--strays and --adopt are two things to do: one at a time")
    given = {
        "--min-age": min_age, "--max-age": max_age, "--only": only, "--assume-lost": assume_lost, "--plan": plan,
        "--watch": watch, "--listen": listen,
    }  # fmt: skip
    if instead and (refused := [name for name, value in given.items() if value not in (None, False)]):
        raise Usage(f"{', '.join(refused)}: --strays and --adopt each go with --dry-run, --cluster and --output only")
    _refuse(dry_run=dry_run, watch=watch, listen=listen, for_a_person=bool(plan or assume_lost))
    agreed = read_plan(plan) if plan else None
    usual = Window(settings.recovery.min_age, settings.recovery.max_age) if agreed is None else agreed.window
    window, kinds = _window(usual, min_age, max_age), _kinds(only)
    where = site(settings, the_broker(settings, cluster))
    if agreed is not None:
        hold_to(agreed, where)
    if adopt:
        housekeeping.adopt(where, output, dry_run=dry_run)
    elif strays is not None:
        housekeeping.strays(where, duration(strays, timedelta(), "--strays"), output, dry_run=dry_run)
    elif watch is not None:
        every = duration(watch, timedelta(), "--watch")
        go_on(where, Orders(window, kinds, dry_run, every, listen), output)
    else:
        return _once(where, window, kinds, output, dry_run=dry_run, assume_lost=assume_lost, plan=agreed)
    return Exit.DONE


def _refuse(*, dry_run: bool, watch: str | None, listen: str | None, for_a_person: bool) -> None:
    """Options that contradict each other.

    :param for_a_person: whether one is given that only a person may give, for one pass.
    """
    if dry_run and for_a_person:
        raise Usage("--dry-run changes nothing: --plan and --assume-lost are for acting")
    if listen is not None and watch is None:
        raise Usage("--listen is for --watch: a single pass is over before anybody could ask")
    if watch is not None and for_a_person:
        raise Usage("--watch goes on without a person: --plan and --assume-lost are a person's, for one pass")


def _once(
    where: Site, window: Window, kinds: tuple[Kind, ...], output: Output, *, dry_run: bool, assume_lost: bool,
    plan: Plan | None,
) -> int:  # fmt: skip
    """One pass, and what came of it."""
    failed: list[dict[str, str]] = []

    def note(finding: Finding, error: PatchpilotError) -> None:
        complain(finding, error)
        failed.append({"kind": finding.kind, "id": finding.id, "why": str(error)})

    with Recovery(where, complain=note) as recovery:
        if dry_run:
            sweep = recovery.look(window, kinds)
        else:
            sweep = recovery.sweep(window, only=kinds, assume_lost=assume_lost, plan=plan)
        elsewhere = recovery.elsewhere()
    code = Exit.ERROR if failed else Exit.DONE
    if output is Output.JSON:
        others = [asdict(each) for each in elsewhere]
        emit_json({**_as_data(sweep, window, where, dry_run=dry_run), "failed": failed, "elsewhere": others})
        return code
    _show(sweep, as_data(sweep.findings, window, where)["digest"], dry_run=dry_run)
    if not sweep.findings:
        say(headline(sweep.quiet, kinds, elsewhere=bool(elsewhere)))
    for line in rest(sweep.findings, sweep.quiet, window, kinds):
        say(line)
    say_elsewhere(elsewhere)
    return code


def say_elsewhere(elsewhere: tuple[Elsewhere, ...]) -> None:
    """Say that there are other brokers."""
    for each in elsewhere:
        what = f"{many(each.chords, 'open chord')} and {many(each.messages, 'message')}"
        say(f"not looked at: {what} of another broker, {each.broker}")


def _kinds(only: str | None) -> tuple[Kind, ...]:
    """The kinds that `--only` asks for.

    :raises Usage: for a word that is none.
    """
    if only is None:
        return KINDS
    names: dict[str, Kind] = {f"{kind}s": kind for kind in KINDS}
    words = [word.strip() for word in only.split(",")]
    for word in words:
        if word not in names:
            raise Usage(f"--only: {word!r} is none of {', '.join(names)}")
    return tuple(names[word] for word in words)


def _window(usual: Window, min_age: str | None, max_age: str | None) -> Window:
    window = Window(duration(min_age, usual.min_age, "--min-age"), duration(max_age, usual.max_age, "--max-age"))
    if window.min_age >= window.max_age or window.min_age < timedelta():
        raise Usage(
            f"the window is empty: --min-age {ago(window.min_age)} must be below --max-age {ago(window.max_age)}"
        )
    return window


def _as_data(sweep: Sweep, window: Window, where: Site, *, dry_run: bool) -> dict[str, Any]:
    data = {**as_data(sweep.findings, window, where), "quiet": sweep.quiet.as_dict()}
    if not dry_run:
        data["applied"] = [each.as_dict() for each in sweep.applied]
        data["changed"] = [asdict(each) for each in sweep.changes]
    return data


def _show(sweep: Sweep, digest: str, *, dry_run: bool) -> None:
    for change in sweep.changes:
        say(f"not as planned: {change.kind} {change.id} was {change.planned}, now {change.now}")
    findings = sweep.findings
    if not findings:
        return
    done = None if dry_run else {(each.kind, each.id, each.diagnosis) for each in sweep.applied}
    emit_table(
        ("KIND", "ID", "CALLBACK", "PARTS", "AGE", "DIAGNOSIS", "REMEDY"),
        [
            (it.kind, it.id, it.callback or "-", _parts(it), ago(it.age), it.diagnosis, _remedy(it, done))
            for it in findings
        ],
    )
    emit("")
    for finding in findings:
        emit(f"{finding.id}{_in_full(finding.callback)}: {finding.reason}")
    curable = sum(finding.curable for finding in findings)
    if dry_run:
        say(f"{curable} of {len(findings)} can be recovered: run the same command without --dry-run")
        say(f"with --output json this is a plan for --plan; its digest: {digest}")
    else:
        say(f"recovered {len(sweep.applied)} of {len(findings)}")


def _in_full(callback: str | None) -> str:
    """The callback, if the table does not show all of it."""
    return "" if callback is None or shortened(callback) == callback else f" ({callback})"


def _parts(finding: Finding) -> str:
    return "-" if finding.total is None else f"{finding.returned}/{finding.total}"


def _remedy(finding: Finding, done: Collection[tuple[str, str, str]] | None) -> str:
    if done is None or not finding.curable:
        return str(finding.remedy)
    return f"{finding.remedy}: " + ("done" if (finding.kind, finding.id, finding.diagnosis) in done else "not done")
