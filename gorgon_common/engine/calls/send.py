"""The send link: the provider makes the call within what is left of its time."""

from __future__ import annotations

from dataclasses import replace

from gorgon_common.engine.calls.outside import OutsideCall
from gorgon_common.engine.ports import AgentProvider, AgentReply

LEAST_SECONDS = 0.001


def send(provider: AgentProvider, call: OutsideCall, seconds: float) -> AgentReply:
    """Make the call within `seconds`.  Raises what the provider raises; see `ports.AgentProvider`."""
    request = call.request
    if seconds != request.timeout:
        request = replace(request, timeout=max(LEAST_SECONDS, seconds))
    return provider.call(request, call.cancelled)
