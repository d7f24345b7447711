"""The API as a scenario has it: answers that are late, missing, refused or wrong, over one that is right."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import TypeVar

from patchpilot.lab.answers import is_of_cloudwatch, override
from patchpilot.lab.api import Answer, Api, Fault, Params
from patchpilot.lab.scenario import CALM, Failing, Refusal, Scenario, Some, Stale, Telling, Window
from patchpilot.lab.world import Event, Milestone, View, World

_APPLY = "BatchApplyUpdateAction"
_ASKS = (_APPLY, "ModifyReplicationGroup", "TestFailover")
_ACTIONS = "DescribeUpdateActions"
_EVENTS = "DescribeEvents"

S = TypeVar("S", bound=Some)


class DisturbedApi:
    """The operations, disturbed. Thread safe.

    :param asked: called when somebody asks for an operation on the nodes, before anything comes of it.
    """

    def __init__(
        self, api: Api, world: World, scenario: Scenario = CALM, *, asked: Callable[[], None] = lambda: None
    ) -> None:
        self._api = api
        self._world = world
        self._scenario = scenario
        self._asked = asked
        self._lock = threading.Lock()
        self._dice = random.Random(scenario.seed)  # noqa: S311 - not for secrets
        self._met: Counter[int] = Counter()

    def answers(self, operation: str) -> bool:
        """Whether this is one of the operations."""
        return self._api.answers(operation)

    def answer(self, operation: str, params: Params) -> Answer:
        """Perform an operation.

        :raises Fault: for an error answer.
        """
        if operation in _ASKS:
            self._world.reach(Milestone.ASKED)
            self._asked()
        failing = self._failing(operation)
        if failing is not None and not failing.took_effect:
            raise _fault(failing)
        answer = self._perform(operation, params)
        if failing is not None:
            raise _fault(failing)
        return answer

    def trip(self, operation: str, *, of_cloudwatch: bool = False) -> None:
        """Fail, or not, in an operation that somebody else performs.

        :raises Fault: for an error answer.
        """
        failing = self._failing(operation, of_cloudwatch=of_cloudwatch)
        if failing is not None:
            raise _fault(failing)

    def _perform(self, operation: str, params: Params) -> Answer:
        refusal = self._hit(self._scenario.refusal) if operation == _APPLY else None
        if refusal is not None and not refusal.took_effect:
            return _refused(refusal, params)
        answer = self._api.answer(operation, params, self._seen(operation))
        if refusal is not None:
            return _refused(refusal, params)
        for each in self._scenario.override:
            if each.operation == operation and self._hit([each]) is not None:
                for path, value in each.values.items():
                    override(answer, path, value)
        return answer

    def _failing(self, operation: str, *, of_cloudwatch: bool = False) -> Failing | None:
        meant = [each for each in self._scenario.failing if is_of_cloudwatch(each.operation) is of_cloudwatch]
        return self._hit([each for each in meant if fnmatchcase(operation, each.operation)])

    def _hit(self, rules: Sequence[S]) -> S | None:
        """The first rule that hits this call. Each of them counts the calls that come within its window."""
        with self._lock:
            return next((rule for rule in rules if self._holds(rule) and self._counts(rule)), None)

    def _holds(self, window: Window) -> bool:
        return window.holds(self._world.reached(window.since), self._world.clock.now())

    def _counts(self, rule: Some) -> bool:
        self._met[id(rule)] += 1
        number = self._met[id(rule)] - rule.skip
        return 0 < number <= (rule.calls or number) and self._dice.random() < rule.rate

    def _seen(self, operation: str) -> View | None:
        """What an operation gets to see of the account; None: what is so."""
        if not operation.startswith("Describe"):
            return None
        lag = max((self._lag(each) for each in self._scenario.stale if self._is_stale(each, operation)), default=None)
        view = self._world.view() if lag is None else self._world.view_at(self._world.clock.now() - lag)
        if operation == _ACTIONS and self._hit(self._scenario.gap):
            return replace(view, actions={})
        if operation == _EVENTS and self._scenario.event:
            return replace(view, events=tuple(event for event in view.events if self._told(event)))
        return view

    def _is_stale(self, stale: Stale, operation: str) -> bool:
        return fnmatchcase(operation, stale.operation) and self._holds(stale)

    def _lag(self, stale: Stale) -> timedelta:
        with self._lock:
            return stale.lag * self._dice.random() if stale.flicker else stale.lag

    def _told(self, event: Event) -> bool:
        ways = [way for way in self._scenario.event if _is_about(way, event)]
        late = max((way.late for way in ways), default=timedelta())
        return not any(way.missing for way in ways) and event.date + late <= self._world.clock.now()


def _is_about(way: Telling, event: Event) -> bool:
    return fnmatchcase(event.message, way.like) and fnmatchcase(event.source, way.source)


def _fault(failing: Failing) -> Fault:
    return Fault(failing.code, failing.message, failing.status)


def _refused(refusal: Refusal, params: Params) -> Answer:
    about = {
        "ServiceUpdateName": params.get("ServiceUpdateName", ""),
        "ErrorType": refusal.error_type,
        "ErrorMessage": refusal.error_message,
    }
    rows = [{"ReplicationGroupId": each, **about} for each in params.get("ReplicationGroupIds") or []]
    rows += [{"CacheClusterId": each, **about} for each in params.get("CacheClusterIds") or []]
    return {"ProcessedUpdateActions": [], "UnprocessedUpdateActions": rows}
