"""Observes calls to models, comparing the estimated number of tokens with the number the provider counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from gorgon_common.costs.tokens import Calibration, count_call
from gorgon_common.engine.ports import AgentCall, AgentProvider, AgentReply


class Observed:
    """A provider whose calls correct the token estimates."""

    def __init__(self, inner: AgentProvider, calibration: Calibration) -> None:
        self.inner = inner
        self.name = inner.name
        self._calibration = calibration

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        """Make the call and record its token counts."""
        reply = self.inner.call(call, cancelled)
        texts = [message.content for message in call.messages]
        estimated = count_call(call.model, system=call.system, messages=texts, schema=call.schema)
        self._calibration.observe(self.name, call.model, estimated, reply.usage)
        return reply

    def close(self) -> None:
        """Release the connections."""
        self.inner.close()


class ObservedProviders(Mapping[str, AgentProvider]):
    """Providers whose calls correct the token estimates; each is created on first use."""

    def __init__(self, inner: Mapping[str, AgentProvider], calibration: Calibration) -> None:
        self._inner = inner
        self._calibration = calibration
        self._made: dict[str, Observed] = {}

    def __getitem__(self, name: str) -> AgentProvider:
        provider = self._inner[name]
        known = self._made.get(name)
        if known is None or known.inner is not provider:
            known = self._made[name] = Observed(provider, self._calibration)
        return known

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)
