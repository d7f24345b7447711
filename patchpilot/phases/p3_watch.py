"""Phase 3: follow the rotation until it is over on every node, and stop it if it has to be stopped.

Completion comes from what AWS shows of the operation, node by node; events corroborate and are not needed. Failovers
come from the nodes' own word, from events, or from the roles that AWS shows, whichever tells first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from patchpilot.elasticache.facts import UpdateStatus
from patchpilot.engine.plan import Contradicted, Data, Effect, NotYet, Observation, Phase, Reached, Step, View
from patchpilot.errors import NeedsOperator, Throttled
from patchpilot.phases.abort import Limits, limits
from patchpilot.phases.desk import Desk
from patchpilot.phases.following import ELSEWHERE, Followed, bound, ceased, stalled, stopped_elsewhere
from patchpilot.phases.notes import clock_time, moment, noted
from patchpilot.phases.operations import Operation, Sign, Standing, operation
from patchpilot.phases.rotation import Rotation
from patchpilot.phases.sight import Sight, look_around
from patchpilot.settings import Runbook

RESTING = frozenset({Sign.OVER, Sign.STOPPED, Sign.IMPOSSIBLE, Sign.READY})
"""Signs that nothing of the operation is under way."""

REPEAT = 10
"""How many settling times to wait before asking again to stop what AWS has promised to stop: that does no harm."""


class Watch(Phase):
    """Follow the rotation."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("watch", "follow the rotation", (FollowRotation(desk), StopRotation(desk)))


def rotated(facts: Mapping[str, Data]) -> Data:
    """What is known of the rotation once it is over: by the watch, or by the step that stopped it."""
    return facts["stop"] if "rotation" in facts["stop"] else facts["watch"]


class _Following(Step):
    """Looks at the group again and again, and remembers what it saw."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._operation = operation(desk)
        self._last: Rotation | None = None

    def _look(self, view: View) -> tuple[Standing, Sight, Followed]:
        trigger, kind = view.facts["trigger"], self._operation
        sight = look_around(
            self._desk, view.now, since=moment(trigger["since"]), actions=kind.by_actions, nodes=kind.by_nodes,
            reports=True,
        )  # fmt: skip
        known = self._known(view)
        at = kind.standing(baseline(trigger, known), sight, tried=True)
        followed = Followed.of(known, self._last).follow(at, sight)
        self._last = followed.rotation
        return at, sight, followed

    def _known(self, view: View) -> Data:
        """What was seen before this look; at first, what the trigger left."""
        return view.seen or begun(view.facts["trigger"])


def begun(trigger: Data) -> Data:
    """What is known of a rotation that has just been triggered. Pure."""
    before, since = trigger["baseline"], moment(trigger["since"])
    rotation = Rotation.begin(
        trigger["primary"], since, aws=before.get("aws_primary"), heard=before.get("heard", False)
    )
    return {"rotation": rotation.note(), "update": trigger["update"]}


def baseline(trigger: Data, known: Data) -> Data:
    """The trigger's, and that the operation has begun, with what is known of it since.

    :param known: what was seen of the rotation so far.
    """
    seen = {"followed": known.get("update"), "failed_over": bool(known["rotation"]["failovers"])}
    return {**trigger["baseline"], "begun": True, **seen}


class FollowRotation(_Following):
    """The rotation is over on every node, and the group is available again; or it has to be stopped."""

    name = "watch"
    title = "follow the rotation until every node is done"

    def observe(self, view: View) -> Observation:
        at, sight, followed = self._look(view)
        too_late = at.sign is Sign.OVER and (self._operation.acts or at.update is not None)
        found = Limits() if too_late else limits(self._desk, at, view.now, moment(view.facts["trigger"]["since"]))
        stop, aside = found.stop, "".join(f"; a limit is not watched at the moment: {why}" for why in found.unread)
        if stop and not self._can_stop(view, at):
            aside += f"; it should be stopped ({stop['why']}), but AWS cannot stop this operation"
            stop = None
        elif stop and not self._operation.stoppable:
            stop = {**stop, "why": f"{stop['why']}; AWS cannot stop it, so it is given up"}
        seen = look(view, at, sight, followed, self._desk.runbook, self._operation, stop, aside)
        return _with_unwatched(view, seen, found.unread)

    def _can_stop(self, view: View, at: Standing) -> bool:
        """Whether AWS can stop it; or there is nothing to stop: it was given up and never began, or it takes too long
        and nothing is under way any more."""
        never_began = at.sign in RESTING and "given_up" in view.facts["trigger"]
        came_to_nothing = view.contradicted_at is not None and at.calm
        return self._operation.stoppable or never_began or came_to_nothing


def _with_unwatched(view: View, seen: Observation, unread: tuple[str, ...]) -> Observation:
    """What was seen, and on record since when a limit cannot be watched: for as long as that lasts, by the first word
    of why, because such words differ from look to look."""
    if not unread or not isinstance(seen, NotYet):
        return seen
    return replace(seen, seen={**seen.seen, "unwatched": view.seen.get("unwatched") or "; ".join(unread)})


def look(
    view: View, at: Standing, sight: Sight, followed: Followed, runbook: Runbook, kind: Operation,
    stop: Data | None = None, aside: str = "",
) -> Observation:  # fmt: skip
    """What to make of one look at the group. Pure.

    :param stop: why the rotation has to be stopped, if it has to be.
    :param aside: what else to say to whoever looks on.
    """
    seen = followed.note()
    if stop is not None:
        return Reached({**_end(view, sight, seen, at), "abort": dict(stop)}, say=f"it has to be stopped: {stop['why']}")
    if kind.acts and (stopped := stopped_elsewhere(view, at, followed, runbook)):
        return Reached({**_end(view, sight, seen, at), "abort": stopped}, say=f"{stopped['why']}: it ends here")
    over = at.sign is Sign.OVER or (at.sign is Sign.STOPPED and not kind.acts)
    error = stalled(view, at, followed, runbook) or ceased(view, at, followed, runbook)
    if over and sight.group.available:
        confirmed = followed.since(view.now) + kind.confirmed_after(at, runbook)
        if view.now >= confirmed:
            return Reached(_end(view, sight, seen, at))
        return NotYet(f"{followed.line(at)}; waiting to be sure that it is over", until=confirmed, seen=seen)
    if at.sign is Sign.RUNNING and at.update is None and at.calm:
        aside += f"; nothing is under way, but it is waited for until {clock_time(bound(view, runbook))}"
    return Contradicted(error, seen) if error else NotYet(followed.line(at) + aside, seen=seen)


def _end(view: View, sight: Sight, seen: Data, at: Standing) -> Data:
    return {
        **seen,
        "completed": noted(view.now),
        "events": noted(sight.events),
        "sla_met": at.detail.get("sla_met"),
    }


class StopRotation(_Following):
    """If the rotation had to be stopped, or somebody stopped it: it is at rest, and the group is available again.

    What is only observed, and is no service update, cannot be stopped: then this waits until it has come to rest.
    Nodes in progress are finished and nothing is rolled back: after the last one the update is complete all the same.
    """

    name = "stop"
    title = "stop the update, if it has to be stopped"
    effect = Effect.OBSERVABLE

    def intend(self, view: View) -> Data:
        watched = view.facts["watch"]
        abort = watched.get("abort") or {}
        ours = abort.get("by") != ELSEWHERE
        return {"why": abort.get("why"), "update": watched.get("update") if ours else None, "status": watched["status"]}

    def observe(self, view: View) -> Observation:
        if not view.facts["watch"].get("abort"):
            return Reached({"needed": False})
        at, sight, followed = self._look(view)
        return wind_down(view, at, sight, followed, self._desk.runbook, given_up=not self._operation.stoppable)

    def act(self, view: View) -> Data:
        try:
            answer = self._desk.cloud.stop(view.intent["update"], self._desk.group)
        except (NeedsOperator, Throttled) as error:
            return {"refused": str(error)}
        if answer.unprocessed is not None:
            return {"refused": f"{answer.unprocessed.error_type}: {answer.unprocessed.error_message}"}
        return {"status": answer.status}

    def _known(self, view: View) -> Data:
        return view.seen or view.facts["watch"]


def wind_down(
    view: View, at: Standing, sight: Sight, followed: Followed, runbook: Runbook, *, given_up: bool = False
) -> Observation:
    """Whether the rotation has come to rest, and whether to ask for that. Pure.

    :param given_up: whether AWS cannot stop it: then it rests when nothing has come of it for long.
    """
    seen = followed.note()
    in_unknown_words = at.sign is Sign.UNKNOWN and at.status is not None
    going_on = in_unknown_words or (at.sign is Sign.RUNNING and at.status != UpdateStatus.STOPPING)
    asks = going_on and view.intent["update"] and _ask_again(view, runbook)
    if in_unknown_words and asks:
        return NotYet(followed.line(at), act=True, seen=seen)
    resting = at.sign in RESTING | {Sign.UNKNOWN} and sight.group.available
    if resting or (given_up and at.sign is Sign.RUNNING and at.calm):
        confirmed = followed.since(view.now) + (_rests(view, at, runbook) if resting else runbook.quiet)
        if view.now >= confirmed:
            return Reached({**_end(view, sight, seen, at), "needed": True, "attempts": len(view.attempts)})
        return NotYet(f"{followed.line(at)}; waiting to be sure that it has stopped", until=confirmed, seen=seen)
    if asks:
        return NotYet(followed.line(at), act=True, seen=seen)
    error = stalled(view, at, followed, runbook)
    return Contradicted(error, seen) if error else NotYet(followed.line(at), seen=seen)


def _rests(view: View, at: Standing, runbook: Runbook) -> timedelta:
    """For how long all has to look at rest. What AWS does not list any more, it may never list again."""
    if at.sign is not Sign.UNKNOWN:
        return runbook.settle
    return runbook.quiet if "given_up" in view.facts["trigger"] else runbook.stall


def _ask_again(view: View, runbook: Runbook) -> bool:
    """Whether nobody has asked AWS to stop yet, or so long ago that it cannot have heard."""
    last = view.attempts[-1] if view.attempts else None
    if last is None:
        return True
    heard = not last.interrupted and not last.refused
    return view.now >= last.at + (REPEAT if heard else 1) * runbook.settle


def outcome(facts: Mapping[str, Data]) -> str:
    """What to call the end of a run."""
    return "aborted" if facts["watch"].get("abort") else "done"
