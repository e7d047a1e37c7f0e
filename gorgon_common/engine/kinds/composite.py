"""Shared by all composite steps, plus the fallback of a failed step.

A composite is claimed when it becomes ready, expands into children and then waits without occupying a worker.  When the
last child has ended, it is claimed again and either starts the next round or ends.  Its progress is stored in its
expansions, so any worker can continue it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common.engine import rows
from gorgon_common.engine.context import Run
from gorgon_common.engine.kinds.base import StepContext
from gorgon_common.engine.outcomes import Done, Expanded
from gorgon_common.engine.records import Checkpoint, Claimed, Expansion, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import StepError


class ChildFailed(StepError):
    """A step inside failed."""

    kind = "child_failed"


def children(run: Run, expansion: Expansion) -> list[Checkpoint | None]:
    """Return the checkpoints of an expansion's children in row order; None for a child that has not ended."""
    ids = [step_id(run.info.id, row) for row in range(expansion.base, expansion.base + expansion.count)]
    found = run.knowledge.checkpoints(ids)
    return [found.get(key) for key in ids]


def check(ended: Sequence[Checkpoint | None]) -> None:
    """Raise ChildFailed with the first failure among the children."""
    for child in ended:
        if child is not None and child.status is StepStatus.FAILED:
            error = child.error or {}
            raise ChildFailed(
                f"{error.get('step', 'a step inside')}: {error.get('message', 'failed')}", hint=error.get("hint")
            )
    for child in ended:
        if child is None or child.status is StepStatus.CANCELLED:
            raise ChildFailed("A step inside was cancelled.")


def fallback(run: Run, step: Claimed, error: Mapping[str, Any]) -> Expanded:
    """Return the expansion of a failed step into its fallback."""
    (number,) = run.node(step).bodies["fallback"]
    child = rows.child_row(run.plan, number, row=0, parent=step.row, position=None)
    return Expanded([child], "fallback", round=len(run.expansions(step.row)), items=[dict(error)])


def fallback_ended(context: StepContext, expansion: Expansion) -> Done:
    """End a step whose fallback has ended.  Raises ChildFailed if the fallback failed too."""
    child = children(context.run, expansion)[0]
    check([child])
    assert child is not None
    return context.succeeded(child.output, {"fallback": expansion.items[0].get("message")})
