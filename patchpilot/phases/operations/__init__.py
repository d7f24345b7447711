"""The kinds of operation, one row each. They share all phases; what differs is in their classes."""

from __future__ import annotations

from patchpilot.phases.desk import Desk
from patchpilot.phases.operations.base import GIVE_UP, Operation, Sign, Standing
from patchpilot.phases.operations.gameday import GameDay
from patchpilot.phases.operations.modification import EngineUpgrade, NodeType
from patchpilot.phases.operations.observe import Observing
from patchpilot.phases.operations.service_update import ServiceUpdateOperation
from patchpilot.phases.order import Kind

OPERATIONS: dict[Kind, type[Operation]] = {
    each.kind: each for each in (ServiceUpdateOperation, EngineUpgrade, NodeType, GameDay, Observing)
}

__all__ = ["GIVE_UP", "OPERATIONS", "Operation", "Sign", "Standing", "operation"]


def operation(desk: Desk) -> Operation:
    """The operation that the desk's run is about."""
    return OPERATIONS[desk.order.operation](desk)
