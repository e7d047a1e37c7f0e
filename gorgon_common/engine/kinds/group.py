"""`steps:` — a group of steps with its own ordering."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from gorgon_common.engine import rows
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.kinds.composite import check, children
from gorgon_common.engine.outcomes import Expanded, Outcome
from gorgon_common.workflow.plan import Node


class Group(StepHandler):
    """Expands into its steps; its output maps their ids to their outputs."""

    kind: ClassVar[str] = "group"

    def execute(self, context: StepContext) -> Outcome:
        """Expand the group, or end it.  Raises ChildFailed."""
        run, node = context.run, context.node
        earlier = run.expansions(context.step.row)
        if not earlier:
            return _expanded(context)
        ended = children(run, earlier[0])
        check(ended)
        return context.succeeded(
            {
                run.plan.nodes[number].id: child.output if child is not None else None
                for number, child in zip(node.bodies["steps"], ended, strict=True)
            }
        )

    def stops_at_failure(self, node: Node) -> bool:
        """True unless a file in the older format sets `fail_fast: false`."""
        return bool(node.spec.get("fail_fast", True))


def _expanded(context: StepContext) -> Expanded:
    run, node = context.run, context.node
    steps = rows.body_rows(run.plan, run.successors, node.bodies["steps"], parent=context.step.row)
    window = node.spec.get("max_parallel")
    if window is None or window >= len(steps) or any(step.deps_left for step in steps):
        return Expanded(steps, "steps")
    opened = [step if step.row < window else replace(step, deps_left=1) for step in steps]
    return Expanded(opened, "steps", window=window)
