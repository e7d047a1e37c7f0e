"""A queued step that does nothing, or sleeps: for tests and benchmarks.  It cannot be written in a file."""

from __future__ import annotations

import time
from typing import ClassVar

from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import Outcome

_NOTHING = CallRecord("none", "noop", None, 1, Usage(), 0, "", 0, "ok")


class Noop(StepHandler):
    """Runs for `milliseconds`."""

    kind: ClassVar[str] = "noop"

    def execute(self, context: StepContext) -> Outcome:
        """Write a row to the ledger, as a real call would."""
        time.sleep(context.node.spec.get("milliseconds", 0) / 1000)
        context.calls.append(_NOTHING)
        return context.succeeded("")
