"""The contract between processes: what tasks are called and what their messages carry.

A message carries ids and nothing else (and when it was sent, so that a lost one can be told from a slow one).  Losing
all of them loses nothing.
"""

from __future__ import annotations

AGENT = "gorgon.agent"
ACTION = "gorgon.action"
COMMAND = "gorgon.command"
NOOP = "gorgon.noop"
CONTROL = "gorgon.control"

TASKS = (AGENT, ACTION, COMMAND, NOOP, CONTROL)
"""Every task: `task(ids: list[int], sent: float)`; ids are step ids, `sent` is in seconds since 1970."""

FAST = frozenset({NOOP, CONTROL})
"""Tasks whose steps take no slot."""

BY_KIND = {"agent": AGENT, "action": ACTION, "command": COMMAND, "noop": NOOP}
"""Kind of a step → its task; all others are CONTROL."""


def label(task: str, role: str | None, workflow: str, step: str, count: int = 1) -> str:
    """Return how Flower and logs call a message: `gorgon.agent[planner] feature-build/plan`."""
    more = f" ×{count}" if count > 1 else ""
    return f"{task}{f'[{role}]' if role else ''} {workflow}/{step}{more}"
