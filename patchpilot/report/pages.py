"""From ``report.json`` to what a page for people says, whatever it is written in. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Code:
    """Words of a machine: an id."""

    text: Any


@dataclass(frozen=True)
class Strong:
    """Words that must not be overlooked."""

    text: str


Cell = Any
"""What a table's cell says: a value, words with a meaning, or a tuple of these, one after the other."""


@dataclass(frozen=True)
class Section:
    """One part of the page; without rows it says only its text."""

    title: str
    text: str = ""
    head: tuple[str, ...] = ("", "")
    rows: Sequence[Sequence[Cell]] = ()


@dataclass(frozen=True)
class Page:
    """Everything that the page says, in order."""

    title: str
    verdict: str
    more: str
    why: str | None
    facts: Sequence[tuple[str, Cell]]
    sections: Sequence[Section]


_VERDICTS = {
    "done": ("Done and proven.", "The operation is complete on every node; every claim below held at the same moment."),
    "aborted": ("Aborted.", "It ended before anything was started."),
    "nothing-to-do": ("Nothing to do.", "Nothing was changed."),
    "blocked": ("Blocked by pre-flight.", "The cluster was not touched."),
    "verification-failed": ("Not proven.", "The runbook ran, but not every claim holds. The same command tries again."),
    "stopped": ("Stopped.", "Somebody has to see to it; then the same command goes on from here."),
    "unfinished": ("Not finished.", "The same command goes on from here."),
}

_ABORTED = {
    "complete": ("Aborted, but complete.", "It was to be stopped; AWS has completed it on every node all the same."),
    "stopped": ("Aborted.", "It was stopped before it was complete on every node."),
    "not-begun": ("Aborted.", "It was to be stopped, and AWS shows that it does not run."),
    "not-applicable": ("Aborted.", "It was to be stopped, and applies no longer: a newer one may have superseded it."),
    "incomplete": ("Aborted.", "It was given up before it was complete, when nothing was under way any more."),
    "unknown": ("Aborted.", "It was to be stopped, and AWS does not show what has become of it."),
    None: ("Aborted.", "It was to be stopped."),
}


def _verdict_of(report: Json) -> tuple[str, str]:
    """How it ended: in a word or two, and in a sentence."""
    aborted = report["outcome"] == "aborted" and report["abort"]
    return _ABORTED[report["abort"]["came_to"]] if aborted else _VERDICTS[report["outcome"]]


def page(report: Json) -> Page:
    """What the page about ``report`` says."""
    skipped = report["findings"]["skipped"]
    found = (
        _abort(report), _claims(report), _update(report), _nodes(report), _failovers(report), _stuck(report),
        *_remedies(report), _repeated(report), _phases(report), _interruptions(report), _checks(report),
        _timeline(report),
    )  # fmt: skip
    verdict, more = _verdict_of(report)
    return Page(
        title=f"Patch of {report['cluster']} ({report['environment']})",
        verdict=verdict,
        more=more,
        why=report["why"],
        facts=(
            ("Run", report["run_id"]),
            ("Replication group", report["group"]),
            ("Role", report["role"]),
            ("Operation", report["operation"]["what"] or report["operation"]["kind"]),
            ("Plan", _plan(report["operation"])),
            ("Started", _at(report["started_at"])),
            ("Finished", _at(report["finished_at"])),
            ("Took", length(report["seconds"])),
            ("Stuck after the patch", _count(report["findings"]["items"], skipped)),
            ("Recovered", _count(report["remedies"]["after"], skipped)),
            ("Left alone", _count(report["remedies"]["left"], skipped)),
            ("patchpilot", report["version"]),
        ),
        sections=tuple(section for section in found if section and (section.rows or section.text)),
    )


def _plan(operation: Json) -> str | None:
    """The digest of what was set out for, and who agreed to it."""
    if operation["plan"] is None:
        return None
    held = ", to which the run was held" if operation["held_to"] else ""
    by = f", approved by {operation['approved_by']}" if operation["approved_by"] else ""
    return f"{operation['plan']}{held}{by}"


def _abort(report: Json) -> Section | None:
    abort = report["abort"]
    if not abort:
        return None
    how = {0: "without a request of this run", None: "it is being stopped"}.get(
        abort["requests"], "AWS was asked to stop it"
    )
    if abort["given_up"]:
        how = f"given up, because AWS did not show that it began; {how}"
    rows = [("Why", abort["why"]), ("By", abort["by"]), ("How", how), ("Last status", abort["status"])]
    text = "Nodes in progress were finished; nothing was rolled back." if abort["came_to"] == "stopped" else ""
    return Section("Aborted", text, rows=rows)


def _claims(report: Json) -> Section | None:
    claims = report["verification"]["claims"]
    rows = [(each["name"], "holds" if each["holds"] else Strong("does not hold"), each["evidence"]) for each in claims]
    return Section("Proof", "", ("Claim", "", "Evidence"), rows)


def _update(report: Json) -> Section | None:
    update = report["update"]
    if not update:
        return None
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
    return Section("Service update", rows=rows)


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


def _nodes(report: Json) -> Section:
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
    return Section("Nodes", "", head, rows)


def _version(node: Json, when: str) -> str:
    """``valkey 8.1.0``"""
    return " ".join(filter(None, (node[f"engine_{when}"], node[f"engine_version_{when}"])))


def _failovers(report: Json) -> Section:
    rows = [(_at(each["at"]), each["old"], each["to"], _told_by(each["told_by"])) for each in report["failovers"]]
    return Section("Failovers and grace", _grace(report["grace"]), ("When", "From", "To", "Told by"), rows)


def _grace(grace: Json | None) -> str:
    if grace is None:
        return ""
    again = f" It began anew {grace['rearmed']} time(s), after a further failover." if grace["rearmed"] else ""
    ends, wait = _at(grace["deadline"]), length(grace["seconds"])
    return f"Recovery was held back until {ends}: {wait} from the {grace['because']}.{again}"


def _told_by(source: str) -> str:
    return "events" if source == "events" else "roles: AWS told of no event, so this is when it was first seen"


def _stuck(report: Json) -> Section:
    found = report["findings"]
    if found["skipped"]:
        return Section("What was stuck", f"Not looked for: {found['skipped']}.")
    rows = [
        (each["kind"], Code(each["id"]), each.get("callback"), each["diagnosis"], each["remedy"], each["reason"])
        for each in [*found["items"], *found["young"]]
    ]
    young = (
        [f"{len(found['young'])} too young to be sure of, which the next phase waited for"] if found["young"] else []
    )
    summary = ", ".join([*(f"{number} {name}" for name, number in found["counts"].items()), *young])
    return Section("What was stuck", summary, ("Kind", "Id", "Callback", "Diagnosis", "Remedy", "Why"), rows)


def _remedies(report: Json) -> list[Section]:
    remedies = report["remedies"]
    head = ("When", "Kind", "Id", "Remedy", "Why")
    done = [
        Section(
            title, "", head, [(_at(e["at"]), e["kind"], Code(e["id"]), e["remedy"], e["reason"]) for e in remedies[key]]
        )
        for title, key in (("Recovered before the patch", "before"), ("Recovered after the patch", "after"))
    ]
    left = [(each["kind"], Code(each["id"]), each["reason"]) for each in remedies["left"]]
    text = "Recovery left these alone; each says why." if left else ""
    return [*done, Section("Left alone", text, ("Kind", "Id", "Why"), left)]


def _repeated(report: Json) -> Section | None:
    rows = [
        (each.get("callback_name"), Code(each.get("task_id")), Code(each.get("group_id")), each.get("starts"))
        for each in report["may_have_run_twice"]
    ]
    text = (
        "A worker died inside each of these callbacks and it was started again: what it had done by then, it did twice."
    )
    return Section("May have run twice in part", text, ("Callback", "Task", "Chord", "Starts"), rows) if rows else None


def _phases(report: Json) -> Section:
    rows = [
        (each["title"], each["state"].replace("-", " "), _at(each["started_at"]), length(each["seconds"]))
        for each in report["phases"]
    ]
    return Section("Phases", "", ("Phase", "", "Began", "Took"), rows)


def _interruptions(report: Json) -> Section:
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
    return Section("Interruptions", "", ("Left", "How", "Why", "Taken up again", "In"), rows)


def _checks(report: Json) -> Section | None:
    checks, waivers = report["preflight"]["checks"], report["preflight"]["waivers"]
    rows = [(each["name"], _verdict(each), each["evidence"], each["mend"]) for each in checks]
    given = "Waived: " + "; ".join(f"{name} ({_line(reason)})" for name, reason in sorted(waivers.items())) + "."
    head = ("Check", "Verdict", "Evidence", "To mend it")
    return Section("Pre-flight", given if waivers else "", head, rows) if rows else None


def _verdict(check: Json) -> Cell:
    if check.get("waived"):
        return (f"{check['verdict']},", Strong("waived:"), check["waived"])
    return str(check["verdict"])


def _timeline(report: Json) -> Section:
    rows = [(_at(each["at"]), each["what"], each["status"]) for each in report["timeline"]]
    return Section("What the watch saw", "", ("When", "What", "Status"), rows)


def _line(text: str) -> str:
    return " ".join(text.split())


def _count(rows: Sequence[Any], skipped: str | None) -> str:
    return "not looked for" if skipped else str(len(rows))


def _at(text: str | None) -> str | None:
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if text else None


def length(seconds: float | None) -> str | None:
    """A length of time, for people."""
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
