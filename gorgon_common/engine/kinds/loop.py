"""`loop:` — repeats its body until a condition holds."""

from __future__ import annotations

from typing import ClassVar

from gorgon_common.engine import rows
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.kinds.composite import check, children
from gorgon_common.engine.outcomes import Expanded, Outcome
from gorgon_common.workflow.expressions import evaluate_condition


class Loop(StepHandler):
    """Expands into one iteration after another."""

    kind: ClassVar[str] = "loop"

    def execute(self, context: StepContext) -> Outcome:
        """Start the next iteration, or end with the output of the last one.  Raises ChildFailed."""
        run, node = context.run, context.node
        (body,) = node.bodies["body"]
        earlier = run.expansions(context.step.row)
        if earlier:
            last = children(run, earlier[-1])[0]
            check([last])
            own = run.value(body, last)
            names = {node.id: own, run.plan.nodes[body].id: own}
            met, _ = evaluate_condition(node.spec["until"], context.env(names), lenient=run.plan.lenient)
            if met or len(earlier) >= node.spec["max"]:
                assert last is not None
                return context.succeeded(last.output, {"iterations": len(earlier), "until_met": met})
        child = rows.child_row(run.plan, body, row=0, parent=context.step.row, position=len(earlier))
        return Expanded([child], "body", round=len(earlier))
