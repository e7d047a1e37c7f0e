"""The history of past runs that a forecast uses: plain data from the ledger and the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class StepHistory:
    """The history of a step: one entry for each call (tokens, seconds), execution (took) or expansion (counts).

    `output` counts reasoning too.  `took`: seconds from start to end of steps that make no calls.  `counts`: items of a
    map, rounds of a loop.  `executions` did something, `skipped` did not.  `sample`: the newest output, None for none.
    """

    input: list[float] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    calls: int = 0
    executions: int = 0
    skipped: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    sample: Any = None

    @property
    def extra(self) -> float:
        """Calls beyond the first of an execution, on average: retries and repairs."""
        return max(0.0, self.calls / self.executions - 1.0) if self.executions else 0.0

    @property
    def cached(self) -> float:
        """The share of input tokens that came from the provider's cache."""
        return self.cached_tokens / self.input_tokens if self.input_tokens else 0.0


@dataclass(frozen=True, slots=True)
class History:
    """`steps`: node id → history of the step.  `similar`: (role, provider, model) → past calls of any workflow.

    `seconds`: durations of the runs that succeeded.
    """

    runs: int = 0
    seconds: tuple[float, ...] = ()
    steps: Mapping[str, StepHistory] = field(default_factory=dict)
    similar: Mapping[tuple[str | None, str, str], StepHistory] = field(default_factory=dict)
