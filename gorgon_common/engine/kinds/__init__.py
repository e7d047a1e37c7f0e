"""The kinds of steps, one file per kind.  To add a kind, write a file with its handler and add a line to HANDLERS."""

from __future__ import annotations

from gorgon_common.engine.kinds.agent import Agent
from gorgon_common.engine.kinds.aggregate import Aggregate
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.kinds.checkpoint import CheckpointMessage
from gorgon_common.engine.kinds.command import Command
from gorgon_common.engine.kinds.group import Group
from gorgon_common.engine.kinds.joins import End, Finally, PhaseJoin
from gorgon_common.engine.kinds.loop import Loop
from gorgon_common.engine.kinds.map import Map
from gorgon_common.engine.kinds.noop import Noop
from gorgon_common.engine.kinds.wait import Wait
from gorgon_common.errors import NotAvailable

__all__ = ["StepContext", "StepHandler", "handler", "register"]

HANDLERS: tuple[type[StepHandler], ...] = (
    Agent,
    Command,
    Aggregate,
    CheckpointMessage,
    Group,
    Map,
    Loop,
    Wait,
    Noop,
    PhaseJoin,
    Finally,
    End,
)
_handlers: dict[str, StepHandler] = {}


def register(kind: type[StepHandler]) -> None:
    """Register a kind of step, replacing an earlier handler of the same kind."""
    _handlers[kind.kind] = kind()


def handler(kind: str) -> StepHandler:
    """Return the handler of a kind.  Raises NotAvailable."""
    found = _handlers.get(kind)
    if found is None:
        raise NotAvailable(f"Steps of kind {kind} are not available yet.")
    return found


for _kind in HANDLERS:
    register(_kind)
