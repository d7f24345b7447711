"""From ``report.json`` to a page that a person reads. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]

_VERDICTS = {
    "done": "**Done and proven.** The operation is complete on every node; every claim below held at the same moment.",
    "aborted": "**Aborted** before anything was started.",
    "nothing-to-do": "**Nothing to do.** Nothing was changed.",
    "blocked": "**Blocked by pre-flight.** The cluster was not touched.",
    "verification-failed": "**Not proven.** The runbook ran, but not every claim holds. The same command tries again.",
    "stopped": "**Stopped.** Somebody has to see to it; then the same command goes on from here.",
    "unfinished": "**Not finished.** The same command goes on from here.",
}

_ABORTED = {
    "complete": "**Aborted, but complete.** It was to be stopped; AWS has completed it on every node all the same.",
    "stopped": "**Aborted.** It was stopped before it was complete on every node.",
    "not-begun": "**Aborted.** It was to be stopped, and AWS shows that it does not run.",
    "not-applicable": "**Aborted.** It was to be stopped, and applies no longer: a newer one may have superseded it.",
    "incomplete": "**Aborted.** It was given up before it was complete, when nothing was under way any more.",
    "unknown": "**Aborted.** It was to be stopped, and AWS does not show what has become of it.",
    None: "**Aborted.** It was to be stopped.",
}


def _verdict_of(report: Json) -> str:
    """How it ended, in a sentence or two."""
    aborted = report["outcome"] == "aborted" and report["abort"]
    return _ABORTED[report["abort"]["came_to"]] if aborted else _VERDICTS[report["outcome"]]


def markdown(report: Json) -> str:
    """The report as Markdown."""
    sections = (
        _head(report), _abort(report), _claims(report), _update(report), _nodes(report), _failovers(report),
        _stuck(report), _remedies(report), _repeated(report), _phases(report), _interruptions(report), _checks(report),
        _timeline(report),
    )  # fmt: skip
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _head(report: Json) -> list[str]:
    lines = [f"# Patch of {report['cluster']} ({report['environment']})", "", _verdict_of(report)]
    if report["why"]:
        lines += ["", f"> {_line(report['why'])}"]
    facts = [
        ("Run", report["run_id"]),
        ("Replication group", report["group"]),
        ("Role", report["role"]),
        ("Operation", report["operation"]["what"] or report["operation"]["kind"]),
        ("Plan", _plan(report["operation"])),
        ("Started", _at(report["started_at"])),
        ("Finished", _at(report["finished_at"])),
        ("Took", _length(report["seconds"])),
        ("Stuck after the patch", _count(report["findings"]["items"], report["findings"]["skipped"])),
        ("Recovered", _count(report["remedies"]["after"], report["findings"]["skipped"])),
        ("Left alone", _count(report["remedies"]["left"], report["findings"]["skipped"])),
        ("patchpilot", report["version"]),
    ]
    return [*lines, "", *_table(("", ""), facts)]


def _plan(operation: Json) -> str | None:
    """The digest of what was set out for, and who agreed to it."""
    if operation["plan"] is None:
        return None
    held = ", to which the run was held" if operation["held_to"] else ""
    by = f", approved by {operation['approved_by']}" if operation["approved_by"] else ""
    return f"{operation['plan']}{held}{by}"


def _abort(report: Json) -> list[str]:
    abort = report["abort"]
    if not abort:
        return []
    how = {0: "without a request of this run", None: "it is being stopped"}.get(
        abort["requests"], "AWS was asked to stop it"
    )
    if abort["given_up"]:
        how = f"given up, because AWS did not show that it began; {how}"
    rows = [("Why", abort["why"]), ("By", abort["by"]), ("How", how), ("Last status", abort["status"])]
    text = "Nodes in progress were finished; nothing was rolled back." if abort["came_to"] == "stopped" else ""
    return _section("Aborted", text, _table(("", ""), rows))


def _claims(report: Json) -> list[str]:
    claims = report["verification"]["claims"]
    rows = [(each["name"], "holds" if each["holds"] else "**does not hold**", each["evidence"]) for each in claims]
    return _section("Proof", "", _table(("Claim", "", "Evidence"), rows)) if claims else []


def _update(report: Json) -> list[str]:
    update = report["update"]
    if not update:
        return []
    automatic = {True: "yes", False: "no: AWS does nothing by itself", None: "AWS does not say"}[update["automatic"]]
    rows = [
        ("Update", update["name"]),
        ("What it is", update["description"] or update["kind"]),
        ("Severity", update["severity"]),
        ("Status", update["status"]),
        ("How it came to run", _how(update)),
        ("Recommended by (compliance)", _at(update["recommended_by"])),
        ("Within that date, says AWS", update["sla_met"]),
        ("Cannot be applied after", _at(update["ends"])),
        ("Applied by AWS itself after the recommended date", automatic),
    ]
    return _section("Service update", "", _table(("", ""), rows))


def _how(update: Json) -> str | None:
    if update["how"] is None:
        return None
    who = f"; initiated by {' and '.join(update['initiated_by'])}, says AWS" if update["initiated_by"] else ""
    if update["how"] == "adopted":
        return f"adopted: it ran already{who}"
    if update["how"] == "requested":
        return f"requested by this run, and given up before AWS showed that it began{who}"
    again = (
        f" ({update['attempts']} attempts: those before the last were interrupted)" if update["attempts"] > 1 else ""
    )
    return f"applied by this run{again}{who}"


def _nodes(report: Json) -> list[str]:
    head, rows = _node_table(report)
    return _section("Nodes", "", _table(head, rows)) if rows else []


def _node_table(report: Json) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """How far each node came; and what it was and is, of what the operation is about and of what has changed."""
    nodes = report["nodes"]
    by_type = report["operation"]["kind"] == "node-type"
    versions = not by_type or any(_version(each, "before") != _version(each, "after") for each in nodes)
    types = by_type or any(each["node_type_before"] != each["node_type_after"] for each in nodes)
    head: tuple[str, ...] = ("Node", "Update", "Began", "Ended")
    head += (("Version before", "Version after") if versions else ()) + (("Type before", "Type after") if types else ())
    rows = [
        (each["node"], each.get("status"), _at(each.get("started")), _at(each.get("ended")))
        + ((_version(each, "before"), _version(each, "after")) if versions else ())
        + ((each["node_type_before"], each["node_type_after"]) if types else ())
        for each in nodes
    ]
    return head, rows


def _version(node: Json, when: str) -> str:
    """``valkey 8.1.0``"""
    return " ".join(filter(None, (node[f"engine_{when}"], node[f"engine_version_{when}"])))


def _failovers(report: Json) -> list[str]:
    rows = [(_at(each["at"]), each["old"], each["to"], _told_by(each["told_by"])) for each in report["failovers"]]
    grace = _grace(report["grace"])
    if not rows and not grace:
        return []
    return _section("Failovers and grace", grace, _table(("When", "From", "To", "Told by"), rows))


def _grace(grace: Json | None) -> str:
    if grace is None:
        return ""
    again = f" It began anew {grace['rearmed']} time(s), after a further failover." if grace["rearmed"] else ""
    ends, length = _at(grace["deadline"]), _length(grace["seconds"])
    return f"Recovery was held back until {ends}: {length} from the {grace['because']}.{again}"


def _told_by(source: str) -> str:
    return "events" if source == "events" else "roles: AWS told of no event, so this is when it was first seen"


def _stuck(report: Json) -> list[str]:
    found = report["findings"]
    if found["skipped"]:
        return _section("What was stuck", f"Not looked for: {found['skipped']}.", [])
    rows = [
        (each["kind"], f"`{each['id']}`", each.get("callback"), each["diagnosis"], each["remedy"], each["reason"])
        for each in [*found["items"], *found["young"]]
    ]
    if not rows:
        return []
    young = (
        [f"{len(found['young'])} too young to be sure of, which the next phase waited for"] if found["young"] else []
    )
    summary = ", ".join([*(f"{number} {name}" for name, number in found["counts"].items()), *young])
    return _section("What was stuck", summary, _table(("Kind", "Id", "Callback", "Diagnosis", "Remedy", "Why"), rows))


def _remedies(report: Json) -> list[str]:
    remedies = report["remedies"]
    lines: list[str] = []
    for title, key in (("Recovered before the patch", "before"), ("Recovered after the patch", "after")):
        rows = [(_at(e["at"]), e["kind"], f"`{e['id']}`", e["remedy"], e["reason"]) for e in remedies[key]]
        lines += [*_section(title, "", _table(("When", "Kind", "Id", "Remedy", "Why"), rows)), ""] if rows else []
    left = [(each["kind"], f"`{each['id']}`", each["reason"]) for each in remedies["left"]]
    text = "Recovery left these alone; each says why."
    lines += [*_section("Left alone", text, _table(("Kind", "Id", "Why"), left)), ""] if left else []
    return lines[:-1]


def _repeated(report: Json) -> list[str]:
    rows = [
        (each.get("callback_name"), f"`{each.get('task_id')}`", f"`{each.get('group_id')}`", each.get("starts"))
        for each in report["may_have_run_twice"]
    ]
    text = (
        "A worker died inside each of these callbacks and it was started again: what it had done by then, it did twice."
    )
    return (
        _section("May have run twice in part", text, _table(("Callback", "Task", "Chord", "Starts"), rows))
        if rows
        else []
    )


def _phases(report: Json) -> list[str]:
    rows = [
        (each["title"], each["state"].replace("-", " "), _at(each["started_at"]), _length(each["seconds"]))
        for each in report["phases"]
    ]
    return _section("Phases", "", _table(("Phase", "", "Began", "Took"), rows))


def _interruptions(report: Json) -> list[str]:
    how = {"killed": "died without a word", "stopped": "stopped on request", "gave-up": "gave up"}
    rows = [
        (
            _at(each["left_at"]),
            f"{how[each['how']]} after {each['after']}",
            each["why"],
            _at(each["resumed_at"]),
            each["resumed_in"],
        )
        for each in report["interruptions"]
    ]
    head = ("Left", "How", "Why", "Taken up again", "In")
    return _section("Interruptions", "", _table(head, rows)) if rows else []


def _checks(report: Json) -> list[str]:
    checks, waivers = report["preflight"]["checks"], report["preflight"]["waivers"]
    rows = [(each["name"], _verdict(each), each["evidence"], each["mend"]) for each in checks]
    given = "Waived: " + "; ".join(f"{name} ({_line(reason)})" for name, reason in sorted(waivers.items())) + "."
    table = _table(("Check", "Verdict", "Evidence", "To mend it"), rows)
    return _section("Pre-flight", given if waivers else "", table) if rows else []


def _verdict(check: Json) -> str:
    return f"{check['verdict']}, **waived**: {check['waived']}" if check.get("waived") else str(check["verdict"])


def _timeline(report: Json) -> list[str]:
    rows = [(_at(each["at"]), each["what"], each["status"]) for each in report["timeline"]]
    return _section("What the watch saw", "", _table(("When", "What", "Status"), rows)) if rows else []


def _section(title: str, text: str, table: list[str]) -> list[str]:
    return [f"## {title}", *(["", text] if text else []), *(["", *table] if table else [])]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    body = [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body] if body else []


def _cell(value: Any) -> str:
    return "-" if value in (None, "") else _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


def _count(rows: Sequence[Any], skipped: str | None) -> str:
    return "not looked for" if skipped else str(len(rows))


def _at(text: str | None) -> str | None:
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if text else None


def _length(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
