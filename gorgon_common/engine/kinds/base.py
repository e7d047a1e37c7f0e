"""The interface of a kind of step, and the context that each attempt receives."""

from __future__ import annotations

import abc
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from gorgon_common import strict_json
from gorgon_common.clock import Clock
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine import rendering, reporting
from gorgon_common.engine.agent import misfits
from gorgon_common.engine.budget import StepBudget, unsent
from gorgon_common.engine.budget_store import BudgetStore
from gorgon_common.engine.calls.acquire import CallLimits
from gorgon_common.engine.context import Run, RunCache
from gorgon_common.engine.outcomes import Done, Outcome
from gorgon_common.engine.poison import POISON_DEATHS
from gorgon_common.engine.ports import AgentProvider, CommandRunner, Pricer
from gorgon_common.engine.records import Claimed, Expansion, Result, Weight, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import ExpressionError, GorgonError, Malformed, OutputTooLarge, StepError
from gorgon_common.masking import SECRETS
from gorgon_common.workflow.expressions import Env, conform
from gorgon_common.workflow.plan import Node

DEFAULT_TIMEOUT = 300.0
"""Seconds allowed for an attempt if the file sets no `timeout:`."""


class DeadlineExceeded(StepError):
    """The step's deadline has passed."""

    kind = "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepServices:
    """The services of a process that its steps use.  `cancelled(run)` tells whether a run has been asked to stop.

    `limits`: how calls to models pass the rate limiter; None without one.
    """

    cache: RunCache
    providers: Mapping[str, AgentProvider]
    commands: CommandRunner
    pricer: Pricer
    clock: Clock
    cancelled: Callable[[int], bool]
    chance: Callable[[], float] = random.random
    budgets: BudgetStore | None = None
    limits: CallLimits | None = None
    poison_deaths: int = POISON_DEATHS


class StepContext:
    """One attempt at one step: its place in the run, the services it may use, and the outcomes it can return."""

    def __init__(self, services: StepServices, step: Claimed) -> None:
        self.services = services
        self.run: Run = services.cache.run(step.run)
        self.node: Node = self.run.node(step)
        self.step = step
        self.calls: list[CallRecord] = []
        self.budget = StepBudget(services.budgets, services.pricer, self.run, step)
        self.started_at: datetime = services.clock.now()

    # Inputs and limits

    def env(self, names: Mapping[str, Any] | None = None) -> Env:
        """Return the scope of the step's expressions, extended by `names`."""
        return self.run.env(self.step, self.node.refs, names)

    def cancelled(self) -> bool:
        """Tell whether a call in flight must be aborted.  The final steps of a cancelled run keep running."""
        if not self.services.cancelled(self.run.info.id):
            return False
        _, top, _ = self.run.ancestry(self.step)[-1]
        return self.run.plan.nodes[top].phase == "main"

    def timeout(self) -> float:
        """Return the seconds allowed for this attempt.  Raises DeadlineExceeded."""
        limit = self.node.timeout or DEFAULT_TIMEOUT
        left = self.seconds_left()
        if left is None:
            return limit
        if left <= 0:
            raise DeadlineExceeded(
                f"`{self.node.name}` did not end within its deadline of {self.node.deadline:g} s.",
                hint="Raise `deadline:`, which counts all attempts and all waits; `gorgon runs logs` shows them.",
            )
        return min(limit, left)

    def seconds_left(self) -> float | None:
        """Return the seconds until the step's deadline, which starts when its last dependency has ended."""
        if self.node.deadline is None:
            return None
        return self.node.deadline - (self.services.clock.now() - self.since()).total_seconds()

    def since(self) -> datetime:
        """Return when the last step before it ended: from then on it could have run."""
        rows = [self.run.locate(self.step, dep.node) for dep in self.node.deps]
        ids = [step_id(self.run.info.id, row) for row in rows if row is not None]
        ended = [entry.finished_at for entry in self.run.knowledge.checkpoints(ids).values() if entry.finished_at]
        return max(ended, default=self.run.info.key_at or self.run.info.created_at)

    def fallback(self) -> Expansion | None:
        """Return the expansion into the step's fallback, if there is one."""
        if self.step.weight != Weight.INLINE or "fallback" not in self.node.bodies:
            return None
        return next((entry for entry in self.run.expansions(self.step.row) if entry.phase == "fallback"), None)

    # Reuse of earlier work

    def fingerprint(self, *request: Any) -> str:
        """Return `root:hash` of the step's place and of everything that its work depends on (JSON values).

        Secrets are masked, so rotating a secret does not change the fingerprint.
        """
        return self.run.fingerprint(self.step, SECRETS.mask_json(json.dumps(request, sort_keys=True)))

    def adopted(self, fingerprint: str) -> Done | None:
        """Return the result that an earlier run of this root has already paid for.  Reusing it costs nothing."""
        if self.run.info.root == self.run.info.id:
            return None
        root, _, digest = fingerprint.partition(":")
        found = self.run.knowledge.reader.adoptable(int(root), digest)
        if found is None or found.status is not StepStatus.SUCCEEDED:
            return None
        return self.succeeded(found.output, {**found.detail, "adopted_from": found.id})

    # Outcomes

    def succeeded(self, output: Any = None, detail: Mapping[str, Any] | None = None) -> Done:
        """End the step as succeeded.  Raises Malformed, OutputTooLarge."""
        if output is not None:
            self._check_storable(output)
        return Done(self.result(StepStatus.SUCCEEDED, output, detail=detail or {}))

    def _check_storable(self, output: Any) -> None:
        path = strict_json.not_finite(output)
        if path is not None:
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
            raise Malformed(
                f"`{self.node.name}.output{where}` is NaN or infinite, which is not a number of JSON.",
                hint="Let the step give null, or a text, where there is no number.",
            )
        size = len(json.dumps(output, default=str))
        if size > rendering.MAX_OUTPUT_BYTES:
            raise OutputTooLarge(
                f"The output of `{self.node.name}` has {size / 1024**2:.1f} MB; at most 10 MB are allowed.",
                hint="Write large results to a file, or let the step return a part of it.",
            )

    def fitting(self, schema: Mapping[str, Any], value: Any) -> Any:
        """Return the output of a step without a model; text is parsed as JSON.  Raises Malformed if it does not fit."""
        wrong: list[str] = []
        if isinstance(value, str):
            try:
                value = strict_json.loads(value)
            except ValueError as error:
                wrong = [f"it is not JSON: {error}"]
        wrong = wrong or misfits(schema, value)
        if wrong:
            listed = "\n".join(f"- {sentence}" for sentence in wrong)
            raise Malformed(
                f"The output of `{self.node.name}` does not fit its `output:` schema:\n{listed}",
                hint="Print one JSON value that fits, or remove `output:`.",
            )
        return conform(value, schema)

    def skipped(self, reason: str) -> Done:
        """Skip the step and the steps that require it."""
        result = self.result(StepStatus.SKIPPED, reason=reason)
        return Done(result, self.run.descendants(self.step, failed=False))

    def result(self, status: StepStatus, output: Any = None, **fields: Any) -> Result:
        """Return a result of this attempt."""
        return Result(
            status,
            output,
            attempts=self.step.attempt,
            calls=self.paid(),
            started_at=self.started_at,
            finished_at=self.services.clock.now(),
            **fields,
        )

    def error_data(self, error: GorgonError) -> dict[str, Any]:
        """Return an error as data for the checkpoint, `{{error}}` and the user."""
        path = self.run.shown_path(self.step)
        return {
            "step": path,
            "kind": getattr(error, "kind", "expression" if isinstance(error, ExpressionError) else "error"),
            "message": error.message,
            "hint": error.hint or None,
            "summary": f"{self.run.info.workflow}: step {path} failed: {error.message}",
        }

    def record(self, call: CallRecord) -> None:
        """Record a finished call, whatever its outcome."""
        self.calls.append(call)
        self.budget.recorded(call)
        reporting.settled(self.run, self.step, call)

    def paid(self) -> tuple[CallRecord, ...]:
        """Return the calls of this attempt, plus the reservations for calls that were not made."""
        made = {call.ordinal for call in self.calls}
        return (*self.calls, *(unsent(ordinal) for ordinal in self.budget.held if ordinal not in made))


class StepHandler(abc.ABC):
    """Does the work of one kind of step.  Each kind is one subclass in its own file and one line in `kinds`."""

    kind: ClassVar[str]
    """The `Node.kind` that this handler serves."""

    @abc.abstractmethod
    def execute(self, context: StepContext) -> Outcome:
        """Do the work.  Errors in `failure.HANDLED` are mapped to outcomes there."""

    def stops_at_failure(self, node: Node) -> bool:
        """Tell whether a failed child stops the rest of its composite."""
        return False
