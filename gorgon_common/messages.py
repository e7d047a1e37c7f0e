"""The contract between processes: what tasks are called and what their messages carry.

A message carries ids and nothing else (and when it was sent, so that a lost one can be told from a slow one).  Losing
all of them loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

AGENT = "gorgon.agent"
ACTION = "gorgon.action"
COMMAND = "gorgon.command"
NOOP = "gorgon.noop"
CONTROL = "gorgon.control"

TASKS = (AGENT, ACTION, COMMAND, NOOP, CONTROL)
"""Every task: `task(ids: list[int], sent: float)`; ids are step ids, `sent` is in seconds since 1970."""

FAST = frozenset({NOOP, CONTROL})
"""Tasks whose steps take no slot."""

_BY_KIND = {"agent": AGENT, "action": ACTION, "command": COMMAND, "noop": NOOP}


class Node(Protocol):
    """What is read of a node of the plan."""

    @property
    def id(self) -> str:
        """Its name in the plan."""

    @property
    def kind(self) -> str:
        """What it does."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """Its action's fields."""


def task(node: Node) -> str:
    """Return the task that runs a node."""
    return _BY_KIND.get(node.kind, CONTROL)


def label(node: Node, workflow: str, count: int = 1) -> str:
    """Return how Flower and logs call a message: `gorgon.agent[planner] feature-build/plan`."""
    role = node.spec.get("role")
    more = f" ×{count}" if count > 1 else ""
    name = node.id.removesuffix("[]").removesuffix("#")
    return f"{task(node)}{f'[{role}]' if role else ''} {workflow}/{name}{more}"
