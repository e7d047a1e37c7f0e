"""`wait:` — until a time, or until an event is sent to the run.  It holds no slot and no thread.

A wait is decided anew each time that its step is claimed, from when the last step before it ended: a worker that takes
it over needs no state of the previous one.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import ClassVar

from gorgon_common.clock import format_time, parse_time
from gorgon_common.engine import rendering
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import EVENT, TIME, Outcome, Snoozed
from gorgon_common.errors import ExpressionError, StepError

LONGEST = timedelta(days=3650)
"""How long a step waits for an event that has no `timeout:`."""
MAX_NAME = 200


class EventTimeout(StepError):
    """The event was not sent in time."""

    kind = "timeout"


class Wait(StepHandler):
    """Waits for a duration, for a point in time, or for an event, whose data is its output."""

    kind: ClassVar[str] = "wait"

    def execute(self, context: StepContext) -> Outcome:
        """Go on, or wait for what is left.  Raises ExpressionError, EventTimeout."""
        spec = context.node.spec
        if "event" in spec:
            return _for_event(context)
        until = _point(context) if "until" in spec else context.since() + timedelta(seconds=spec["for"])
        left = (until - context.services.clock.now()).total_seconds()
        if left <= 0:
            return context.succeeded()
        return Snoozed(left, TIME, f"waits until {_shown(until)}", attempt=False)


def _for_event(context: StepContext) -> Outcome:
    spec, run = context.node.spec, context.run
    name = rendering.text(spec["event"], context.env())
    if not name or len(name) > MAX_NAME:
        raise ExpressionError(
            f"`event:` of `{context.node.name}` gives a name of {len(name)} characters.",
            hint=f"The name of an event has 1 to {MAX_NAME} characters.",
        )
    taken = run.knowledge.reader.take_event(run.info.id, name, context.step.id)
    if taken is not None:
        return context.succeeded(taken.data, {"event": name, "sent_at": format_time(taken.at)})
    timeout = spec.get("timeout")
    until = context.since() + (LONGEST if timeout is None else timedelta(seconds=timeout))
    left = (until - context.services.clock.now()).total_seconds()
    if left <= 0:
        raise EventTimeout(
            f"The event `{name}` was not sent within {timeout:g} s.",
            hint=f"Send it with: gorgon runs signal {run.info.public_id} {name}",
        )
    limit = "" if timeout is None else f", at most until {_shown(until)}"
    return Snoozed(left, EVENT, f"waits for the event `{name}`{limit}", attempt=False, event=name)


def _point(context: StepContext) -> datetime:
    written = rendering.text(context.node.spec["until"], context.env())
    try:
        return parse_time(written)
    except ValueError:
        raise ExpressionError(
            f"`until:` of `{context.node.name}` gives {written[:60]!r}, which is not a point in time.",
            hint="Write it with its offset, such as 2026-05-01T08:00:00+02:00 or 2026-05-01T06:00:00Z.",
        ) from None


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
