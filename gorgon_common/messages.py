"""The contract between processes: the names of tasks and the contents of their messages.

A message carries only ids, and the time it was sent, which distinguishes lost messages from slow ones.  If all messages
are lost, no data is lost.
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
"""Kind of a step → its task; all other kinds use CONTROL."""


def label(task: str, role: str | None, workflow: str, step: str, count: int = 1) -> str:
    """Return the display name of a message in Flower and logs: `gorgon.agent[planner] feature-build/plan`."""
    more = f" ×{count}" if count > 1 else ""
    return f"{task}{f'[{role}]' if role else ''} {workflow}/{step}{more}"
