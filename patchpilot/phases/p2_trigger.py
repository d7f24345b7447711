"""Phase 2: start the operation, once.

No request that starts one has an idempotency token, and AWS does not say what a second one does. So: look first, ask
only if nothing runs, and after an interrupted request give AWS a settling time to show what it did before concluding
that it did nothing. What somebody has stopped meanwhile is never started again: there was a reason to stop it. A run
can be told to wait here for somebody's approval.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from patchpilot.elasticache.facts import UpdateStatus
from patchpilot.engine.plan import Attempt, Contradicted, Data, Effect, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.engine.requests import Request, stop
from patchpilot.errors import Aborted, Blocked, NeedsOperator, NothingToDo, Throttled, Unsafe
from patchpilot.phases.approve import Approve
from patchpilot.phases.desk import Desk
from patchpilot.phases.notes import clock_time, length, moment, noted
from patchpilot.phases.operations import GIVE_UP, Operation, Sign, Standing, operation
from patchpilot.phases.proposal import changes, propose
from patchpilot.phases.rotation import ASTRAY, NO_TIME
from patchpilot.phases.sight import Sight, look_around
from patchpilot.settings import Runbook

ACKNOWLEDGED = 10
"""How many settling times AWS has to show what it has accepted: nothing is risked by waiting for that."""

LOOKBACK = timedelta(hours=1)
"""How far back to look for signs of what was there before."""


MARGIN = timedelta(seconds=5)
"""How exactly it is known how far AWS's clock is ahead."""


class Trigger(Phase):
    """Start the operation."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("trigger", "start the operation", (Approve(desk), Apply(desk)))


class Apply(Step):
    """The operation runs, whoever started it."""

    name = "trigger"
    effect = Effect.OBSERVABLE

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._operation = operation(desk)
        self.title = self._operation.begins

    def intend(self, view: View) -> Data:
        """The baseline: what was so before anything was done. Whoever only observes keeps the first one."""
        if view.intent and not self._operation.acts:
            return view.intent
        sight = self._look(view.now, view.now - LOOKBACK)
        aim: Data = view.facts["readiness"]["aim"]
        return {
            "aim": dict(aim),
            "group": sight.group.status,
            "primary": sight.primary,
            "aws_primary": sight.group.primary,
            "heard": sight.said is not None,
            "members": [member.node for member in sight.group.members],
            **self._operation.baseline(aim, sight),
            **_seen_to_stop(view.intent, sight),
            **_refused(view),
        }

    def observe(self, view: View) -> Observation:
        sight = self._look(view.now, view.intended_at or view.now)
        if self._operation.acts or view.now < moment(view.intent["drawn"]) + self._desk.runbook.settle:
            view = replace(view, seen=roles_shown(view, sight))
        view = replace(view, intent={**view.intent, **view.seen.get("baseline", {}), "uncertain": _is_uncertain(view)})
        at = self._operation.standing(view.intent, sight, tried=_tried(view))
        at = replace(at, began=at.began and at.began + min(sight.behind, NO_TIME) - MARGIN)
        seen = look(view, at, self._desk.runbook, self._operation)
        if isinstance(seen, Reached):
            return Reached({**seen.fact, "held_to": self._desk.order.plan}, seen.say)
        if request := stop(self._desk.requests()):
            if _tried(view):
                return give_up(view, at, self._desk.runbook, request)
            if isinstance(seen, NotYet):
                return Contradicted(Aborted(f"ended before anything was started: {request}"))
        if isinstance(seen, NotYet):
            seen = replace(seen, seen=view.seen)
        return self._held_back(view) or unsure(view, sight, self._desk.runbook) or seen if _starts(seen) else seen

    def act(self, view: View) -> Data:
        try:
            answer = self._operation.start(view.intent)
        except Throttled as error:
            return {"refused": str(error), "again": True}
        except NeedsOperator as error:
            return {"refused": str(error)}
        if answer.unprocessed is not None:
            return {"refused": f"{answer.unprocessed.error_type}: {answer.unprocessed.error_message}"}
        return {"status": answer.status}

    def _look(self, now: datetime, since: datetime) -> Sight:
        kind = self._operation
        return look_around(
            self._desk, now, since=since if kind.by_events else None, actions=kind.by_actions, nodes=kind.by_nodes,
            reports=True,
        )  # fmt: skip

    def _held_back(self, view: View) -> Observation | None:
        """Why the request may not be made, now that all else is ready for it."""
        bound = view.facts["approve"].get("proposal") or view.facts["plan"].get("held")
        if bound is None or _tried(view):
            return None
        different = changes(bound, propose(self._desk, view.now, view.facts["readiness"]["aim"]))
        why = f"the world has changed since this was agreed to: {different}"
        return Contradicted(Blocked(why)) if different else None


def roles_shown(view: View, sight: Sight) -> Data:
    """Since when AWS shows the same primary, and the baseline with it, while that is all there is to go by. Pure.

    AWS's roles may be old ones. Where the nodes cannot be asked, a failover of before the run, of which AWS tells late
    or never, would otherwise be taken for one of the operation.
    """
    if _tried(view) or view.intent.get("heard") or sight.said or sight.group.primary is None:
        return view.seen
    primary = sight.group.primary
    if primary == view.seen.get("baseline", view.intent)["aws_primary"]:
        return view.seen
    return {"baseline": {"primary": primary, "aws_primary": primary}, "since": noted(view.now)}


def unsure(view: View, sight: Sight, runbook: Runbook) -> NotYet | None:
    """To be waited for before the request, if AWS's roles are all there is to go by. Pure."""
    if _tried(view) or view.intent.get("heard") or sight.said:
        return None
    since = moment(view.seen["since"]) if "since" in view.seen else view.intended_at or view.now
    until = since + runbook.settle
    why = "the nodes cannot be asked who is the primary: waiting to be sure that what AWS shows is not an old answer"
    return NotYet(why, until=until, seen=view.seen) if view.now < until else None


def look(view: View, at: Standing, runbook: Runbook, kind: Operation) -> Observation:
    """What to make of how the operation stands. Pure."""
    match at.sign:
        case Sign.UNKNOWN | Sign.BUSY:
            return _wait(view, runbook.stall, at.why)
        case Sign.RUNNING | Sign.OVER | Sign.STOPPED:
            return Reached(_started(view, at), say=_told(view, at))
        case Sign.IMPOSSIBLE:
            error = at.error or Unsafe(at.why)
            return Contradicted(Unsafe(f"{error}; {GIVE_UP}") if _tried(view) else error)
    if not kind.acts:
        return _await_others(view, runbook.observe)
    return _not_started(view, at, runbook.settle, kind.settles, runbook.stall)


def _not_started(view: View, at: Standing, settle: timedelta, settles: int, bound: timedelta) -> Observation:
    last = view.attempts[-1] if view.attempts else _refused_before(view)
    if last is None:
        return NotYet(f"it is {at.status}", act=True)
    # Whoever takes the run up may be on a host whose clock is ahead of the one that dated the request.
    asked = min(max(last.at, view.since), last.at + ASTRAY)
    if last.refused:
        return _after_refusal(view, last, asked, at, settle)
    if last.interrupted:
        until = asked + settles * settle
        if view.now < until:
            return NotYet(f"{_request(last)}; does AWS show it?", until=until)
        return _wait(view, bound, f"{_request(last)} and AWS shows nothing of it", act=True)
    if view.now < last.at + ACKNOWLEDGED * settle:
        return NotYet(f"AWS accepted the request and still shows it as {at.status}")
    return Contradicted(Unsafe(
        f"AWS accepted the request of {clock_time(last.at)} and still shows it as {at.status}: look at the "
        f"group in the console; once it runs, or has been done by hand, run the same command again; or, {GIVE_UP}"
    ))  # fmt: skip


def give_up(view: View, at: Standing, runbook: Runbook, request: Request) -> Observation:
    """Go on without having seen that a request took effect, because somebody asks for that. Pure.

    It may have had all its effects, a failover among them, so what follows a rotation follows this as well; and AWS
    first gets all the time it has to show them.
    """
    last = max(attempt.at for attempt in view.attempts if not attempt.refused)
    until = last + ACKNOWLEDGED * runbook.settle
    if at.sign is not Sign.IMPOSSIBLE and view.now < until:
        left = length(until - view.now)
        return NotYet(f"{request}; AWS has {left} more to show what it made of the request of {clock_time(last)}")
    fact = {**_started(view, at), "how": "requested", "given_up": str(request)}
    return Reached(fact, say=f"given up: {request}; AWS did not show that it began")


def _after_refusal(view: View, last: Attempt, asked: datetime, at: Standing, settle: timedelta) -> Observation:
    """It may run all the same: then AWS shows it soon, whoever asks. What was only too much at once is tried again, and
    so is everything by whoever starts the run again: not before AWS has had its time, either."""
    outcome = last.outcome or {}
    refusal = outcome.get("refused", "")
    if outcome.get("again") and view.now >= asked + settle:
        return _wait(view, ACKNOWLEDGED * settle, refusal, act=True)
    # AWS's words are free text, so nothing rests on them but how long to look for what they say.
    patience = ACKNOWLEDGED * settle if "already" in refusal.lower() else settle
    if view.now < asked + patience:
        return NotYet(f"AWS refused ({refusal}); does it run all the same?", until=asked + patience)
    if not view.attempts or last.at < view.since:
        return NotYet(f"it is {at.status}", act=True)
    return Contradicted(NeedsOperator(f"AWS refuses to start it: {refusal}"))


def _await_others(view: View, patience: timedelta) -> Observation:
    began = datetime.fromisoformat(view.intent["drawn"])
    if view.now < began + patience:
        return NotYet(f"nothing has begun yet; waiting for {length(began + patience - view.now)} more")
    return Contradicted(NothingToDo(f"nothing began within {length(patience)}"))


def _wait(view: View, bound: timedelta, why: str, *, act: bool = False) -> Observation:
    """Go on as long as ``bound`` allows, since somebody began to look or the step last gave up."""
    began = max(filter(None, (view.since, view.contradicted_at)))
    if view.now < began + bound:
        return NotYet(why, act=act)
    after = f"; {GIVE_UP}" if _tried(view) else ""
    told = f"{why}; so it has been since {clock_time(began)}: look at the group in the console{after}"
    return Contradicted(Unsafe(told))


def _started(view: View, at: Standing) -> Data:
    tried = [attempt for attempt in view.attempts if not attempt.refused]
    # An interrupted request may never have arrived: then AWS was quicker, and says so.
    ours = bool(tried) and set(at.initiated_by) != {"system"}
    return {
        "update": at.update or view.intent.get("update"),
        "how": "applied" if ours else "adopted",
        "attempts": len(tried),
        "initiated_by": list(at.initiated_by),
        "since": noted(_began(view, at)),
        "primary": view.intent["primary"],
        "members": view.intent["members"],
        "status": at.status,
        "baseline": dict(view.intent),
    }


def _told(view: View, at: Standing) -> str:
    """For whoever looks on: an operation that somebody else started, or has stopped."""
    if at.sign is Sign.STOPPED:
        return "somebody has stopped it since: it is not started again"
    if _started(view, at)["how"] == "applied":
        return ""
    who = f", started by {' and '.join(at.initiated_by)}" if at.initiated_by else ""
    return f"adopted: it is {at.status}{who}"


def _began(view: View, at: Standing) -> datetime:
    """From when on events may belong to this operation."""
    return view.attempts[0].at if view.attempts else min(filter(None, (at.began, view.now)))


def _tried(view: View) -> bool:
    """Whether there was a request that AWS may have followed."""
    return any(not attempt.refused for attempt in view.attempts)


def _is_uncertain(view: View) -> bool:
    """Whether nobody knows if AWS ever followed a request of ours."""
    return _tried(view) and all(attempt.interrupted or attempt.refused for attempt in view.attempts)


def _seen_to_stop(earlier: Data, sight: Sight) -> Data:
    """What stays of an earlier baseline of this run: what was not stopped then and is now was stopped by somebody."""
    action = sight.action(earlier.get("update", ""))
    if action is None or action.status != UpdateStatus.STOPPED or earlier["status"] in {None, UpdateStatus.STOPPED}:
        return {}
    return {"status": earlier["status"]}


def _refused(view: View) -> Data:
    """What stays of a refusal when the baseline is drawn anew: AWS may have started it all the same."""
    last = view.attempts[-1] if view.attempts else _refused_before(view)
    return {"refused": {"at": noted(last.at), "outcome": dict(last.outcome or {})}} if last else {}


def _refused_before(view: View) -> Attempt | None:
    """The last request before the baseline was drawn: AWS refused it, or the baseline would be an older one."""
    note = view.intent.get("refused")
    return Attempt(moment(note["at"]), note["outcome"]) if note else None


def _starts(seen: Observation) -> bool:
    return isinstance(seen, NotYet) and seen.act


def _request(attempt: Attempt) -> str:
    return f"the request of {clock_time(attempt.at)} was interrupted"
