"""`checkpoint:` — a named savepoint with a message in the run's journal."""

from __future__ import annotations

from typing import ClassVar

from gorgon_common.engine import rendering
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import Outcome


class CheckpointMessage(StepHandler):
    """Renders the message.  Every step is checkpointed, so there is nothing else to do."""

    kind: ClassVar[str] = "checkpoint"

    def execute(self, context: StepContext) -> Outcome:
        """Return the message as the output.  Raises ExpressionError."""
        text = rendering.text(context.node.spec.get("message") or "", context.env())
        return context.succeeded(text, {"message": text})
