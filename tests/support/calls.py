"""A chain of calls as a step has it, but with a test's provider, prices and clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gorgon_common.clock import SYSTEM_CLOCK, Clock
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.agent import AgentResult, Earlier, converse
from gorgon_common.engine.calls.acquire import CallLimits
from gorgon_common.engine.calls.chain import CallChain
from gorgon_common.engine.calls.record import Recorder
from gorgon_common.engine.ports import AgentCall, AgentProvider, Pricer


@dataclass
class Rounds:
    """A memory that lasts as long as the test."""

    before: Earlier | None = None
    kept: list[Earlier] = field(default_factory=list)

    def earlier(self) -> Earlier | None:
        return self.before

    def keep(self, state: Earlier) -> bool:
        self.kept.append(state)
        return False


def chain_to(
    provider: AgentProvider,
    pricer: Pricer,
    on_call: Callable[[CallRecord], None],
    *,
    name: str = "openai",
    clock: Clock = SYSTEM_CLOCK,
    cancelled: Callable[[], bool] = lambda: False,
    limits: CallLimits | None = None,
) -> CallChain:
    """Return a chain without budgets."""
    recorder = Recorder(pricer, clock, on_call)
    return CallChain(provider, recorder, name=name, cancelled=cancelled, limits=limits, clock=clock)


def conversation(provider: AgentProvider, call: AgentCall, pricer: Pricer, on_call: Any, **options: Any) -> AgentResult:
    """Converse without budgets, repairs included."""
    return converse(chain_to(provider, pricer, on_call, **options), call)
